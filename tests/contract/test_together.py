"""Several trainings over one frozen backbone: each ends as it would have by itself, whatever the others are or do."""

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
from softprompt.training.step import Differentiate, TrainingStep

MakeBackbone = Callable[[str], Backbone]


def several(backbone: str, task: Path, **settings: Any) -> list[Experiment]:
    """Methods, sizes, seeds, rates, batches, schedules and lengths of training, all different.

    Rates are low: AdamW's first steps turn a rounding of a small gradient into a whole step.
    """

    def one(prompt: PromptConfig, seed: int = 0, **training: Any) -> Experiment:
        whole = TrainingConfig(eval_steps=2, **training)
        return Experiment(
            backbone=backbone, task=str(task), dtype="float32", prompt=prompt, seed=seed, training=whole, **settings
        )

    return [
        one(DPT(length=6, rank=2), steps=5, batch_size=8, lr=0.003),
        one(Plain(length=3), seed=1, steps=3, batch_size=4, lr=0.001),
        one(DePT(length=4, rank=2, positions=64), steps=4, batch_size=5, gradient_accumulation_steps=2, lr=0.002),
        one(Residual(length=5, width=8), seed=2, steps=4, batch_size=8, lr=0.001),
        one(ADePT(length=4, width=3, dropout=0.5), steps=4, batch_size=6, lr=0.003),
    ]


def trained_together(experiments: Sequence[Experiment], backbone: Backbone, out: Path, count: int) -> list[Run]:
    return sorted(run_concurrently(works(experiments, backbone, out), count), key=lambda run: run.name)


def works(experiments: Sequence[Experiment], backbone: Backbone, out: Path) -> list[Callable[[Differentiate], Run]]:
    def work(at: int, experiment: Experiment, differentiate: Differentiate) -> Run:
        return train(experiment, out=out, name=f"run-{at}", backbone=backbone, differentiate=differentiate)

    return [partial(work, at, experiment) for at, experiment in enumerate(experiments)]


def resuming(folder: Path, backbone: Backbone) -> Callable[[Differentiate], Run]:
    return lambda differentiate: resume(folder, backbone=backbone, differentiate=differentiate)


def refuse_different(run: Run, by_itself: Run) -> None:
    ours, theirs = list(run.metrics()), list(by_itself.metrics())
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    torch.testing.assert_close([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-4, atol=1e-5)
    tensors, others = (load_file(one.folder / "softprompt.safetensors") for one in (run, by_itself))
    torch.testing.assert_close(tensors, others, rtol=1e-3, atol=1e-4)
    assert run.results is not None
    assert by_itself.results is not None
    assert run.results["test"] == by_itself.results["test"]


def table(folder: Path, head: str, lines: Iterable[str], answer: str) -> Path:
    """A task's file, over a CSV of these lines."""
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
def test_each_ends_as_by_itself(
    kind: str,
    settings: dict[str, Any],
    tiny_backbone: MakeBackbone,
    ticket_task: Path,
    tmp_path: Path,
    passes: list[int],
) -> None:
    backbone = tiny_backbone(kind)
    if kind == "bert_mlm":  # its words are of one token each
        lines = (f"{'xy'[n % 2] * (n % 5 + 1)},{'ab'[n % 2]}" for n in range(60))
        ticket_task = table(tmp_path, "text,queue", lines, 'label = "queue"\nlabel_words = { a = "a", b = "b" }')
    experiments = several(kind, ticket_task, **settings)
    found = trained_together(experiments, backbone, tmp_path / "together", 3)
    assert max(passes) == (1 if kind == "bert" else 3), "heads of their own need passes of their own"
    for at, (experiment, run) in enumerate(zip(experiments, found, strict=True)):
        refuse_different(run, train(experiment, out=tmp_path / "alone", name=f"run-{at}", backbone=backbone))


def test_generating_trainings_share_a_pass_too(tiny_backbone: MakeBackbone, tmp_path: Path, passes: list[int]) -> None:
    """Answers of other tokens and lengths in one batch."""
    lines = (f"{'ab'[n % 2]} {n},{'abc' * (n % 3 + 1)}" for n in range(60))
    task = table(tmp_path, "text,said", lines, 'target = "said"')
    experiments = [one for at, one in enumerate(several("llama", task)) if at in (0, 1, 3)]
    found = trained_together(experiments, tiny_backbone("llama"), tmp_path / "together", 3)
    assert 3 in passes
    for at, (experiment, run) in enumerate(zip(experiments, found, strict=True)):
        refuse_different(
            run, train(experiment, out=tmp_path / "alone", name=f"run-{at}", backbone=tiny_backbone("llama"))
        )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each pass had, as they come."""
    found: list[int] = []
    losses = TrainingStep.losses

    def counted(self: TrainingStep, rows: Any, prompts: Any = None, index: Any = None) -> Any:
        found.append(1 if prompts is None else len(prompts))
        return losses(self, rows, prompts, index)

    monkeypatch.setattr(TrainingStep, "losses", counted)
    return found


def test_one_pass_is_for_all_that_draw_nothing(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, passes: list[int]
) -> None:
    experiments = several("llama", ticket_task)
    trained_together(experiments, tiny_backbone("llama"), tmp_path, 5)
    # The first passes show who draws random numbers: the last one does, and has its own ever after.
    assert passes[:5] == [1] * 5
    assert passes[5:7] == [4, 1]
    assert sum(passes) == sum(one.training.steps * one.training.gradient_accumulation_steps for one in experiments)


def test_each_draws_its_own_random_numbers(tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path) -> None:
    backbone, drawing = tiny_backbone("llama"), several("llama", ticket_task)[-1]
    experiments = [drawing, drawing.replace(seed=1)]
    found = trained_together(experiments, backbone, tmp_path / "together", 2)
    for at, (experiment, run) in enumerate(zip(experiments, found, strict=True)):
        refuse_different(run, train(experiment, out=tmp_path / "alone", name=f"run-{at}", backbone=backbone))


def test_no_more_than_asked_are_at_work(tmp_path: Path) -> None:
    begun: list[int] = []

    def work(number: int, differentiate: Differentiate) -> int:
        begun.append(number)
        return number

    ended = [(number, list(begun)) for number in run_concurrently((partial(work, number) for number in range(3)), 2)]
    assert ended == [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])]


def test_who_diverges_falls_alone(tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path) -> None:
    backbone, experiments = tiny_backbone("llama"), several("llama", ticket_task)[:3]
    wild = experiments[0].replace(training=TrainingConfig(steps=5, batch_size=8, lr=1e30, eval_steps=5))
    problems: list[str] = []

    def excused(one: Experiment, name: str, differentiate: Differentiate) -> Run | None:
        try:
            return train(one, out=tmp_path, name=name, backbone=backbone, differentiate=differentiate)
        except ValueError as error:
            problems.append(str(error))
            return None

    names = ["wild", "run-0", "run-1"]
    every = [partial(excused, one, name) for one, name in zip([wild, *experiments[1:]], names, strict=True)]
    found = [run for run in run_concurrently(every, 3) if run is not None]
    assert ["learning rate" in problem for problem in problems] == [True]
    for at, (experiment, run) in enumerate(zip(experiments[1:], sorted(found, key=lambda one: one.name), strict=True)):
        refuse_different(run, train(experiment, out=tmp_path / "alone", name=f"run-{at}", backbone=backbone))


def test_what_fails_only_together_goes_on_in_smaller_passes(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, experiments = tiny_backbone("llama"), several("llama", ticket_task)[:4]
    losses, notes, passes, held = TrainingStep.losses, list[str](), list[int](), list[weakref.ref[torch.Tensor]]()

    def crowded(self: TrainingStep, rows: Any, prompts: Any = None, index: Any = None) -> Any:
        assert all(one() is None for one in held), "a pass that failed still holds its memory"
        passes.append(1 if prompts is None else len(prompts))
        found = losses(self, rows, prompts, index)
        if passes[-1] > 2:
            held.append(weakref.ref(found))
            raise RuntimeError("out of memory")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "losses", crowded)
        found = sorted(
            run_concurrently(works(experiments, backbone, tmp_path), 4, notes.append), key=lambda run: run.name
        )
    assert passes[:11] == [1, 1, 1, 1, 4, 1, 1, 1, 1, 2, 2]
    assert len(notes) == 1
    assert notes[0].endswith("(out of memory); from here on at most 2 share one")
    for at, (experiment, run) in enumerate(zip(experiments, found, strict=True)):
        refuse_different(run, train(experiment, out=tmp_path / "alone", name=f"run-{at}", backbone=backbone))


def test_ctrl_c_stops_all_with_a_checkpoint_each(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, experiments = tiny_backbone("llama"), several("llama", ticket_task)
    handler = signal.getsignal(signal.SIGINT)
    pressed: list[int] = []

    def press(self: object, progress: Progress) -> None:
        if progress.step == 2 and not pressed:
            pressed.append(progress.step)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(NullCallback, "step", press)
        with pytest.raises(Interrupted):
            trained_together(experiments, backbone, tmp_path / "together", 3)
    assert signal.getsignal(signal.SIGINT) is handler
    begun = sorted(folder.name for folder in (tmp_path / "together").iterdir())
    assert begun == ["run-0", "run-1", "run-2"]
    again = [resuming(tmp_path / "together" / name, backbone=backbone) for name in begun]
    for run in run_concurrently(again, 3):
        at = int(run.name[-1])
        refuse_different(run, train(experiments[at], out=tmp_path / "alone", name=run.name, backbone=backbone))


def test_ctrl_c_is_known_to_one_that_begins_another_run_after_it(tmp_path: Path) -> None:
    """As a search's study does, whose trial has just ended for another reason."""
    begun: list[str] = []

    def stopped(differentiate: Differentiate) -> str:
        with interruptible() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked.wait(10)
            raise Interrupted("stopped")

    def study(differentiate: Differentiate) -> str:
        for trial in ("first", "second", "third"):
            begun.append(trial)
            with interruptible() as asked:
                if asked.is_set():
                    raise Interrupted("stopped")
        return "all"

    with pytest.raises(Interrupted):
        list(run_concurrently([stopped, study], 2))
    assert begun in ([], ["first"])


def test_seconds_are_all_that_a_training_took(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does itself, its share of a pass, and nothing of the others' work."""
    backbone, step = tiny_backbone("llama"), torch.optim.AdamW.step

    def slow(self: Any, *given: Any) -> Any:
        time.sleep(0.2)
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    experiments = [one.replace(training=TrainingConfig(steps=5, eval_steps=5)) for one in several("llama", ticket_task)]
    started = time.perf_counter()
    found = trained_together(experiments[:3], backbone, tmp_path, 3)
    whole, seconds = time.perf_counter() - started, [float((run.results or {})["seconds"]) for run in found]
    assert min(seconds) >= 1.0
    assert sum(seconds) <= whole + 0.2  # each is rounded to a tenth


def test_an_error_leaves_the_others_unlocked(tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path) -> None:
    backbone, experiments = tiny_backbone("llama"), several("llama", ticket_task)[:2]

    def failing(differentiate: Differentiate) -> Run:
        raise OSError("the disk is full")

    threads = threading.active_count()
    with pytest.raises(OSError, match="the disk is full"):
        list(run_concurrently([*works(experiments, backbone, tmp_path), failing], 3))
    assert threading.active_count() == threads, "nobody waits for ever in a thread that is left behind"
    for at, experiment in enumerate(experiments):
        run = resume(tmp_path / f"run-{at}", backbone=backbone)
        refuse_different(run, train(experiment, out=tmp_path / "alone", name=f"run-{at}", backbone=backbone))


def test_a_sweep_together_is_the_sweep_by_itself(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    """With one trial that fails, and two searches whose studies go on together."""
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
    one, other = (sweep(file, out=tmp_path / f"{count}", concurrent=count) for count in (1, 3))
    assert [(trial.name, trial.state) for trial in one.trials] == [(trial.name, trial.state) for trial in other.trials]
    assert [found.values for found in one.searches] == [found.values for found in other.searches]
    done = [trial for trial in other.trials if trial.state == "done"]
    assert done
    assert len(done) < len(other.trials)
    for trial in done:
        refuse_different(open_run(trial.folder), open_run(tmp_path / "1" / trial.name))
