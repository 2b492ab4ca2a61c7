"""`softprompt sweep`: a dry run, a run, what fails, what is missing, and the same on a Ray cluster."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt import open_run
from softprompt.cli import main

Sweep = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def sweep(capsys: pytest.CaptureFixture[str]) -> Sweep:
    """Exit code, the JSON of the last line, and stderr."""

    def call(*arguments: object) -> tuple[int, dict[str, Any], str]:
        code = main(["sweep", *map(str, arguments)])
        shown = capsys.readouterr()
        lines = shown.out.splitlines()
        assert len(lines) <= 1, "stdout has more than the result"
        return code, json.loads(lines[0]) if lines else {}, " ".join(shown.err.split())

    return call


@pytest.fixture(scope="module")
def file(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials that work and two that ask for more shots than there are rows."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.toml"
    path.write_text(
        f"""
        backbone = "{llama_folder}"
        task = "{ticket_task}"
        dtype = "float32"
        seed = [0, 1]
        training = {{ steps = 2, batch_size = 8, eval_steps = 2 }}
        prompt.length = 4
        [[method]]
        name = "dpt"
        rank = 2
        [[method]]
        name = "plain"
        training.shots = 1000
        """
    )
    return path


@pytest.fixture(scope="module")
def done(file: Path) -> Path:
    """The folder of the sweep, run."""
    out = file.parent / "out"
    assert main(["sweep", str(file), "--out", str(out)]) == 1
    return out


def test_a_dry_run_trains_nothing(file: Path, tmp_path: Path, sweep: Sweep) -> None:
    code, result, shown = sweep(file, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert [trial["state"] for trial in result["trials"]] == ["new"] * 4
    assert shown.endswith("4 trials")
    assert result["trials"][0]["trial"] in shown
    assert not (tmp_path / "out").exists()


def test_a_dry_run_sees_what_is_there(file: Path, done: Path, sweep: Sweep) -> None:
    _, result, _ = sweep(file, "--out", done, "--dry-run")
    assert [trial["state"] for trial in result["trials"]] == ["finished", "finished", "new", "new"]


def test_what_failed_is_listed_and_the_rest_is_kept(file: Path, done: Path, sweep: Sweep) -> None:
    code, result, shown = sweep(file, "--out", done)
    assert code == 1
    assert result["done"] == []
    assert len(result["skipped"]) == 2
    assert [one["trial"].rsplit("-", 1)[0] for one in result["failed"]] == ["tickets-plain-0", "tickets-plain-1"]
    for one in result["failed"]:
        assert one["problem"].startswith("1000 shots of task 'tickets' need more rows")
        assert f"failed: {one['trial']}: {one['problem']}" in shown
    for name in result["skipped"]:
        run = open_run(done / name)
        assert run.results is not None
        assert name.endswith(run.experiment.hash[:8])


@pytest.mark.parametrize(("name", "old", "new"), [("train.csv", "a a", "a b a"), ("tickets.toml", "Ticket", "Message")])
def test_a_run_of_other_rows_or_another_task_is_not_taken_for_this_one(
    name: str, old: str, new: str, file: Path, ticket_task: Path, tmp_path: Path, sweep: Sweep
) -> None:
    """Both lie at the path that the settings' hash knows."""
    shutil.copytree(ticket_task.parent, tmp_path / "task")
    own = tmp_path / "sweep.toml"
    own.write_text(file.read_text().rpartition("[[method]]")[0].replace(str(ticket_task), "task/tickets.toml"))
    code, result, _ = sweep(own, "--out", tmp_path / "out")
    assert (code, len(result["done"])) == (0, 2)
    before = (tmp_path / "task" / name).read_text()
    (tmp_path / "task" / name).write_text(before.replace(old, new))
    code, changed, _ = sweep(own, "--out", tmp_path / "out")
    assert (code, changed["done"], changed["skipped"]) == (1, [], [])
    for one in changed["failed"]:
        assert one["problem"] == (
            f"{tmp_path / 'out' / one['trial']} was trained on another task or on other rows than there are now; move "
            "it away, or choose another --out"
        )
    (tmp_path / "task" / name).write_text(before)
    assert sweep(own, "--out", tmp_path / "out")[1]["skipped"] == result["done"]


def test_a_file_that_cannot_be(tmp_path: Path, sweep: Sweep) -> None:
    (tmp_path / "sweep.toml").write_text("[training]\nstep = 3")
    code, result, shown = sweep(tmp_path / "sweep.toml", "--out", tmp_path / "out")
    assert (code, result) == (1, {})
    where = tmp_path / "sweep.toml"
    assert shown == f"softprompt: {where}: [training] has the unknown setting 'step'; did you mean 'steps'?"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("extra", "name"), [(["--executor", "ray"], "ray"), ([], "optuna")])
def test_a_missing_extra(
    extra: list[str], name: str, file: Path, tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda sought, *rest: None if sought == name else find(sought, *rest)
    )
    search = tmp_path / "search.toml"
    search.write_text(file.read_text() + '[search]\nspace."training.lr" = [0.1, 0.2]\n')
    code, result, shown = sweep(file if extra else search, "--out", tmp_path / "out", *extra)
    assert (code, result) == (1, {})
    assert "install it with: pip install 'softprompt[sweep]'" in shown
    assert not (tmp_path / "out").exists()


def test_several_processes(file: Path, tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, shown = sweep(file, "--out", tmp_path / "out")
    assert code == 1
    assert "the sweep was started as 2 processes; start it alone" in shown


def test_baselines_are_trained_one_by_one(file: Path, tmp_path: Path, sweep: Sweep) -> None:
    """Each has a copy of the whole backbone; of prompts that share passes no stage is told."""
    own = tmp_path / "sweep.toml"
    own.write_text(file.read_text().replace('name = "plain"', 'baseline = "full"').replace("training.shots = 1000", ""))
    code, result, shown = sweep(own, "--out", tmp_path / "out", "--concurrent", 4)
    assert (code, len(result["done"])) == (0, 4)
    assert shown.count("testing ...") == 2
    assert shown.index("note: trial 2 of 4") < shown.index("testing ...") < shown.index("note: trial 3 of 4")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--concurrent", "0"], "concurrent is 0; it must be at least 1"),
        (["--concurrent", "2", "--executor", "ray"], "concurrent is for trainings in this process"),
    ],
)
def test_what_cannot_go_together(flags: list[str], sentence: str, file: Path, tmp_path: Path, sweep: Sweep) -> None:
    code, _, shown = sweep(file, "--out", tmp_path / "out", *flags)
    assert code == 1
    assert sentence in shown
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of this machine with room for two trials at once."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("two_workers")
def test_ray_gives_the_same_results(file: Path, done: Path, tmp_path: Path, sweep: Sweep) -> None:
    code, result, _ = sweep(file, "--out", tmp_path / "out", "--executor", "ray")
    _, local, _ = sweep(file, "--out", done)
    assert code == 1
    assert (result["done"], result["failed"]) == (local["skipped"], local["failed"])
    for name in result["done"]:
        for part in ("metrics.jsonl", "softprompt.safetensors", "adapter_model.safetensors", "predictions.jsonl"):
            assert (tmp_path / "out" / name / part).read_bytes() == (done / name / part).read_bytes(), part
        found, expected = open_run(tmp_path / "out" / name).results, open_run(done / name).results
        assert found is not None
        assert expected is not None
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}
