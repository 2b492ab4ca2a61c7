"""Concurrent runs over one frozen backbone: each gives the result of a single run, whatever the others do."""

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompt import (
    DPT,
    ADePT,
    Backbone,
    DePT,
    Experiment,
    Plain,
    Progress,
    Residual,
    Run,
    TrainingConfig,
    open_run,
    resume,
    train,
)
from softprompt.prompts import PromptConfig
from softprompt.sweep import sweep
from softprompt.training.callbacks import Interrupted, NullCallback, interruptible
from softprompt.training.concurrent import run_concurrently
from softprompt.training.objective import Objective
from softprompt.training.step import Differentiate

MakeBackbone = Callable[[str], Backbone]


def experiments_for(backbone: str, task: Path, **settings: Any) -> list[Experiment]:
    """Experiments that differ in method, size, seed, learning rate, batch size and number of steps.

    Learning rates are low, since AdamW's first steps amplify rounding of small gradients.
    """

    def variant(prompt: PromptConfig, seed: int = 0, **training: Any) -> Experiment:
        config = TrainingConfig(eval_steps=2, **training)
        return Experiment(
            backbone=backbone, task=str(task), dtype="float32", prompt=prompt, seed=seed, training=config, **settings
        )

    return [
        variant(DPT(length=6, rank=2), steps=5, batch_size=8, lr=0.003),
        variant(Plain(length=3), seed=1, steps=3, batch_size=4, lr=0.001),
        variant(DePT(length=4, rank=2, positions=64), steps=4, batch_size=5, gradient_accumulation_steps=2, lr=0.002),
        variant(Residual(length=5, width=8), seed=2, steps=4, batch_size=8, lr=0.001),
        variant(ADePT(length=4, width=3, dropout=0.5), steps=4, batch_size=6, lr=0.003),
    ]


def train_concurrently(experiments: Sequence[Experiment], backbone: Backbone, out: Path, count: int) -> list[Run]:
    return sorted(run_concurrently(jobs(experiments, backbone, out), count), key=lambda run: run.name)


def jobs(experiments: Sequence[Experiment], backbone: Backbone, out: Path) -> list[Callable[[Differentiate], Run]]:
    def job(run_index: int, experiment: Experiment, differentiate: Differentiate) -> Run:
        return train(experiment, out=out, name=f"run-{run_index}", backbone=backbone, differentiate=differentiate)

    return [partial(job, run_index, experiment) for run_index, experiment in enumerate(experiments)]


def resume_job(folder: Path, backbone: Backbone) -> Callable[[Differentiate], Run]:
    return lambda differentiate: resume(folder, backbone=backbone, differentiate=differentiate)


def assert_runs_close(run: Run, single: Run) -> None:
    metrics_lines, expected_lines = list(run.metrics()), list(single.metrics())
    assert [line["step"] for line in metrics_lines] == [line["step"] for line in expected_lines]
    torch.testing.assert_close(
        [line["loss"] for line in metrics_lines], [line["loss"] for line in expected_lines], rtol=1e-4, atol=1e-5
    )
    tensors, expected_tensors = (load_file(folder / "softprompt.safetensors") for folder in (run.folder, single.folder))
    torch.testing.assert_close(tensors, expected_tensors, rtol=1e-3, atol=1e-4)
    assert run.results is not None
    assert single.results is not None
    assert run.results["test"] == single.results["test"]


def table(folder: Path, head: str, lines: Iterable[str], answer: str) -> Path:
    """Write a task's file over a CSV of these lines."""
    (folder / "rows.csv").write_text("\n".join([head, *lines]) + "\n")
    file = folder / "task.toml"
    file.write_text(f'train = "rows.csv"\ntemplate = "{{text}}:"\n{answer}\n')
    return file


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("bloom", {"prompt_position": "suffix"}),
        ("t5", {}),
        ("t5", {"prompt_attention": "self"}),
        ("bert_mlm", {}),
        ("bert", {}),
    ],
    ids=str,
)
def test_concurrent_runs_equal_single_runs(
    kind: str,
    settings: dict[str, Any],
    tiny_backbone: MakeBackbone,
    ticket_task: Path,
    tmp_path: Path,
    prompts_per_pass: list[int],
) -> None:
    backbone = tiny_backbone(kind)
    if kind == "bert_mlm":  # its label words have one token each
        lines = (f"{'xy'[n % 2] * (n % 5 + 1)},{'ab'[n % 2]}" for n in range(60))
        ticket_task = table(tmp_path, "text,queue", lines, 'label = "queue"\nlabel_words = { a = "a", b = "b" }')
    experiments = experiments_for(kind, ticket_task, **settings)
    runs = train_concurrently(experiments, backbone, tmp_path / "together", 3)
    assert max(prompts_per_pass) == (1 if kind == "bert" else 3), "runs with a head need their own passes"
    for run_index, (experiment, run) in enumerate(zip(experiments, runs, strict=True)):
        assert_runs_close(run, train(experiment, out=tmp_path / "alone", name=f"run-{run_index}", backbone=backbone))


def test_generation_runs_share_a_pass(tiny_backbone: MakeBackbone, tmp_path: Path, prompts_per_pass: list[int]) -> None:
    """Answers with different tokens and lengths in one batch."""
    lines = (f"{'ab'[n % 2]} {n},{'abc' * (n % 3 + 1)}" for n in range(60))
    task = table(tmp_path, "text,said", lines, 'target = "said"')
    experiments = [experiment for index, experiment in enumerate(experiments_for("llama", task)) if index in (0, 1, 3)]
    runs = train_concurrently(experiments, tiny_backbone("llama"), tmp_path / "together", 3)
    assert 3 in prompts_per_pass
    for run_index, (experiment, run) in enumerate(zip(experiments, runs, strict=True)):
        assert_runs_close(
            run, train(experiment, out=tmp_path / "alone", name=f"run-{run_index}", backbone=tiny_backbone("llama"))
        )


@pytest.fixture
def prompts_per_pass(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each pass, in order."""
    runs: list[int] = []
    losses = Objective.losses

    def count_prompts(self: Objective, rows: Any, prompts: Any = None, index: Any = None) -> Any:
        runs.append(1 if prompts is None else len(prompts))
        return losses(self, rows, prompts, index)

    monkeypatch.setattr(Objective, "losses", count_prompts)
    return runs


def test_runs_without_random_draws_share_one_pass(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, prompts_per_pass: list[int]
) -> None:
    experiments = experiments_for("llama", ticket_task)
    train_concurrently(experiments, tiny_backbone("llama"), tmp_path, 5)
    # The first passes show which runs draw random numbers: the last one does, and keeps its own passes.
    assert prompts_per_pass[:5] == [1] * 5
    assert prompts_per_pass[5:7] == [4, 1]
    assert sum(prompts_per_pass) == sum(
        experiment.training.steps * experiment.training.gradient_accumulation_steps for experiment in experiments
    )


def test_each_run_has_its_own_random_state(tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path) -> None:
    backbone, drawing = tiny_backbone("llama"), experiments_for("llama", ticket_task)[-1]
    experiments = [drawing, drawing.replace(seed=1)]
    runs = train_concurrently(experiments, backbone, tmp_path / "together", 2)
    for run_index, (experiment, run) in enumerate(zip(experiments, runs, strict=True)):
        assert_runs_close(run, train(experiment, out=tmp_path / "alone", name=f"run-{run_index}", backbone=backbone))


def test_at_most_count_runs_are_active(tmp_path: Path) -> None:
    order: list[int] = []

    def job(number: int, differentiate: Differentiate) -> int:
        order.append(number)
        return number

    ended = [(number, list(order)) for number in run_concurrently((partial(job, number) for number in range(3)), 2)]
    assert ended == [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])]


def test_diverging_run_fails_alone(tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path) -> None:
    backbone, experiments = tiny_backbone("llama"), experiments_for("llama", ticket_task)[:3]
    diverging = experiments[0].replace(training=TrainingConfig(steps=5, batch_size=8, lr=1e30, eval_steps=5))
    problems: list[str] = []

    def train_or_none(experiment: Experiment, name: str, differentiate: Differentiate) -> Run | None:
        try:
            return train(experiment, out=tmp_path, name=name, backbone=backbone, differentiate=differentiate)
        except ValueError as error:
            problems.append(str(error))
            return None

    names = ["wild", "run-0", "run-1"]
    every = [
        partial(train_or_none, experiment, name)
        for experiment, name in zip([diverging, *experiments[1:]], names, strict=True)
    ]
    runs = [run for run in run_concurrently(every, 3) if run is not None]
    assert ["learning rate" in problem for problem in problems] == [True]
    for run_index, (experiment, run) in enumerate(
        zip(experiments[1:], sorted(runs, key=lambda run: run.name), strict=True)
    ):
        assert_runs_close(run, train(experiment, out=tmp_path / "alone", name=f"run-{run_index}", backbone=backbone))


def test_failing_shared_pass_is_split(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, experiments = tiny_backbone("llama"), experiments_for("llama", ticket_task)[:4]
    losses, notes, prompts_per_pass, failed_tensors = (
        Objective.losses,
        list[str](),
        list[int](),
        list[weakref.ref[torch.Tensor]](),
    )

    def fail_large_passes(self: Objective, rows: Any, prompts: Any = None, index: Any = None) -> Any:
        assert all(reference() is None for reference in failed_tensors), "a failed pass still holds its memory"
        prompts_per_pass.append(1 if prompts is None else len(prompts))
        row_losses = losses(self, rows, prompts, index)
        if prompts_per_pass[-1] > 2:
            failed_tensors.append(weakref.ref(row_losses))
            raise RuntimeError("out of memory")
        return row_losses

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "losses", fail_large_passes)
        runs = sorted(
            run_concurrently(jobs(experiments, backbone, tmp_path), 4, notes.append), key=lambda run: run.name
        )
    assert prompts_per_pass[:11] == [1, 1, 1, 1, 4, 1, 1, 1, 1, 2, 2]
    assert len(notes) == 1
    assert notes[0].endswith("(out of memory); from here on at most 2 share one")
    for run_index, (experiment, run) in enumerate(zip(experiments, runs, strict=True)):
        assert_runs_close(run, train(experiment, out=tmp_path / "alone", name=f"run-{run_index}", backbone=backbone))


def test_ctrl_c_saves_a_checkpoint_of_each_run(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, experiments = tiny_backbone("llama"), experiments_for("llama", ticket_task)
    handler = signal.getsignal(signal.SIGINT)
    pressed: list[int] = []

    def interrupt(self: object, progress: Progress) -> None:
        if progress.step == 2 and not pressed:
            pressed.append(progress.step)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(NullCallback, "on_step", interrupt)
        with pytest.raises(Interrupted):
            train_concurrently(experiments, backbone, tmp_path / "together", 3)
    assert signal.getsignal(signal.SIGINT) is handler
    order = sorted(folder.name for folder in (tmp_path / "together").iterdir())
    assert order == ["run-0", "run-1", "run-2"]
    resumed_jobs = [resume_job(tmp_path / "together" / name, backbone=backbone) for name in order]
    for run in run_concurrently(resumed_jobs, 3):
        run_index = int(run.name[-1])
        assert_runs_close(run, train(experiments[run_index], out=tmp_path / "alone", name=run.name, backbone=backbone))


def test_ctrl_c_reaches_a_run_that_starts_after_it(tmp_path: Path) -> None:
    """As in a search's study whose trial has just ended for another reason."""
    order: list[str] = []

    def stopped(differentiate: Differentiate) -> str:
        with interruptible() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked.wait(10)
            raise Interrupted("stopped")

    def study(differentiate: Differentiate) -> str:
        for trial in ("first", "second", "third"):
            order.append(trial)
            with interruptible() as asked:
                if asked.is_set():
                    raise Interrupted("stopped")
        return "all"

    with pytest.raises(Interrupted):
        list(run_concurrently([stopped, study], 2))
    assert order in ([], ["first"])


def test_seconds_exclude_the_other_runs_work(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's seconds are its own work and its share of each pass."""
    backbone, step = tiny_backbone("llama"), torch.optim.AdamW.step

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(0.2)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    experiments = [
        experiment.replace(training=TrainingConfig(steps=5, eval_steps=5))
        for experiment in experiments_for("llama", ticket_task)
    ]
    started = time.perf_counter()
    runs = train_concurrently(experiments[:3], backbone, tmp_path, 3)
    elapsed, seconds = time.perf_counter() - started, [float((run.results or {})["seconds"]) for run in runs]
    assert min(seconds) >= 1.0
    assert sum(seconds) <= elapsed + 0.2  # rounding


def test_error_releases_the_other_runs_locks(tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path) -> None:
    backbone, experiments = tiny_backbone("llama"), experiments_for("llama", ticket_task)[:2]

    def failing(differentiate: Differentiate) -> Run:
        raise OSError("the disk is full")

    threads = threading.active_count()
    with pytest.raises(OSError, match="the disk is full"):
        list(run_concurrently([*jobs(experiments, backbone, tmp_path), failing], 3))
    assert threading.active_count() == threads, "a thread was left waiting"
    for run_index, experiment in enumerate(experiments):
        run = resume(tmp_path / f"run-{run_index}", backbone=backbone)
        assert_runs_close(run, train(experiment, out=tmp_path / "alone", name=f"run-{run_index}", backbone=backbone))


def test_concurrent_equals_sequential_sweep(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    """With one trial that fails, and two studies of a search that run concurrently."""
    file = tmp_path / "sweep.toml"
    file.write_text(
        f"""
        backbone = "{llama_folder}"
        task = "{ticket_task}"
        dtype = "float32"
        seed = [0, 1]
        training = {{ steps = 4, batch_size = 8, eval_steps = 2 }}
        prompt.length = 4
        [[method]]
        name = "dpt"
        [[method]]
        name = "plain"
        training.shots = 1000
        [search]
        trials = 2
        [search.space]
        "prompt.rank" = [1, 2]
        """
    )
    sequential, concurrent = (sweep(file, out=tmp_path / f"{count}", concurrent=count) for count in (1, 3))
    assert [(trial.name, trial.state) for trial in sequential.trials] == [
        (trial.name, trial.state) for trial in concurrent.trials
    ]
    assert [search.values for search in sequential.searches] == [search.values for search in concurrent.searches]
    done = [trial for trial in concurrent.trials if trial.state == "done"]
    assert done
    assert len(done) < len(concurrent.trials)
    for trial in done:
        assert_runs_close(open_run(trial.folder), open_run(tmp_path / "1" / trial.name))
