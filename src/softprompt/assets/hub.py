"""Prompts on the Hugging Face Hub: `hub:USER/NAME`, or `hub:USER/NAME@REVISION`, as a local folder."""

import os
from pathlib import Path
from typing import Any

from softprompt.assets.cache import cache_folder

PREFIX = "hub:"
"""How a prompt on the Hub begins where a folder could be given."""
_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "softprompt.json",
    "softprompt.safetensors",
    "head.safetensors",
    "README.md",
)
"""All that is downloaded: a PEFT prompt, or the files of a run."""


def is_hub_prompt(source: str | Path) -> bool:
    """Whether `source` names a prompt on the Hub.

    >>> is_hub_prompt("hub:user/sentiment"), is_hub_prompt("runs/sentiment-dpt-0")
    (True, False)
    """
    return str(source).startswith(PREFIX)


def hub_name(source: str | Path) -> str:
    """The last part of the prompt's name.

    >>> hub_name("hub:user/sentiment@v2")
    'sentiment'
    """
    return _split(source)[0].rpartition("/")[2]


def local_folder(source: str | Path) -> Path:
    """The folder of a prompt: `source` itself, or a prompt on the Hub, downloaded into huggingface_hub's cache.

    The folder's name is the prompt's. With `HF_HUB_OFFLINE=1`, or where the hub cannot be reached, a prompt that was
    downloaded before is taken from the cache.

    Raises:
        ValueError: `source` is not hub:USER/NAME[@REVISION].
        FileNotFoundError: the Hub has no such prompt or revision, does not show it without a token, or cannot be
            reached, and the cache does not hold it.
    """
    if not is_hub_prompt(source):
        return Path(source).expanduser()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, by its version

    name, revision = _split(source)
    arguments: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(_FILES)}
    try:
        try:
            snapshot = Path(snapshot_download(name, **arguments))
        except httpx.TransportError:  # a connection that breaks, for which the client itself does not try the cache
            snapshot = Path(snapshot_download(name, **arguments, local_files_only=True))
    except HFValidationError as error:
        raise ValueError(
            f"{source} is not the name of a prompt on the Hub; write hub:USER/NAME or hub:USER/NAME@REVISION"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name} has no revision {revision!r} on the Hub; name a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub has no prompt {name}, or shows it only with a token; check the name, and set HF_TOKEN if it is "
            "private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise FileNotFoundError(
            f"{source} is not in the local cache, and {reason}; download it where there is a network, or give a folder"
        ) from error
    if not any((snapshot / file).is_file() for file in _FILES[:-1]):
        raise FileNotFoundError(f"{source} holds neither a PEFT prompt nor a run; name another, or give a folder")
    return _named_link(snapshot, name.rpartition("/")[2])


def _split(source: str | Path) -> tuple[str, str]:
    name, _, revision = str(source).removeprefix(PREFIX).partition("@")
    return name, revision


def _named_link(snapshot: Path, name: str) -> Path:
    """A link to a snapshot under the prompt's name: the snapshot's own folder is named by its commit."""
    link = cache_folder() / "hub" / snapshot.name / name
    if not (link.is_symlink() and link.resolve() == snapshot.resolve()):
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = link.with_name(f".{name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        draft.symlink_to(snapshot.absolute(), target_is_directory=True)
        draft.replace(link)
    return link
