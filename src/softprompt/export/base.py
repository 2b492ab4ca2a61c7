"""What an export format provides, and how runs are exported: written to a draft, read back, compared, then moved."""

import os
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
from softprompt.models import model_class
from softprompt.prompts import Folded, SoftPrompt
from softprompt.runs import PeftPrompt, Run

_TOKEN_NAME = re.compile(r"<[^<>\s]+>")


@final
@dataclass(frozen=True, kw_only=True)
class ExportedPrompt:
    """The prompt of a finished run, or of a stock PEFT folder."""

    name: str
    """Its name in the export: the run's folder name."""
    token_name: str
    """Its name in text, for formats that have text: `<prompt-NAME>`."""
    run: Run | PeftPrompt
    prompt: SoftPrompt
    """As it was trained."""
    folded: Folded


class Format(ABC):
    """One export format: refuses what it cannot express, writes it, and reads it back."""

    name: ClassVar[str]
    """The value of `--to`."""
    multi_prompt: ClassVar[bool]
    """Whether one export holds several prompts of one backbone."""
    has_token_names: ClassVar[bool] = False
    """Whether a prompt has a name in text, which the user may choose."""

    @abstractmethod
    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """Why this format cannot express the prompt, and which one can; empty where it can."""

    @abstractmethod
    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """Write every file of the export into the empty folder `folder`."""

    @abstractmethod
    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Read `folder` as its user would and compare it with the live prompts; returns what was measured.

        Raises:
            ValueError: the files differ from the runs.
        """


def export_runs(
    runs: Sequence[Run | PeftPrompt],
    export_format: Format,
    folder: Path,
    *,
    backbone: Backbone | str | None = None,
    token_names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the prompts of `runs` into the new folder `folder`, read it back and compare; returns what was measured.

    Args:
        runs: finished runs, or stock PEFT prompts, of one backbone.
        export_format: a value of `FORMATS`.
        folder: the export, which must not exist.
        backbone: the runs' own, loaded or as `load_backbone` takes it, and named in the export; None: where the first
            run recorded it.
        token_names: the prompts' names in text, by the run's folder name; others are called `<prompt-NAME>`.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the format cannot express a prompt, the runs do not fit together, or what was read back differs.
            Nothing is left behind.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is never overwritten; choose another --output")
    if len(runs) > 1 and not export_format.multi_prompt:
        raise ValueError(
            f"{export_format.name} holds one prompt, but {len(runs)} runs are given; export them one by one"
        )
    if token_names and not export_format.has_token_names:
        raise ValueError(
            f"{export_format.name} has no token names for its prompts; leave --token-names out, or export to vocab"
        )
    _check_one_backbone(runs, backbone)
    names = _resolve_token_names([Path(os.path.abspath(run.folder)).name for run in runs], token_names or {})
    backbone = runs[0].load_backbone(backbone)
    trained = []
    for run, (name, token_name) in zip(runs, names.items(), strict=True):
        prompt = run.prompt(backbone)
        trained.append(ExportedPrompt(name=name, token_name=token_name, run=run, prompt=prompt, folded=prompt.fold()))
    for item in trained:
        if layout := item.run.experiment.unusual_layout:
            raise ValueError(
                f"the prompt of run {item.run.folder} is {layout}, which other software does not do; use the run with "
                "softprompt predict, or train one with prompt_position=prefix and prompt_attention=full"
            )
        if reason := export_format.refusal(item, backbone):
            raise ValueError(f"run {item.run.folder} cannot be exported to {export_format.name}: {reason}")
    with files.atomic_write(folder) as draft:
        draft.mkdir()
        export_format.write(trained, backbone, draft)
        return export_format.check(trained, backbone, draft)


def check_equal(actual: Shaped[Tensor, "*shape"], expected: Shaped[Tensor, "*shape"], what: str) -> None:
    """Refuse tensors that did not read back bit for bit.

    Raises:
        ValueError: naming `what`.
    """
    if actual.dtype != expected.dtype or not torch.equal(actual, expected.cpu()):
        raise ValueError(f"{what} did not read back as it was written, so the export is dropped; check the disk")


def check_close(
    actual: Shaped[Tensor, "*shape"], expected: Shaped[Tensor, "*shape"], relative: float, what: str
) -> dict[str, Any]:
    """Refuse tensors that differ by more than rounding: `|actual - expected| <= relative * max |expected|`.

    Returns the difference in units of a prompt's values.

    Raises:
        ValueError: naming `what`.
    """
    gap, size = float((actual.float() - expected.float()).abs().max()), float(expected.float().abs().max())
    if not gap <= relative * size:
        raise ValueError(f"{what} differs from the run's by {gap:.2g} of {size:.2g}; the export is dropped")
    return {"largest_difference": gap, "unit": EXACT["unit"], "tolerance": relative * size}


EXACT: Mapping[str, Any] = {"largest_difference": 0.0, "unit": "prompt value", "tolerance": 0.0}
"""The result of a comparison in which every tensor passed `check_equal`."""


def check_gap(gap: float, size: float, backbone: Backbone, what: str, unit: str) -> dict[str, Any]:
    """Refuse scores that differ from the live run's by more than its dtype's rounding; returns the difference.

    Args:
        gap: the largest difference.
        size: the largest score.
        backbone: whose dtype decides the tolerance.
        what: what gave the scores, for the message.
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


def vectors_refusal(trained: ExportedPrompt, backbone: Backbone, engine: str) -> str:
    """Why `engine` cannot take the prompt as vectors before a decoder's text; empty where it can."""
    if not trained.folded.plain:
        return (
            f"{engine} takes vectors before the input only, but {trained.run.experiment.method} also changes the "
            "input's own embeddings; export to npz, or serve it with softprompt serve"
        )
    if trained.folded.is_deep:
        return deep_refusal(engine)
    if not model_class(backbone).decoder_only:
        return (
            f"{engine} takes a prompt before a decoder's text only, but {backbone.source} is a model of the kind "
            f"{backbone.architecture}; export to vocab or npz, or serve it with softprompt serve"
        )
    if embedding_scale(backbone) != 1.0:
        return (
            f"{backbone.source} scales inside its embedding and engines differ in whether they scale given vectors; "
            "export to vocab, whose embedding table holds them unscaled"
        )
    return ""


def deep_refusal(engine: str) -> str:
    """Why `engine` cannot take keys and values of every layer."""
    return (
        f"{engine} takes vectors in front of the input only, but this prompt is deep, with keys and values in every "
        "layer; export it to peft (prefix tuning) or npz, serve it with softprompt serve, or train with depth shallow"
    )


@torch.no_grad()
def embedding_scale(backbone: Backbone) -> float | None:
    """The factor between the model's table and its embeddings (Gemma: the root of its width); None: not a factor."""
    module = backbone.model.get_input_embeddings()
    ids = torch.arange(min(len(module.weight), 1024), device=module.weight.device)
    table, embeddings = module.weight[ids].float(), module(ids).float()
    if torch.equal(table, embeddings):
        return 1.0
    scale = float((table * embeddings).sum() / table.square().sum())
    rounding = torch.finfo(module.weight.dtype).eps * 4
    return scale if torch.allclose(embeddings, scale * table, rtol=rounding, atol=0) else None


def text_notes(backbone: Backbone) -> dict[str, Any]:
    """What an engine's client must know to lay a row out as the run did."""
    return {"backbone": backbone.base, "dim": backbone.dim, "layout": "the prompt, then the text's own tokens"}


def _check_one_backbone(runs: Sequence[Run | PeftPrompt], backbone: Backbone | str | None) -> None:
    """A loaded backbone has a dtype of its own, so the runs' dtypes may differ; equal weights may lie anywhere.

    A PEFT folder records no weights, only a name; which backbone it is for is known where `backbone` says so.
    """
    recorded = [run.record["backbone"] for run in runs if isinstance(run, Run)]
    bases = {run.adapter.base for run in runs if isinstance(run, PeftPrompt)}
    if bases and backbone is None and len(bases := bases | {record["base"] for record in recorded}) > 1:
        raise ValueError(
            f"the prompts name the backbones {', '.join(map(repr, sorted(bases)))}; one export holds prompts of one "
            "backbone, so if these are the same weights, say where they are with --backbone"
        )
    if len({(record["hash"], record["dtype"]) for record in recorded}) <= 1:
        return
    is_loaded = isinstance(backbone, Backbone)
    kinds = {record["base"] if is_loaded else f"{record['base']} in {record['dtype']}" for record in recorded}
    if len(kinds) > 1:
        raise ValueError(
            f"the runs were trained on {', '.join(sorted(kinds))}; one export holds prompts of one backbone and dtype"
        )


def _resolve_token_names(names: Sequence[str], token_names: Mapping[str, str]) -> dict[str, str]:
    """Each prompt's name in text.

    Raises:
        ValueError: two equal names, a token name for an unknown run, or one not of the form `<name>`.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two runs are named {twice[0]!r}; rename one of the folders")
    if unknown := sorted(set(token_names) - set(names)):
        raise ValueError(f"token_names names {unknown[0]!r}, which is not one of the runs {', '.join(names)}")
    for name in names:
        files.check_name(name, "the run's folder")
    resolved = {name: token_names.get(name, f"<prompt-{name}>") for name in names}
    for name, token_name in resolved.items():
        if not _TOKEN_NAME.fullmatch(token_name):
            raise ValueError(
                f"run {name!r} has the token name {token_name!r}; give it one such as <{name.split()[0]}>, in angle "
                "brackets and without a space, with --token-names"
            )
        if list(resolved.values()).count(token_name) > 1:
            raise ValueError(f"two runs have the token name {token_name!r}; give each its own with --token-names")
    return resolved
