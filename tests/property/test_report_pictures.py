"""A report's curves and pictures: a mean is over all seeds or not drawn, and a method looks the same everywhere."""

import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt import TrainingConfig
from softprompt.analysis.report import Report, curves, formats, pictures, report
from softprompt.analysis.report.groups import Group, group
from softprompt.analysis.report.palette import styles
from softprompt.analysis.report.read import read

Write = Callable[..., Path]


def made(tmp_path: Path, **options: Any) -> Report:
    return report([tmp_path / "runs"], out=tmp_path / "out", **options)


def groups(tmp_path: Path) -> list[Group]:
    return group(read([tmp_path])[0])[0]


def test_a_curve_has_only_steps_that_all_seeds_reached(write: Write, tmp_path: Path) -> None:
    write(seed=0, dev_at={2: 0.5, 4: 0.6, 6: 0.9})
    write(seed=1, dev_at={2: 0.7, 4: 0.8})
    [one] = groups(tmp_path)
    curve = curves.development(one)
    assert curve.steps == (2, 4)
    assert curve.means == pytest.approx((0.6, 0.7))
    assert curve.deviations == pytest.approx((statistics.stdev([0.5, 0.7]),) * 2)
    loss = curves.loss(one, 2)
    assert loss.steps == (2, 4, 6)
    assert loss.means == pytest.approx(((1 + 1 / 2) / 2, (1 / 3 + 1 / 4) / 2, (1 / 5 + 1 / 6) / 2))


def test_a_method_looks_the_same_everywhere() -> None:
    assert styles(["dpt"])["dpt"] == styles(["plain", "mine", "dpt", "lora"])["dpt"]
    looks = styles(["mine", "another"])
    assert len(set(looks.values())) == len(looks)
    assert len({look.marker for look in looks.values()}) == len(looks) or len(looks) > 10


def test_pictures_of_a_sweep(write: Write, tmp_path: Path) -> None:
    for lr in (0.01, 0.1):
        write(training=TrainingConfig(steps=6, lr=lr), dev=0.6 + lr, test=0.4)
    found = made(tmp_path)
    names = {path.name for path in found.files}
    assert names >= {f"{stem}.{kind}" for stem in ("learning-1", "sizes", "rates-dev") for kind in ("png", "svg")}
    for path in found.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    svg = (tmp_path / "out" / "rates-dev.svg").read_text()
    assert ">learning rate (log)<" in svg
    assert ">dev accuracy (%)<" in svg
    on_test = pictures.rates(found.grid, "test")
    assert on_test is not None
    assert ">test accuracy (%)<" in on_test.svg


def test_without_curves_and_with_one_rate_there_are_no_such_pictures(write: Write, tmp_path: Path) -> None:
    (write() / "metrics.jsonl").unlink()
    found = made(tmp_path)
    assert len(formats.cells(found.grid)) == 1
    assert {path.stem for path in found.files if path.suffix == ".svg"} == {"sizes"}
