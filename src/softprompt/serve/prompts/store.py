"""Uploaded prompts: validated by their header before any tensor is loaded, and kept in a folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.models.peft_folder import WEIGHTS, read_prompt_bytes
from softprompt.prompts import Folded
from softprompt.serve.prompts.entry import check_prompt_name, display_name

_MAX_LENGTH = 4096
"""Most virtual tokens of an uploaded prompt."""


def read_upload(content: bytes, backbone: Backbone) -> Folded:
    """The prompt in an uploaded `adapter_model.safetensors`; nothing in it can run.

    Raises:
        ValueError: it is damaged, or holds anything but one prompt as wide as the backbone's embeddings.
    """
    return read_prompt_bytes(content, backbone.dim, display_name(backbone), _MAX_LENGTH)


@final
class PromptStore:
    """The folder of uploaded prompts, which are served again after a restart.

    Args:
        shared: several processes serve the folder, so only prompts in it can be deleted.

    Raises:
        NotADirectoryError: `folder` is a file.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self._shared = folder.expanduser(), shared
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.exists():
            files.check_folder(self.folder, "give a folder for uploaded prompts")
        self.folder.mkdir(exist_ok=True)

    def names(self) -> list[str]:
        """Names of the folders in it that hold a prompt or a run; not checked to be valid prompt names."""
        return [
            path.name
            for path in sorted(self.folder.iterdir())
            if path.is_dir() and not path.name.startswith(".") and any(path.glob("*.safetensors"))
        ]

    def path(self, name: str) -> Path:
        """The folder of the prompt of that name; never outside the store."""
        return self.folder / check_prompt_name(name)

    @contextmanager
    def saving(self, name: str, content: bytes, *, replace: bool = True) -> Iterator[None]:
        """Save the file if the block succeeds; otherwise nothing has changed.

        Args:
            replace: overwrite a prompt of that name.

        Raises:
            FileExistsError: the name is taken, perhaps by another process.
            PermissionError: the name is a run's folder, or a link.
        """
        folder = self.path(name)
        self._check_not_link(folder)
        if folder.is_dir() and not _is_upload(folder):
            raise PermissionError(f"{name} is a run's folder, which the service does not change; choose another name")
        if not replace and (folder / WEIGHTS).exists():
            raise FileExistsError(f"the prompt name {name!r} is taken; choose another, or replace it")
        is_new = not folder.is_dir()
        try:
            with files.atomic_write(folder / WEIGHTS) as draft:
                draft.write_bytes(content)
                yield
        except BaseException:
            if is_new:
                with suppress(OSError):  # not empty: another replica has saved a prompt in it meanwhile
                    folder.rmdir()
            raise

    def delete(self, name: str) -> None:
        """Delete the prompt.

        Raises:
            PermissionError: it is a run's folder or a link or, in a shared store, not in the store.
        """
        folder = self.path(name)
        self._check_not_link(folder)
        if folder.is_dir():
            if not _is_upload(folder):
                raise PermissionError(f"{name} is a run's folder, which the service does not delete; remove it by hand")
            shutil.rmtree(folder)
        elif self._shared:
            raise PermissionError(
                f"{name} was given when the service started, and every replica serves it; restart without it"
            )

    def _check_not_link(self, folder: Path) -> None:
        if folder.is_symlink():
            raise PermissionError(f"{folder.name} is a link, which the service does not change; choose another name")


def _is_upload(folder: Path) -> bool:
    """Whether the folder holds only an uploaded prompt, and drafts left by killed processes."""
    return all(file.name == WEIGHTS or file.name.startswith(f".{WEIGHTS}.") for file in folder.iterdir())
