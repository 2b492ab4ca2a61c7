"""A report's curves and plots: a mean is over all seeds or not drawn, and a method's style never changes."""

import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt import TrainingConfig
from softprompt.analysis.report import Report, formats, report
from softprompt.analysis.report.groups import Group, group
from softprompt.analysis.report.learning_curves import development_curve, loss_curve
from softprompt.analysis.report.plot_style import styles
from softprompt.analysis.report.plots import plot_rates
from softprompt.analysis.report.read import read

Write = Callable[..., Path]


def make_report(tmp_path: Path, **options: Any) -> Report:
    return report([tmp_path / "runs"], out=tmp_path / "out", **options)


def groups(tmp_path: Path) -> list[Group]:
    return group(read([tmp_path])[0])[0]


def test_curve_has_only_steps_of_all_seeds(write: Write, tmp_path: Path) -> None:
    write(seed=0, dev_at={2: 0.5, 4: 0.6, 6: 0.9})
    write(seed=1, dev_at={2: 0.7, 4: 0.8})
    [merged] = groups(tmp_path)
    curve = development_curve(merged)
    assert curve.steps == (2, 4)
    assert curve.means == pytest.approx((0.6, 0.7))
    assert curve.deviations == pytest.approx((statistics.stdev([0.5, 0.7]),) * 2)
    loss = loss_curve(merged, 2)
    assert loss.steps == (2, 4, 6)
    assert loss.means == pytest.approx(((1 + 1 / 2) / 2, (1 / 3 + 1 / 4) / 2, (1 / 5 + 1 / 6) / 2))


def test_style_of_a_method_is_always_the_same() -> None:
    assert styles(["dpt"])["dpt"] == styles(["plain", "mine", "dpt", "lora"])["dpt"]
    by_method = styles(["mine", "another"])
    assert len(set(by_method.values())) == len(by_method)
    assert len({style.marker for style in by_method.values()}) == len(by_method) or len(by_method) > 10


def test_plots_of_a_sweep(write: Write, tmp_path: Path) -> None:
    for lr in (0.01, 0.1):
        write(training=TrainingConfig(steps=6, lr=lr), dev=0.6 + lr, test=0.4)
    result = make_report(tmp_path)
    names = {path.name for path in result.files}
    assert names >= {f"{stem}.{kind}" for stem in ("learning-1", "sizes", "rates-dev") for kind in ("png", "svg")}
    for path in result.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    svg = (tmp_path / "out" / "rates-dev.svg").read_text()
    assert ">learning rate (log)<" in svg
    assert ">dev accuracy (%)<" in svg
    on_test = plot_rates(result.grid, "test")
    assert on_test is not None
    assert ">test accuracy (%)<" in on_test.svg


def test_loss_of_distilled_runs_is_named(write: Write, tmp_path: Path) -> None:
    model = {"kl": 0.1, "agreement": 0.8, "score": 0.85}
    write(distillation={"context_tokens": 600, "prompt_tokens": 20, "prompt": model})
    make_report(tmp_path)
    assert ">divergence from the teacher (nats)<" in (tmp_path / "out" / "learning-1.svg").read_text()
    write(training=TrainingConfig(steps=6, lr=0.1))
    make_report(tmp_path)
    assert ">cross-entropy or divergence from the teacher (nats)<" in (tmp_path / "out" / "learning-1.svg").read_text()


def test_no_plot_without_curves_or_with_one_rate(write: Write, tmp_path: Path) -> None:
    (write() / "metrics.jsonl").unlink()
    result = make_report(tmp_path)
    assert len(formats.cells(result.grid)) == 1
    assert {path.stem for path in result.files if path.suffix == ".svg"} == {"sizes"}
