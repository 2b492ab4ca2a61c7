"""`softprompt sweep`: a dry run, a run, failures, missing extras, and a Ray cluster."""

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
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        assert len(lines) <= 1, "stdout has more than the result"
        return code, json.loads(lines[0]) if lines else {}, " ".join(printed.err.split())

    return call


@pytest.fixture(scope="module")
def file(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials that succeed and two that request more shots than there are rows."""
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
    """The folder of the finished sweep."""
    out = file.parent / "out"
    assert main(["sweep", str(file), "--out", str(out)]) == 1
    return out


def test_dry_run_trains_nothing(file: Path, tmp_path: Path, sweep: Sweep) -> None:
    code, result, printed = sweep(file, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert [trial["state"] for trial in result["trials"]] == ["new"] * 4
    assert printed.endswith("4 trials")
    assert result["trials"][0]["trial"] in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_finished_trials(file: Path, done: Path, sweep: Sweep) -> None:
    _, result, _ = sweep(file, "--out", done, "--dry-run")
    assert [trial["state"] for trial in result["trials"]] == ["finished", "finished", "new", "new"]


def test_failed_trials_are_listed_and_others_skipped(file: Path, done: Path, sweep: Sweep) -> None:
    code, result, printed = sweep(file, "--out", done)
    assert code == 1
    assert result["done"] == []
    assert len(result["skipped"]) == 2
    assert [failed_trial["trial"].rsplit("-", 1)[0] for failed_trial in result["failed"]] == [
        "tickets-plain-0",
        "tickets-plain-1",
    ]
    for failed_trial in result["failed"]:
        assert failed_trial["problem"].startswith("1000 shots of task 'tickets' need more rows")
        assert f"failed: {failed_trial['trial']}: {failed_trial['problem']}" in printed
    for name in result["skipped"]:
        run = open_run(done / name)
        assert run.results is not None
        assert name.endswith(run.experiment.hash[:8])


@pytest.mark.parametrize(("name", "old", "new"), [("train.csv", "a a", "a b a"), ("tickets.toml", "Ticket", "Message")])
def test_changed_rows_or_task_fail_the_trial(
    name: str, old: str, new: str, file: Path, ticket_task: Path, tmp_path: Path, sweep: Sweep
) -> None:
    """The settings' hash covers only their paths."""
    shutil.copytree(ticket_task.parent, tmp_path / "task")
    own_file = tmp_path / "sweep.toml"
    own_file.write_text(file.read_text().rpartition("[[method]]")[0].replace(str(ticket_task), "task/tickets.toml"))
    code, result, _ = sweep(own_file, "--out", tmp_path / "out")
    assert (code, len(result["done"])) == (0, 2)
    before = (tmp_path / "task" / name).read_text()
    (tmp_path / "task" / name).write_text(before.replace(old, new))
    code, changed, _ = sweep(own_file, "--out", tmp_path / "out")
    assert (code, changed["done"], changed["skipped"]) == (1, [], [])
    for failed_trial in changed["failed"]:
        assert failed_trial["problem"] == (
            f"the task or the rows of {tmp_path / 'out' / failed_trial['trial']} changed after it was started; "
            "move it away, or choose another --out"
        )
    (tmp_path / "task" / name).write_text(before)
    assert sweep(own_file, "--out", tmp_path / "out")[1]["skipped"] == result["done"]


def test_invalid_sweep_file_is_refused(tmp_path: Path, sweep: Sweep) -> None:
    (tmp_path / "sweep.toml").write_text("[training]\nstep = 3")
    code, result, printed = sweep(tmp_path / "sweep.toml", "--out", tmp_path / "out")
    assert (code, result) == (1, {})
    file_path = tmp_path / "sweep.toml"
    assert printed == f"softprompt: {file_path}: [training] has the unknown setting 'step'; did you mean 'steps'?"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("extra", "name"), [(["--executor", "ray"], "ray"), ([], "optuna")])
def test_missing_extra_names_its_install_command(
    extra: list[str], name: str, file: Path, tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package, *rest: None if package == name else find(package, *rest)
    )
    search = tmp_path / "search.toml"
    search.write_text(file.read_text() + '[search]\nspace."training.lr" = [0.1, 0.2]\n')
    code, result, printed = sweep(file if extra else search, "--out", tmp_path / "out", *extra)
    assert (code, result) == (1, {})
    assert "install it in softprompt's clone with: pip install '.[sweep]'" in printed
    assert not (tmp_path / "out").exists()


def test_sweep_in_several_processes_is_refused(
    file: Path, tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, printed = sweep(file, "--out", tmp_path / "out")
    assert code == 1
    assert "the sweep was started as 2 processes; start one" in printed


def test_baselines_are_trained_one_by_one(file: Path, tmp_path: Path, sweep: Sweep) -> None:
    """Each has its own copy of the backbone; concurrent prompts report no stages."""
    own_file = tmp_path / "sweep.toml"
    own_file.write_text(
        file.read_text().replace('name = "plain"', 'baseline = "full"').replace("training.shots = 1000", "")
    )
    code, result, printed = sweep(own_file, "--out", tmp_path / "out", "--concurrent", 4)
    assert (code, len(result["done"])) == (0, 4)
    assert printed.count("testing ...") == 2
    assert printed.index("note: trial 2 of 4") < printed.index("testing ...") < printed.index("note: trial 3 of 4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrent", "0"], "concurrent is 0; it must be at least 1"),
        (["--concurrent", "2", "--executor", "ray"], "concurrent is 2, but Ray runs each trial in its own process"),
        (["--ray-address", "10.0.0.1:6379"], "ray_address is '10.0.0.1:6379', cpus 1 and gpus 0, which only a Ray"),
        (["--gpus", "4"], "gpus 4, which only a Ray cluster reads; give --executor ray too, or leave them out"),
        (["--cpus", "2"], "cpus 2 and gpus 0, which only a Ray cluster reads"),
    ],
)
def test_conflicting_flags_are_refused(
    flags: list[str], message: str, file: Path, tmp_path: Path, sweep: Sweep
) -> None:
    code, _, printed = sweep(file, "--out", tmp_path / "out", *flags)
    assert code == 1
    assert message in printed
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local Ray cluster with room for two trials."""
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
        ray_results, local_results = open_run(tmp_path / "out" / name).results, open_run(done / name).results
        assert ray_results is not None
        assert local_results is not None
        assert {**ray_results, "seconds": 0} == {**local_results, "seconds": 0}
