"""`softprompt rank`: a prompt's rank, the rank its task needs, and the tails of a backbone's inputs."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from softprompt import files, runs
from softprompt.analysis.rank import (
    PromptRanks,
    Truncation,
    burstiness,
    gradient_spectra,
    measure,
    suggest_rank,
    with_sample_images,
)
from softprompt.analysis.rank.plots import check_matplotlib, draw_burstiness, draw_gradients, draw_ranks
from softprompt.assets.hub import local_folder
from softprompt.backbones import load
from softprompt.backbones.projections import query_key
from softprompt.cli.terminal import Terminal, console, show_table

_ENERGY_RANKS = (1, 2, 5, 10, 20, 50)
"""Ranks whose share of a gradient's energy is shown."""
_Draw = Callable[[Path], list[Path]]
"""Draws what was measured into a folder, and returns the files."""


def rank_(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    checkpoints: bool = False,
    functional: bool = False,
    suggest: bool = False,
    truncation: Truncation = Truncation(),  # noqa: B008  (a frozen value)
    burstiness_: Annotated[bool, tyro.conf.arg(name="burstiness")] = False,
    samples: int = 1000,
    gradient: bool = False,
    length: int | None = None,
    batches: int = 8,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure ranks.

    Args:
        source: A run, a PEFT prompt-tuning folder (each also as `hub:USER/NAME`) or a folder of runs; with --burstiness
            or --gradient also a backbone.
        checkpoints: Also measure at every checkpoint.
        functional: Also truncate the prompt to lower ranks and score each.
        suggest: Suggest a rank for DPT from these scores: with --part update for one with an anchor (the default), else
            for one without.
        truncation: How prompts are truncated and scored.
        burstiness_: Measure instead how heavy the tails of the inputs' query-key products are.
        samples: Number of input vectors for --burstiness.
        gradient: Measure instead in how few directions the loss's gradient lies: at the prompts of a run, or for a
            task (--task) at random vocabulary rows of a backbone.
        length: Virtual tokens for --gradient of a backbone; None: 100.
        batches: Number of training batches that --gradient averages over.
        out: Folder for plots (PNG and SVG) and all values (rank.json); None: write neither.
    """
    has_truncation_flags = dataclasses.replace(truncation, backbone=None) != Truncation()
    if burstiness_ and (checkpoints or functional or suggest or has_truncation_flags):
        raise ValueError(
            "--burstiness measures a backbone, not a prompt; combine it only with --samples, --backbone, --out"
        )
    if samples != 1000 and not burstiness_:
        raise ValueError("--samples does nothing without --burstiness; give it too, or leave it out")
    if gradient:
        if burstiness_ or functional or suggest or truncation != Truncation(task=truncation.task, data=truncation.data):
            raise ValueError("--gradient goes with --task, --data, --length, --batches, --checkpoints and --out alone")
    elif length is not None or batches != 8:
        raise ValueError("--length and --batches do nothing without --gradient; give it too, or leave them out")
    elif has_truncation_flags and not (functional or suggest):
        raise ValueError(
            "the flags of a truncation do nothing without --functional or --suggest; give one of these too"
        )
    if out is not None:
        check_matplotlib()
    if burstiness_:
        result, draw = _burstiness(source, samples, truncation.backbone)
    elif gradient:
        result, draw = _gradients(source, truncation, length, batches, checkpoints)
    else:
        measured = measure(
            source,
            checkpoints=checkpoints,
            functional=truncation if functional or suggest else None,
            backbone=truncation.backbone,
            callback=Terminal(),
        )
        result, draw = _ranks(measured, suggest), partial(draw_ranks, measured)
    result = {"command": "rank", "source": source, **result}
    if out is not None:
        # Before the plots too: what was measured at length survives a plot that cannot be drawn.
        files.write_text(out / "rank.json", json.dumps(result, indent=1))
        result["pictures"] = [str(path) for path in draw(out)]
        files.write_text(out / "rank.json", json.dumps(result, indent=1))
    return _without(result, "density")  # thousands of bins, only for the file


def _without(values: Any, key: str) -> Any:
    if isinstance(values, dict):
        return {name: _without(value, key) for name, value in values.items() if name != key}
    return [_without(value, key) for value in values] if isinstance(values, (list, tuple)) else values


def _ranks(measured: list[PromptRanks], suggest: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"prompts": [ranks.to_json() for ranks in measured]}
    show_table([row for ranks in measured for row in _rank_rows(ranks)])
    for ranks in measured:
        if ranks.loaded.note:
            console.print(f"{ranks.loaded.name}: {ranks.loaded.note}")
        _show_functional(ranks)
    if suggest:
        suggestions = suggest_rank(
            [(ranks.loaded, ranks.functional) for ranks in measured if ranks.functional is not None]
        )
        for suggestion in suggestions:
            size = f"length {suggestion.length}"
            size += f" in each of {suggestion.num_matrices} matrices" if suggestion.num_matrices > 1 else ""
            console.print(
                f"{suggestion.task}, {suggestion.method} of {size} on {suggestion.backbone}, the "
                f"{suggestion.part} truncated: {suggestion.sentence}"
            )
        result["suggestions"] = [dataclasses.asdict(suggestion) for suggestion in suggestions]
    return result


def _rank_rows(ranks: PromptRanks) -> list[dict[str, Any]]:
    by_step = [(str(step), spectra) for step, spectra in ranks.history.items()]
    return [
        {
            "prompt": ranks.loaded.name,
            "step": step,
            "of": view,
            "numerical": spectrum.numerical,
            "stable": f"{spectrum.stable:.2f}",
            "effective": f"{spectrum.effective:.2f}",
            "of at most": ranks.loaded.max_rank,
        }
        for step, spectra in [*by_step, ("finished", ranks.spectra)]
        for view, spectrum in spectra.items()
    ]


def _show_functional(ranks: PromptRanks) -> None:
    functional = ranks.functional
    if functional is None:
        return
    full = functional.full
    console.print(
        f"{ranks.loaded.name}: {functional.split} {full.metric} {full.value:.3f} "
        f"({full.ci_low:.3f} to {full.ci_high:.3f}, {full.n} rows, majority {full.majority:.3f}), "
        f"the {functional.part} truncated to lower ranks:"
    )
    show_table(
        [
            {
                "rank": truncated.rank,
                full.metric: f"{truncated.score.value:.3f}",
                "loss": f"{truncated.drop.value:+.3f}",
                "95% interval": f"{truncated.drop.ci_low:+.3f} to {truncated.drop.ci_high:+.3f}",
                "p-value": f"{truncated.drop.p_value:.3f}",
            }
            for truncated in functional.truncations
        ]
    )
    console.print(
        f"smallest rank within the full score's interval: {functional.rank_by_interval}; "
        f"smallest rank from which no loss is significant: {functional.rank_by_significance}"
    )
    if not functional.above_majority:
        console.print("the full prompt does not beat the majority answer on these rows, so its ranks mean little")


def _gradients(
    source: str, truncation: Truncation, length: int | None, batches: int, checkpoints: bool
) -> tuple[dict[str, Any], _Draw]:
    points = gradient_spectra(
        source,
        task=truncation.task,
        data=truncation.data,
        length=length,
        batches=batches,
        checkpoints=checkpoints,
        callback=Terminal(),
    )
    max_rank = len(points[0].spectrum.values)
    ranks = [rank for rank in _ENERGY_RANKS if rank < max_rank]
    show_table(
        [
            {"at": point.at, **{f"first {rank}": f"{point.energy(rank):.1%}" for rank in ranks}, "of": max_rank}
            for point in points
        ]
    )
    console.print("share of the gradient's squared norm in its first k directions; with equal directions it is k / of")
    result = {
        "batches": batches,
        "gradients": [
            {
                "at": point.at,
                "energy": {str(rank): point.energy(rank) for rank in ranks},
                "stable": point.spectrum.stable,
                "effective": point.spectrum.effective,
                "values": list(point.spectrum.values),
            }
            for point in points
        ],
    }
    return result, partial(draw_gradients, points, source)


def _burstiness(source: str, samples: int, run_backbone: str | None) -> tuple[dict[str, Any], _Draw]:
    path = local_folder(source)
    if (path / runs.RECORD).is_file():
        run = runs.open_run(path)
        backbone = with_sample_images(run, run.load_backbone(run_backbone))
    else:
        if run_backbone is not None:
            raise ValueError(f"{source} is not a run, so it is a backbone itself; leave --backbone out")
        backbone = load(source)
        if backbone.takes_images:
            raise ValueError(f"{source} reads images, but none are given; give a run, for its training images")
    measured = burstiness(backbone.host(), query_key(backbone.model), samples=samples)
    pairs = {"inputs": measured.inputs, "products": measured.products}
    pairs |= {f"products, head {number}": pair for number, pair in enumerate(measured.heads)}
    show_table(
        [
            {"of": name, "": state, "kurtosis": f"{values.kurtosis:.2f}", "beyond 3": f"{values.beyond:.2%}"}
            for name, pair in pairs.items()
            for state, values in (("as they are", pair.before), ("whitened", pair.after))
        ]
    )
    console.print("a Gaussian has kurtosis 3 and 0.27% beyond 3 standard deviations; a Laplacian 6 and 1.44%")
    result = {
        "backbone": backbone.source,
        "samples": samples,
        "burstiness": dataclasses.asdict(measured),
    }
    return result, partial(draw_burstiness, measured, backbone.source)
