"""What a format of export answers for, and how runs are exported: written beside the place, read back, then moved."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Shaped
from torch import Tensor

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.prompts import Folded, SoftPrompt
from softprompt.runs import Run

_WORD = re.compile(r"<[^<>\s]+>")


@final
@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run's prompt, on its way out."""

    name: str
    """What it is called in the export: its run's folder name."""
    word: str
    """What it is called in text, where the format has text: `<prompt-NAME>`."""
    run: Run
    prompt: SoftPrompt
    """As it was trained."""
    folded: Folded


class Format(ABC):
    """One kind of export: refuses what it cannot say, writes it, and reads it back."""

    name: ClassVar[str]
    """After `--to`."""
    many: ClassVar[bool]
    """Whether one export holds several prompts of one backbone."""
    worded: ClassVar[bool] = False
    """Whether a prompt has a word in text, which the user may choose."""

    @abstractmethod
    def refusal(self, trained: Trained, backbone: Backbone) -> str:
        """Why this format cannot say the prompt, and what can; empty where it can."""

    @abstractmethod
    def write(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> None:
        """Every file of the export into `folder`, which is there and empty."""

    @abstractmethod
    def check(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Read `folder` as its user would and compare it with the live prompts; what was measured, as plain values.

        Raises:
            ValueError: it does not say what the runs say.
        """


def export_runs(
    runs: Sequence[Run],
    form: Format,
    folder: Path,
    *,
    backbone: Backbone | str | None = None,
    token_names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the prompts of `runs` into the new folder `folder`, read it back and compare; what was measured.

    Args:
        form: a value of `FORMATS`.
        backbone: the runs' own, loaded or as `load_backbone` takes it, and named in the export; none: where the first
            run had it.
        words: what a run's prompt is called in text, by the run's folder name; others are called `<prompt-NAME>`.

    Raises:
        FileExistsError: `folder` is there.
        ValueError: the format cannot say a prompt, the runs do not fit together, or what was read back differs. Nothing
            is left behind.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is never overwritten; choose another --output")
    if len(runs) > 1 and not form.many:
        raise ValueError(f"{form.name} holds one prompt and {len(runs)} runs are given; export them one by one")
    if token_names and not form.worded:
        raise ValueError(f"{form.name} has no token names for its prompts; leave --token-names out, or export to vocab")
    _refuse_mixed(runs, backbone)
    names = _words([run.folder.resolve().name for run in runs], token_names or {})
    backbone = runs[0].backbone(backbone)
    trained = [_trained(run, backbone, name, word) for run, (name, word) in zip(runs, names.items(), strict=True)]
    for one in trained:
        if own := one.run.experiment.unusual_layout:
            raise ValueError(
                f"the prompt of run {one.run.folder} is {own}, which other software does not do; use the run with "
                "softprompt predict, or train one with prompt_position=prefix and prompt_attention=full"
            )
        if reason := form.refusal(one, backbone):
            raise ValueError(f"run {one.run.folder} cannot be exported to {form.name}: {reason}")
    with files.atomic_write(folder) as draft:
        draft.mkdir()
        form.write(trained, backbone, draft)
        return form.check(trained, backbone, draft)


def same(found: Shaped[Tensor, "*shape"], wanted: Shaped[Tensor, "*shape"], what: str) -> None:
    """Refuse what was not read back bit for bit.

    Raises:
        ValueError: naming `what`.
    """
    if found.dtype != wanted.dtype or not torch.equal(found, wanted.cpu()):
        raise ValueError(f"{what} did not read back as it was written; the export is dropped: check the disk")


def close(
    found: Shaped[Tensor, "*shape"], wanted: Shaped[Tensor, "*shape"], relative: float, what: str
) -> dict[str, Any]:
    """Refuse what was read back otherwise than rounding explains: `|found - wanted| <= relative * max |wanted|`.

    What was found has the unit of a prompt's values.

    Raises:
        ValueError: naming `what`.
    """
    gap, size = float((found.float() - wanted.float()).abs().max()), float(wanted.float().abs().max())
    if not gap <= relative * size:
        raise ValueError(f"{what} differs from the run's by {gap:.2g} of {size:.2g}; the export is dropped")
    return {"largest_difference": gap, "unit": EXACT["unit"], "tolerance": relative * size}


EXACT: Mapping[str, Any] = {"largest_difference": 0.0, "unit": "prompt value", "tolerance": 0.0}
"""What a comparison found that went through `same` for every tensor."""


def refuse_gap(gap: float, size: float, backbone: Backbone, what: str, unit: str) -> dict[str, Any]:
    """Refuse scores that differ from the live run's by more than its dtype's rounding explains; else what was found.

    Args:
        gap: the largest difference.
        size: the largest score.
        unit: of both.

    Raises:
        ValueError: naming `what`.
    """
    tolerance = (1e-3 if backbone.dtype is torch.float32 else 6e-2) * max(size, 1.0)
    if not gap <= tolerance:
        raise ValueError(
            f"{what} gives other scores than the live run (largest difference {gap:.2g}), so the export is dropped; "
            "please report the backbone"
        )
    return {"largest_difference": gap, "unit": unit, "tolerance": tolerance}


def row_refusal(trained: Trained, backbone: Backbone, engine: str) -> str:
    """Why `engine` cannot take the prompt as rows in front of a decoder's text; empty where it can."""
    if not trained.folded.plain:
        return (
            f"{engine} takes vectors in front of the input alone, and {trained.run.experiment.method} also changes the "
            "input's own embeddings; export to npz, or serve it with softprompt serve"
        )
    if backbone.architecture != "causal":
        return (
            f"{engine} takes a prompt in front of a decoder alone, and {backbone.source} is a model of the kind "
            f"{backbone.architecture}; export to vocab or npz, or serve it with softprompt serve"
        )
    if embedding_scale(backbone) != 1.0:
        return (
            f"{backbone.source} scales inside its embedding and engines differ in whether they scale given rows; "
            "export to vocab, which has the rows in the table's own units"
        )
    return ""


@torch.no_grad()
def embedding_scale(backbone: Backbone) -> float | None:
    """What the model multiplies its table by when it embeds (Gemma: the root of its width); none: something else."""
    module = backbone.model.get_input_embeddings()
    ids = torch.arange(min(len(module.weight), 1024), device=module.weight.device)
    table, found = module.weight[ids].float(), module(ids).float()
    if torch.equal(table, found):
        return 1.0
    scale = float((table * found).sum() / table.square().sum())
    close = torch.finfo(module.weight.dtype).eps * 4
    return scale if torch.allclose(found, scale * table, rtol=close, atol=0) else None


def text_notes(backbone: Backbone) -> dict[str, Any]:
    """What a client of an engine must know to lay a row out as the run did."""
    return {"backbone": backbone.base, "dim": backbone.dim, "layout": "the prompt, then the text's own tokens"}


def _refuse_mixed(runs: Sequence[Run], backbone: Backbone | str | None) -> None:
    """A loaded backbone has a dtype of its own, which the runs' then leave alone; equal weights may lie anywhere."""
    recorded = [run.record["backbone"] for run in runs]
    if len({(one["hash"], one["dtype"]) for one in recorded}) == 1:
        return
    kinds = {one["base"] if isinstance(backbone, Backbone) else f"{one['base']} in {one['dtype']}" for one in recorded}
    if len(kinds) > 1:
        raise ValueError(
            f"the runs were trained on {', '.join(sorted(kinds))}; one export holds prompts of one backbone and dtype"
        )


def _words(names: Sequence[str], token_names: Mapping[str, str]) -> dict[str, str]:
    """Each name's word.

    Raises:
        ValueError: two equal names or words, a word for no run, or one that is no `<word>`.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two runs are named {twice[0]!r}; rename one of the folders")
    if unknown := sorted(set(token_names) - set(names)):
        raise ValueError(f"token_names names {unknown[0]!r}, which is none of the runs {', '.join(names)}")
    for name in names:
        files.check_name(name, "the run's folder")
    found = {name: token_names.get(name, f"<prompt-{name}>") for name in names}
    for name, word in found.items():
        if not _WORD.fullmatch(word):
            raise ValueError(
                f"run {name!r} has the word {word!r}; give it one such as <{name.split()[0]}>, in angle brackets and "
                "without a space, with --token-names"
            )
        if list(found.values()).count(word) > 1:
            raise ValueError(f"two runs have the word {word!r}; give each its own with --token-names")
    return found


def _trained(run: Run, backbone: Backbone, name: str, word: str) -> Trained:
    prompt = run.prompt(backbone)
    return Trained(name=name, word=word, run=run, prompt=prompt, folded=prompt.fold())
