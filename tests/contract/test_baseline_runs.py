"""A run of a baseline is used like any other: evaluated, resumed, compared with the bare model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt import (
    Backbone,
    Experiment,
    Interrupted,
    Plain,
    Progress,
    Run,
    TrainingConfig,
    attach,
    evaluate,
    predict,
    resume,
    train,
)
from softprompt.evaluation.evaluate import run_splits
from softprompt.models.baselines import tune
from softprompt.models.teacher import Teacher
from softprompt.runs import build_prompted_model
from softprompt.tasks.data.tokenize import answer_ids, encode
from softprompt.tasks.user import load_task
from softprompt.training.callbacks import NullCallback
from softprompt.types import Baseline

MakeBackbone = Callable[[str], Backbone]
both = pytest.mark.parametrize("baseline", ["lora", "full"])


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    training = TrainingConfig(steps=12, batch_size=16, eval_steps=4, lr=1.0, zero_shot=True)
    return Experiment(backbone=str(llama_folder), task=str(ticket_task), training=training, dtype="float32")


def bare_score(run: Run, backbone: Backbone) -> float:
    """The share of test rows that the model without a prompt answers rightly."""
    rows, task = run_splits(run).test, run.task
    examples, _ = encode(task, backbone.tokenizer, rows, 256, appends_eos=False)
    model, candidates, right = attach(backbone), answer_ids(task, backbone.tokenizer), 0
    for example, row in zip(examples, rows, strict=True):
        best = int(model.score(torch.tensor([list(example.input_ids)]), None, candidates).argmax())
        right += list(task.label_words)[best] == row[task.label]
    return right / len(rows)


@both
def test_baseline_is_evaluated_and_does_not_change_the_bare_model(
    baseline: Baseline, experiment: Experiment, tmp_path: Path
) -> None:
    """Seen failing: LoRA could not be evaluated, and both reported the trained model's score as zero-shot."""
    run = train(experiment.replace(baseline=baseline), out=tmp_path)
    backbone = run.load_backbone()
    assert evaluate(run).value == evaluate(run, backbone=backbone).value == run.results["test"]
    assert len(predict(run, [{"text": "a a a"}, {"text": "b"}])) == 2
    expected = bare_score(run, backbone)
    assert run.results["zero_shot"] == pytest.approx(expected)
    assert run.results["test"] > expected
    prompt = train(experiment.replace(prompt=Plain(length=4)), out=tmp_path)
    assert prompt.results["zero_shot"] == pytest.approx(expected)


@both
def test_interrupted_baseline_resumes_to_the_same_bits(
    baseline: Baseline, experiment: Experiment, tmp_path: Path
) -> None:
    whole = train(experiment.replace(baseline=baseline), out=tmp_path, name="whole")

    class Stop(NullCallback):
        def on_step(self, progress: Progress) -> None:
            if progress.step == 6:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(experiment.replace(baseline=baseline), out=tmp_path, name="cut", callback=Stop())
    again = resume(tmp_path / "cut")
    for name in ("metrics.jsonl", "tuned.safetensors", "predictions.jsonl"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_lora_starts_from_the_experiments_seed(experiment: Experiment, tiny_backbone: MakeBackbone) -> None:
    task = load_task(experiment.task)

    def start(seed: int) -> torch.Tensor:
        asked = experiment.replace(baseline="lora", seed=seed)
        tuned = build_prompted_model(asked, task, tiny_backbone("llama"), initialize=True).tuned
        assert tuned is not None
        return torch.cat([values.flatten() for name, values in tuned.named_parameters() if "lora_A" in name])

    assert torch.equal(start(1), start(1))
    assert not torch.isclose(start(0), start(1)).any()


def test_copy_for_lora_shares_the_frozen_weights(tiny_backbone: MakeBackbone) -> None:
    own = tiny_backbone("llama")
    copied, tuned = tune(own, "lora", 0)
    assert tuned is not None
    shared = {parameter.data_ptr() for parameter in own.model.parameters()}
    trained = {parameter.data_ptr() for parameter in tuned.parameters()}
    assert {parameter.data_ptr() for parameter in copied.model.parameters()} == shared | trained
    assert not any("lora" in name for name, _ in own.model.named_parameters())


def test_teacher_has_no_dropout_while_the_student_has(tiny_backbone: MakeBackbone) -> None:
    """Seen failing: one draw of dropout was in the context's keys and values, and in every target."""
    model = attach(tiny_backbone("gpt2"))
    rows, candidates = (torch.tensor([[5, 6, 7], [8, 9, 10]]), None), ((20,), (21, 22))
    expected = Teacher(model, (3, 4, 5, 6)).score(*rows, candidates)
    model.backbone.model.train()
    try:
        assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.backbone.model.modules())
        teacher = Teacher(model, (3, 4, 5, 6))
        torch.testing.assert_close(teacher.score(*rows, candidates), expected, rtol=0, atol=0)
        assert all(module.training for module in model.backbone.model.modules())
    finally:
        model.backbone.model.eval()
    torch.testing.assert_close(teacher.score(*rows, candidates), expected, rtol=0, atol=0)
