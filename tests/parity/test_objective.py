"""The training objective, its interpolation and the gradient at a start, against the model's forward, row by row."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt import Backbone, Experiment, Plain, Run, TrainingConfig, attach, open_run, train
from softprompt.evaluation.evaluate import read_splits
from softprompt.prompts import Folded
from softprompt.runs import build_prompted_model
from softprompt.tasks import Task
from softprompt.tasks.data.collate import schedule
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.tokenize import answer_ids, encode
from softprompt.tasks.user import load_task
from softprompt.training.concurrent import run_concurrently
from softprompt.training.distributed import DistributedGroup
from softprompt.training.gradients import gradient_on
from softprompt.training.objective import Objective
from softprompt.training.step import Differentiate, TrainingStep

MakeBackbone = Callable[[str], Backbone]
WEIGHTS = (0.0, 0.3, 1.0)


def examples_of(backbone: Backbone, task: Task, closing: bool, file: Path) -> list[Example]:
    rows = read_splits(Experiment(task=str(file)), task).train
    return encode(task, backbone.tokenizer, rows, 64, appends_eos=closing)[0]


def word_score(backbone: Backbone, prompt: Tensor, ids: tuple[int, ...], word: tuple[int, ...]) -> Tensor:
    """log P(word | prompt, text) of one row by itself, through the model's own forward."""
    model = backbone.model
    embed = model.get_input_embeddings()
    if backbone.architecture == "causal":
        embeds = torch.cat([prompt, embed(torch.tensor([*ids, *word]))])
        logits = model(inputs_embeds=embeds[None]).logits[0, -len(word) - 1 : -1]
        targets = word
    elif backbone.architecture == "encoder_decoder":
        targets = (*word, 1)
        embeds = torch.cat([prompt, embed(torch.tensor(ids))])
        labels = torch.tensor([[2, *word]])
        logits = model(inputs_embeds=embeds[None], decoder_input_ids=labels).logits[0]
    else:
        masked = [*ids[:-1], backbone.tokenizer.mask_token_id, ids[-1]]
        own = embed(torch.tensor(masked))
        embeds = torch.cat([own[:1], prompt, own[1:]])
        logits, targets = model(inputs_embeds=embeds[None]).logits[0, -2:-1], word
    return logits.log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets)].sum()


CASES = [("llama", "several"), ("llama", "one"), ("t5", "several"), ("bert_mlm", "one")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(
    request: pytest.FixtureRequest, tiny_backbone: MakeBackbone, ticket_task: Path, one_token_task: Path
) -> tuple[Backbone, Task, list[Example]]:
    name, label_words = request.param
    backbone, file = tiny_backbone(name), ticket_task if label_words == "several" else one_token_task
    task = load_task(str(file))
    assert (max(map(len, answer_ids(task, backbone.tokenizer))) > 1) == (label_words == "several")
    return backbone, task, examples_of(backbone, task, backbone.architecture != "causal", file)[:7]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_losses_and_gradients_match_single_rows(weight: float, case: tuple[Backbone, Task, list[Example]]) -> None:
    """`CE among the label words + weight * -log P(label words)`; at 1 the answer's own negative log-probability."""
    backbone, task, rows = case
    start = 0.5 * torch.randn(4, backbone.dim, generator=torch.Generator().manual_seed(2))
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    prompt = Folded(ours)
    objective = Objective(attach(backbone, prompt), task, TrainingConfig(vocabulary_weight=weight))
    actual = objective.losses(rows)
    label_words, expected = answer_ids(task, backbone.tokenizer), []
    for row in rows:
        scores = torch.stack([word_score(backbone, theirs, row.input_ids, word) for word in label_words])
        among = -scores.log_softmax(0)[row.label]
        expected.append(among - weight * scores.exp().sum().log())
        if weight == 1:
            torch.testing.assert_close(expected[-1], -scores[row.label])
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-5)
    actual.sum().backward()
    torch.stack(expected).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


def test_mean_is_over_rows_or_tokens_at_weight_1(case: tuple[Backbone, Task, list[Example]]) -> None:
    backbone, task, rows = case
    prompted = attach(backbone, Folded(torch.zeros(2, backbone.dim)))
    weights = [Objective(prompted, task, TrainingConfig(vocabulary_weight=one)).weight(rows) for one in WEIGHTS]
    tokens = sum(len(prompted.target(row.answer_ids)) for row in rows)
    assert weights == [len(rows), len(rows), tokens]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_start_gradient_is_mean_over_first_batches(
    weight: float, accumulate: int, tiny_backbone: MakeBackbone, ticket_task: Path
) -> None:
    backbone, task, batches = tiny_backbone("llama"), load_task(str(ticket_task)), 3
    settings = TrainingConfig(batch_size=5, vocabulary_weight=weight, gradient_accumulation_steps=accumulate)
    experiment = Experiment(task=str(ticket_task), seed=4, training=settings)
    table = read_splits(experiment, task).train
    start = 0.5 * torch.randn(4, backbone.dim, generator=torch.Generator().manual_seed(2))
    actual = gradient_on(experiment, task, backbone, table)(start, batches)
    assert not actual.requires_grad
    examples = encode(task, backbone.tokenizer, table, 512)[0]
    order = schedule([len(example.input_ids) for example in examples], 5, 4)
    leaf, label_words = start.clone().requires_grad_(), answer_ids(task, backbone.tokenizer)
    total = torch.zeros(())
    for _ in range(batches):
        rows = [examples[position] for position in next(order)[1]]
        loss, tokens = torch.zeros(()), 0
        for row in rows:
            scores = torch.stack([word_score(backbone, leaf, row.input_ids, word) for word in label_words])
            loss = loss + (1 - weight) * scores.logsumexp(0) - scores[row.label]
            tokens += len(row.answer_ids)
        total = total + loss / (tokens if weight == 1 else len(rows))
    (total / batches).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(actual, leaf.grad, rtol=1e-3, atol=1e-4 * float(leaf.grad.abs().max()))


@pytest.mark.parametrize("name", ["bert", "dinov2"])
def test_start_gradient_through_head_is_finite_nonzero(
    name: str, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    backbone, task = tiny_backbone(name), load_task(str(ticket_task))
    if name == "dinov2":
        pytest.importorskip("PIL")
        from PIL import Image

        for label in ("a", "b"):
            (tmp_path / label).mkdir()
            for number in range(9):
                Image.effect_noise((40, 40), 9 + 30 * number).convert("RGB").save(tmp_path / label / f"{number}.png")
        task = load_task(str(tmp_path))
    experiment = Experiment(
        task=str(tmp_path if name == "dinov2" else ticket_task), training=TrainingConfig(batch_size=4)
    )
    start = torch.randn(3, backbone.dim, generator=torch.Generator().manual_seed(2))
    actual = gradient_on(experiment, task, backbone, read_splits(experiment, task).train)(start, 2)
    assert actual.shape == start.shape
    assert bool(actual.isfinite().all())
    assert bool(actual.any())


def experiment_of(folder: Path, task: Path, **settings: Any) -> Experiment:
    full = TrainingConfig(**{"steps": 3, "batch_size": 6, "eval_steps": 3, "lr": 0.003, **settings})
    return Experiment(backbone=str(folder), task=str(task), prompt=Plain(length=3), training=full, dtype="float32")


def test_loss_interpolates_between_weights(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    first = []
    for weight in (0.0, 0.25, 0.75):
        run = train(experiment_of(llama_folder, ticket_task, vocabulary_weight=weight), out=tmp_path)
        assert open_run(run.folder).experiment.training.vocabulary_weight == weight
        first.append(next(iter(run.metrics()))["loss"])
    assert first[0] < first[1] < first[2]
    assert (first[2] - first[0]) / (first[1] - first[0]) == pytest.approx(3, rel=1e-4)


def test_concurrent_runs_of_other_weights_share_no_pass(
    llama_folder: Path, ticket_task: Path, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    backbone = tiny_backbone("llama")
    task = load_task(str(ticket_task))

    def kind(weight: float) -> Any:
        one = experiment_of(llama_folder, ticket_task, vocabulary_weight=weight)
        prompt = Plain(length=3).build(backbone.host(), torch.Generator())
        return TrainingStep(attach(backbone, prompt), one, task, DistributedGroup(cpu=True)).sharing_key

    assert kind(0.0) == kind(0.0) != kind(0.3) != kind(0.6)
    assert kind(1.0) == kind(1.0) != kind(0.0)
    experiments = [
        experiment_of(llama_folder, ticket_task, vocabulary_weight=weight) for weight in (0.0, 0.5, 0.5, 1.0)
    ]
    experiments[2] = experiments[2].replace(seed=1)

    def work(at: int, experiment: Experiment, differentiate: Differentiate) -> Run:
        return train(experiment, out=tmp_path, name=f"run-{at}", differentiate=differentiate)

    runs = sorted(
        run_concurrently([partial(work, at, one) for at, one in enumerate(experiments)], 4),
        key=lambda run: run.name,
    )
    for one, run in zip(experiments, runs, strict=True):
        by_itself = train(one, out=tmp_path / "alone")
        ours, theirs = ([line["loss"] for line in which.metrics()] for which in (run, by_itself))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.2, 1.0])
def test_vocabulary_weight_with_head_is_refused(
    weight: float, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_backbone("bert").model.save_pretrained(folder)
    tiny_backbone("bert").tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="answers through a trained head, which has no label words"):
        train(experiment_of(folder, ticket_task, vocabulary_weight=weight), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_vocabulary_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"vocabulary_weight is .*; it must be from 0 to 1"):
        TrainingConfig(vocabulary_weight=weight)


def test_loss_of_text_targets_is_over_the_vocabulary(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.toml"
    rows = ticket_task.parent / "train.csv"
    file.write_text(
        f'train = "{rows}"\ntemplate = "Ticket: {{text}}\\nQueue:"\ntarget = "queue"\nmetrics = ["exact_match"]\n'
    )
    losses = []
    for weight in (None, 1.0):
        one = experiment_of(llama_folder, file, vocabulary_weight=weight, max_new_tokens=2, dev_rows=4, test_rows=4)
        losses.append([line["loss"] for line in train(one, out=tmp_path / "runs").metrics()])
    assert losses[0] == losses[1]


def test_deep_and_shallow_prompts_share_no_pass(
    llama_folder: Path, ticket_task: Path, tiny_backbone: MakeBackbone
) -> None:
    backbone, task = tiny_backbone("llama"), load_task(str(ticket_task))

    def kind(depth: Any) -> Any:
        one = experiment_of(llama_folder, ticket_task).replace(depth=depth)
        prompted = build_prompted_model(one, task, backbone, initialize=True)
        return TrainingStep(prompted, one, task, DistributedGroup(cpu=True)).sharing_key

    assert kind("shallow") == kind("shallow") != kind("deep") == kind("deep")
