"""`softprompt rank`: what rank a prompt has, what rank its task needs, and how bursty a backbone's inputs are."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from softprompt import files, runs
from softprompt.analysis.rank import (
    Measured,
    Truncation,
    burstiness,
    gradient_spectra,
    measure,
    suggest_rank,
    with_sample_images,
)
from softprompt.analysis.rank.pictures import draw_burstiness, draw_gradients, draw_ranks, refuse_without_matplotlib
from softprompt.backbones import load
from softprompt.backbones.projections import query_key
from softprompt.cli.terminal import Terminal, console, show_table

_ENERGY_RANKS = (1, 2, 5, 10, 20, 50)
"""Ranks whose share of a gradient's energy is shown."""


def rank_(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    checkpoints: bool = False,
    functional: bool = False,
    suggest: bool = False,
    cutting: Truncation = Truncation(),  # noqa: B008  (a frozen value)
    burstiness_: Annotated[bool, tyro.conf.arg(name="burstiness")] = False,
    samples: int = 1000,
    gradient: bool = False,
    length: int | None = None,
    batches: int = 8,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure ranks.

    Args:
        source: A run, a PEFT prompt-tuning folder or a folder of runs; with --burstiness or --gradient also a backbone.
        checkpoints: Also at every checkpoint, for the course of training.
        functional: Also score the prompt cut to lower ranks.
        suggest: Propose a rank for DPT from that.
        cutting: How prompts are cut and scored.
        burstiness_: Measure instead how heavy the tails of the inputs' query-key products are.
        samples: Input vectors for --burstiness.
        gradient: Measure instead how few directions the loss's gradient has: at the prompts of a run, or for a task
            (--task) at random vocabulary rows of a backbone.
        length: Rows of the prompt for --gradient of a backbone; none: 100.
        batches: Batches of training rows that the gradient of --gradient is the mean of.
        out: Folder for pictures (PNG and SVG) and all numbers (rank.json); none: neither.
    """
    cuts = dataclasses.replace(cutting, backbone=None) != Truncation()
    if burstiness_ and (checkpoints or functional or suggest or cuts):
        raise ValueError(
            "--burstiness is of a backbone and not of a prompt; give it with --samples, --backbone and --out alone"
        )
    if gradient:
        if burstiness_ or functional or suggest or cutting != Truncation(task=cutting.task, data=cutting.data):
            raise ValueError("--gradient goes with --task, --data, --length, --batches, --checkpoints and --out alone")
    elif length is not None or batches != 8:
        raise ValueError("--length and --batches do nothing without --gradient; give it too, or leave them out")
    elif cuts and not (functional or suggest):
        raise ValueError("the flags of a cut do nothing without --functional or --suggest; give one of these too")
    if suggest and cutting.part != "prompt":
        raise ValueError(f"--suggest reads a rank off cuts of the prompt itself; leave --part {cutting.part} out")
    if out is not None:
        refuse_without_matplotlib()
    result = _burstiness(source, samples, cutting.backbone, out) if burstiness_ else {}
    if gradient:
        result = _gradients(source, cutting, length, batches, checkpoints, out)
    elif not burstiness_:
        terminal = Terminal()
        way = cutting if functional or suggest else None
        found = measure(source, checkpoints=checkpoints, functional=way, backbone=cutting.backbone, watch=terminal)
        result = _ranks(found, suggest, out)
    result = {"command": "rank", "source": source, **result}
    if out is not None:
        files.write_text(out / "rank.json", json.dumps(result, indent=1))
    return _without(result, "density")  # thousands of bins, for the file alone


def _without(values: Any, key: str) -> Any:
    if isinstance(values, dict):
        return {name: _without(value, key) for name, value in values.items() if name != key}
    return [_without(value, key) for value in values] if isinstance(values, (list, tuple)) else values


def _ranks(measured: list[Measured], suggest: bool, out: Path | None) -> dict[str, Any]:
    result: dict[str, Any] = {"prompts": [found.to_json() for found in measured]}
    show_table([row for found in measured for row in _rank_rows(found)])
    for found in measured:
        if found.subject.note:
            console.print(f"{found.subject.name}: {found.subject.note}")
        _show_functional(found)
    if suggest:
        scored = [(found.subject, found.functional) for found in measured if found.functional is not None]
        suggestions = suggest_rank(scored)
        for one in suggestions:
            size = f"length {one.length}" + (f" in each of {one.depth} layers" if one.depth > 1 else "")
            console.print(f"{one.task}, {one.method} of {size} on {one.backbone}: {one.sentence}")
        result["suggestions"] = [dataclasses.asdict(one) for one in suggestions]
    if out is not None:
        result["pictures"] = [str(path) for path in draw_ranks(measured, out)]
    return result


def _rank_rows(found: Measured) -> list[dict[str, Any]]:
    times = [(str(step), at) for step, at in found.course.items()]
    return [
        {
            "prompt": found.subject.name,
            "step": step,
            "of": view,
            "numerical": spectrum.numerical,
            "stable": f"{spectrum.stable:.2f}",
            "effective": f"{spectrum.effective:.2f}",
            "of at most": found.subject.most,
        }
        for step, at in [*times, ("finished", found.ranks)]
        for view, spectrum in at.items()
    ]


def _show_functional(found: Measured) -> None:
    scored = found.functional
    if scored is None:
        return
    full = scored.full
    console.print(
        f"{found.subject.name}: {scored.split} {full.metric} {full.value:.3f} "
        f"({full.ci_low:.3f} to {full.ci_high:.3f}, {full.n} rows, "
        f"majority {full.majority:.3f}), cut to lower ranks of the {scored.part}:"
    )
    show_table(
        [
            {
                "rank": cut.rank,
                full.metric: f"{cut.score.value:.3f}",
                "lost": f"{cut.drop.value:+.3f}",
                "95% interval": f"{cut.drop.ci_low:+.3f} to {cut.drop.ci_high:+.3f}",
                "by chance": f"{cut.drop.p_value:.3f}",
            }
            for cut in scored.cuts
        ]
    )
    console.print(
        f"within the full score's interval first at rank {scored.smallest}; no loss shown from rank {scored.paired} on"
    )
    if not scored.above_majority:
        console.print("the full prompt does not beat the majority answer on these rows, so its ranks say little")


def _gradients(
    source: str, cutting: Truncation, length: int | None, batches: int, checkpoints: bool, out: Path | None
) -> dict[str, Any]:
    points = gradient_spectra(
        source,
        task=cutting.task,
        data=cutting.data,
        length=length,
        batches=batches,
        checkpoints=checkpoints,
        watch=Terminal(),
    )
    most = len(points[0].spectrum.values)
    ranks = [rank for rank in _ENERGY_RANKS if rank < most]
    show_table(
        [
            {"at": point.at, **{f"first {rank}": f"{point.energy(rank):.1%}" for rank in ranks}, "of": most}
            for point in points
        ]
    )
    console.print("shares of the squared size of the gradient in its first directions; equal in all would be rank / of")
    result: dict[str, Any] = {
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
    if out is not None:
        result["pictures"] = [str(file) for file in draw_gradients(points, source, out)]
    return result


def _burstiness(source: str, samples: int, moved: str | None, out: Path | None) -> dict[str, Any]:
    path = Path(source).expanduser()
    if (path / runs.RECORD).is_file():
        run = runs.open_run(path)
        backbone = with_sample_images(run, run.backbone(moved))
    else:
        if moved is not None:
            raise ValueError(f"{source} is no run, so it is a backbone itself; leave --backbone out")
        backbone = load(source)
        if backbone.architecture == "vision":
            raise ValueError(f"{source} sees images, of which none are given; give a run, for its training images")
    found = burstiness(backbone.host(), query_key(backbone.model), samples=samples)
    rows = {"inputs": found.inputs, "products": found.products}
    rows |= {f"products, head {number}": pair for number, pair in enumerate(found.heads)}
    show_table(
        [
            {"of": name, "": when, "kurtosis": f"{one.kurtosis:.2f}", "beyond 3": f"{one.beyond:.2%}"}
            for name, pair in rows.items()
            for when, one in (("as they are", pair.before), ("whitened", pair.after))
        ]
    )
    console.print("a Gaussian has kurtosis 3 and 0.27% beyond 3 standard deviations; a Laplacian 6 and 1.44%")
    result: dict[str, Any] = {"backbone": backbone.source, "samples": samples, "burstiness": dataclasses.asdict(found)}
    if out is not None:
        result["pictures"] = [str(file) for file in draw_burstiness(found, backbone.source, out)]
    return result
