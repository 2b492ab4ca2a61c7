"""Distilling a context is an ordinary run whose loss is the teacher's distribution."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import (
    BPT,
    DPT,
    Backbone,
    Experiment,
    Interrupted,
    Plain,
    Progress,
    Run,
    TrainingConfig,
    load_backbone,
    resume,
    train,
)
from softprompt.analysis.rank import gradient_spectra, load_prompts
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.evaluation.evaluate import read_splits, run_splits
from softprompt.runs import build_prompt, text_hash
from softprompt.sweep.trial import BackboneCache, run_trial
from softprompt.tasks.user import load_task
from softprompt.training.callbacks import NullCallback
from softprompt.training.context import make_teacher, teacher_of
from softprompt.training.distil import _task, _write_task, distil
from softprompt.training.gradients import gradient_on
from softprompt.training.step import differentiate


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=Plain(length=6),
        training=TrainingConfig(steps=30, batch_size=8, eval_steps=15, lr=0.3),
        dtype="float32",
        demonstrations=4,
    )


@pytest.fixture(scope="module")
def backbone(llama_folder: Path) -> Backbone:
    return load_backbone(str(llama_folder), dtype="float32")


def test_divergence_from_the_teacher_falls(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    run = train(experiment, out=tmp_path, backbone=backbone)
    assert run.results is not None
    close = run.results["distillation"]
    assert close["teacher"] == {"kl": 0.0, "agreement": 1.0, "score": close["teacher"]["score"]}
    assert close["prompt"]["kl"] < 0.5 * close["no_context"]["kl"]
    assert close["prompt_tokens"] == 6 < close["context_tokens"]
    assert {"context_start", "context_end"} <= set(close)
    assert run.context.count("Ticket:") == 4
    assert run.record["context_file"] is None


def test_teachers_rows_are_not_trained_on(experiment: Experiment) -> None:
    task = load_task(experiment.task)
    with_them, without = (read_splits(experiment.replace(demonstrations=count), task) for count in (0, 4))
    assert len(with_them.train) - len(without.train) == 4
    assert with_them.test[:] == without.test[:]


def test_interrupted_distillation_resumes_to_the_same_tensors(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    class StopAtSecond(NullCallback):
        def on_step(self, progress: Progress) -> None:
            if progress.step == 20:
                raise KeyboardInterrupt

    reference = train(experiment, out=tmp_path, name="reference", backbone=backbone)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(experiment, out=tmp_path, name="stopped", backbone=backbone, callback=StopAtSecond())
    run = resume(tmp_path / "stopped", backbone=backbone)
    for file in ("softprompt.safetensors", "predictions.jsonl"):
        assert (run.folder / file).read_bytes() == (reference.folder / file).read_bytes()


def test_changed_context_is_not_resumed(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    run = train(experiment.replace(training=TrainingConfig(steps=1)), out=tmp_path, backbone=backbone)
    (run.folder / "context.txt").write_text("another one")
    with pytest.raises(ValueError, match="is not the text that the run was started with"):
        _ = run.context


def test_context_of_a_file_comes_before_demonstrations(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "context.md").write_text("a b c\n")
    short = experiment.replace(context=str(tmp_path / "context.md"), prompt=DPT(length=6, rank=2))
    run = train(short.replace(training=TrainingConfig(steps=1)), out=tmp_path, backbone=backbone)
    assert run.context.startswith("a b c\n\nTicket:")
    assert run.record["context_file"] == text_hash("a b c") != run.record["context"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no text"),
        ("  \n", "has no text"),
        ("word " * 400, "leaves a row none of the 256 positions"),
    ],
)
def test_unusable_context_is_refused_before_a_folder(
    text: str, message: str, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "context.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        train(experiment.replace(context=str(tmp_path / "context.md")), out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()


def test_missing_context_is_refused(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; give the path of a text"):
        train(experiment.replace(context=str(tmp_path / "none.md")), out=tmp_path / "runs", backbone=backbone)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_model_without_words_is_no_teacher(name: str, tiny_backbone: Callable[[str], Backbone]) -> None:
    with pytest.raises(ValueError, match="does not answer in words"):
        make_teacher("a b c", tiny_backbone(name), load_task("sentiment"), 16)


def test_queries_are_answered_once_and_trained_on(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "context.md").write_text("a b c")
    (tmp_path / "requests.csv").write_text("text\n" + "".join(f"{'a ' * n}b\n" for n in range(1, 25)))
    settings = TrainingConfig(steps=2, batch_size=4, eval_steps=2, max_new_tokens=4)
    asked = experiment.replace(context=str(tmp_path / "context.md"), demonstrations=0, training=settings)
    runs = [
        distil(asked.replace(seed=seed), tmp_path / "requests.csv", "Ticket: {text}", out=tmp_path, backbone=backbone)
        for seed in (0, 1)
    ]
    assert len(list(tmp_path.glob("teacher-*"))) == 1
    for run in runs:
        assert run.results is not None
        close = run.results["distillation"]
        assert close["teacher"]["score"] == close["teacher"]["agreement"] == 1.0  # float32: it repeats its own answers
    with pytest.raises(ValueError, match="distil takes its context from a file"):
        distil(experiment, tmp_path / "requests.csv", "Ticket: {text}", out=tmp_path, backbone=backbone)


@pytest.mark.parametrize("target", ["target", "label"])
def test_row_that_fits_only_without_the_longest_answer_is_refused(
    target: str, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    """At the end the teacher writes up to `max_new_tokens`, and scores the longest label word, after every row."""
    answers = ["no", "quite certainly yes indeed"] if target == "label" else ["a", "b"]
    lines = [f"{'x y z ' * (1 + 7 * (n == 0))}{n},{answers[n % 2]}\n" for n in range(40)]
    (tmp_path / "rows.csv").write_text("q,answer\n" + "".join(lines))
    text = f'train = "rows.csv"\ntemplate = "Q: {{q}} A:"\n{target} = "answer"\n'
    (tmp_path / "task.toml").write_text(text + ('metrics = ["exact_match"]\n' if target == "target" else ""))
    longest = len(backbone.tokenizer(" quite certainly yes indeed").input_ids) - 1 if target == "label" else 16
    context = tmp_path / "context.md"

    def distilled(tokens: int, name: str) -> Run:
        context.write_text("a" + " a" * (tokens - 4))  # one token each, between the first one and the empty line
        settings = TrainingConfig(steps=1, batch_size=4, eval_steps=1, max_new_tokens=16)
        asked = experiment.replace(
            task=str(tmp_path / "task.toml"), context=str(context), demonstrations=0, training=settings
        )
        return train(asked, out=tmp_path / "runs", name=name, backbone=backbone)

    width = len(backbone.tokenizer(f"Q: {'x y z ' * 8}0 A:").input_ids)
    room = 256 - longest - width
    run = distilled(room, "fits")
    assert run.results is not None
    assert run.results["distillation"]["context_tokens"] == room
    message = rf"row 1 of .*rows.csv \(\w+ split\) has {width} tokens, .* leave it {width - 1}"
    with pytest.raises(ValueError, match=message):
        distilled(room + 1, "too-long")
    assert not (tmp_path / "runs" / "too-long").exists()


def test_teacher_answers_whole_queries_or_none(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "context.md").write_text("a b c d e f " * 14)
    (tmp_path / "requests.csv").write_text("q\n" + "".join(f"{'x y z ' * (1 + n)}\n" for n in range(24)))
    settings = TrainingConfig(steps=1, batch_size=4, eval_steps=1, max_new_tokens=64)
    asked = experiment.replace(context=str(tmp_path / "context.md"), demonstrations=0, training=settings)
    with pytest.raises(ValueError, match=r"row 10 \(queries\) has 67 tokens"):
        distil(asked, tmp_path / "requests.csv", "Q: {q} A:", out=tmp_path / "runs", backbone=backbone)
    assert not list((tmp_path / "runs").glob("*"))


def test_settings_without_effect_are_refused(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    wrong = experiment.replace(training=TrainingConfig(steps=1, vocabulary_weight=0.5))
    with pytest.raises(ValueError, match="but a distillation takes its loss"):
        train(wrong, out=tmp_path, backbone=backbone)
    lonely = experiment.replace(demonstrations=0, training=TrainingConfig(steps=1, temperature=2.0))
    with pytest.raises(ValueError, match="only a distillation has one"):
        train(lonely, out=tmp_path, backbone=backbone)
    with pytest.raises(ValueError, match="demonstrations is 1000"):
        train(experiment.replace(demonstrations=1000), out=tmp_path, backbone=backbone)


def test_rank_rebuilds_the_start_with_the_teacher(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    """The gradient that the prompt starts from is that of the divergence, not of the labels."""
    settings = TrainingConfig(steps=2, batch_size=8, eval_steps=2)
    prompt = BPT(length=6, rank=2, init="gradient", gradient_batches=2)
    run = train(experiment.replace(prompt=prompt, training=settings), out=tmp_path, name="run", backbone=backbone)
    [loaded] = load_prompts(run.folder)
    assert loaded.start is not None
    rows, teacher = run_splits(run).train, teacher_of(run, backbone)
    gradient, by_labels = (gradient_on(run.experiment, run.task, backbone, rows, of) for of in (teacher, None))

    def start(gradient: Any) -> torch.Tensor:
        built = build_prompt(run.experiment, run.task, backbone, initialize=True, gradient=gradient)
        return built.prompt().detach()

    torch.testing.assert_close(loaded.start, start(gradient), rtol=1e-4, atol=1e-6)
    assert float((loaded.start - start(by_labels)).norm()) > 0.1 * float(loaded.start.norm())
    finished = gradient_spectra(run.folder)[-1].spectrum.values
    assert finished == pytest.approx(Spectrum.of(gradient(loaded.matrix, 8)).values, rel=1e-3, abs=1e-6)
    assert finished != pytest.approx(Spectrum.of(by_labels(loaded.matrix, 8)).values, rel=0.1, abs=1e-6)


def test_rank_needs_no_teacher_where_the_start_has_none(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    settings = TrainingConfig(steps=1, batch_size=8, eval_steps=1)
    run = train(experiment.replace(training=settings), out=tmp_path, name="run", backbone=backbone)
    (run.folder / "context.txt").unlink()
    [loaded] = load_prompts(run.folder)
    assert (loaded.start is None, loaded.start_missing) == (False, "")
    with pytest.raises(ValueError, match="is not the text that the run was started with"):
        gradient_spectra(run.folder)


def test_sweep_notices_another_context_or_initial_prompt(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "context.md").write_text("a b c")
    settings = TrainingConfig(steps=1, batch_size=8, eval_steps=1)
    plain = experiment.replace(demonstrations=0, training=settings)
    for name, seed in (("first", 0), ("second", 1)):
        train(plain.replace(seed=seed), out=tmp_path, name=name, backbone=backbone)
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "first", start)
    asked = plain.replace(context=str(tmp_path / "context.md"), init_prompt=str(start))

    def state() -> tuple[str, str]:
        result = run_trial(asked, tmp_path / "out", BackboneCache(), NullCallback(), differentiate)
        return result.state, result.problem

    assert state() == ("done", "")
    assert state() == ("skipped", "")
    (tmp_path / "context.md").write_text("a b d")
    assert state()[0] == "failed"
    assert "the context of" in state()[1]
    (tmp_path / "context.md").write_text("a b c")
    shutil.rmtree(start)
    assert state() == ("skipped", "")  # finished runs stay valid
    shutil.copytree(tmp_path / "second", start)
    assert "the init_prompt of" in state()[1]


def test_queries_with_an_emoji_make_a_readable_task(tmp_path: Path) -> None:
    template = "\U0001f600 {q}\x7f\nAnswer:"
    _write_task(tmp_path, _task(Path("q.csv"), template, ""), [{"q": "a", "answer": "b"}] * 3)
    assert load_task(str(tmp_path / "task.toml")).template == template
