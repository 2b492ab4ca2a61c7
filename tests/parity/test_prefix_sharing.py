"""Prefix sharing changes no result: the reference runs one row at a time, without a shared prefix."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import assert_near, concatenated, gradients, padded, prompts_of, rows_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt.backbones import Backbone
from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.evaluation.predict import answer
from softprompt.models import PromptedModel, attach
from softprompt.models import varlen as varlen_module
from softprompt.prompts import SoftPrompt
from softprompt.prompts.adept import ADePT
from softprompt.tasks import Task
from softprompt.tasks.data.examples import Example

MakeBackbone = Callable[[str], Backbone]
PREFIX = (11, 12, 13, 14)
INDEX = torch.tensor([2, 0, 1, 0, 2])


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[VarlenLayout]:
    """The layout of each forward pass."""
    layouts: list[VarlenLayout] = []

    def recorded(*args: Any, **kwargs: Any) -> VarlenLayout:
        layouts.append(VarlenLayout(*args, **kwargs))
        return layouts[-1]

    monkeypatch.setattr(varlen_module, "VarlenLayout", recorded)
    return layouts


def labeled(rows: Sequence[Tensor], last: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch with labels at the last `last` tokens of each row."""
    ids, mask = padded(rows, "left", 2)
    return ids, mask, torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - last, ids, -100)


def loss_of(backbone: Backbone, prompts: Sequence[SoftPrompt], rows: Sequence[Tensor], last: int) -> Tensor:
    """The loss of the same batch, one row at a time."""
    losses = []
    for prompt, row in zip(prompts, rows, strict=True):
        logits = concatenated(backbone, prompt, row)
        losses.append(cross_entropy(logits[len(row) - last : len(row)], row[-last:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("many_prompts", [False, True])
@pytest.mark.parametrize("last", [1, 2])
def test_training_batch_equals_single_rows(
    decoder: Backbone, last: int, many_prompts: bool, layouts: list[VarlenLayout]
) -> None:
    """One row is hardly longer than the prefix, and the last label token is the input of no row."""
    prompts, rows = prompts_of(decoder), rows_of([7, last, 4, 9, 3], front=PREFIX)
    index = INDEX if many_prompts else torch.ones_like(INDEX)
    prompted = attach(decoder)
    layouts.clear()
    live = prompts if many_prompts else prompts[1:2]
    loss = prompted(*labeled(rows, last), prompts=live, index=INDEX if many_prompts else None).loss
    expected = loss_of(decoder, [prompts[prompt] for prompt in index], rows, last)
    assert_near(loss, expected)
    for ours, theirs in zip(gradients(loss, prompts), gradients(expected, prompts), strict=True):
        assert_near(ours, theirs, 2e-4)
    if prompted.layout == "packed":
        (layout,) = layouts
        shared = min(4, 4 + last - 2)  # each row keeps one token, and its last is no input
        assert layout.rows.lengths == tuple(4 + count - 1 - shared for count in (7, last, 4, 9, 3))
        assert layout.prompts is not None
        assert layout.prompts.lengths == tuple(len(prompt.prompt()) + shared for prompt in live)


def test_labels_inside_the_prefix_are_not_shared(tiny_backbone: MakeBackbone, layouts: list[VarlenLayout]) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 3, 3], front=PREFIX)
    prompt = prompts_of(backbone)[1]
    loss = attach(backbone)(*labeled(rows, 6), prompts=[prompt]).loss
    assert_near(loss, loss_of(backbone, [prompt] * 3, rows, 6))
    assert layouts[-1].rows.lengths == (5, 5, 5), "the first label is for the second token: the first alone is shared"


def test_prefix_is_shared_without_a_prompt(tiny_backbone: MakeBackbone, layouts: list[VarlenLayout]) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=PREFIX)
    loss = attach(backbone)(*labeled(rows, 1)).loss
    logits = [backbone.model(input_ids=row[None]).logits[0, -2] for row in rows]
    assert_near(loss, cross_entropy(torch.stack(logits), torch.stack([row[-1] for row in rows])))
    assert layouts[-1].rows.lengths == (2, 4, 3)


def test_one_row_per_prompt_shares_nothing(tiny_backbone: MakeBackbone, layouts: list[VarlenLayout]) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=PREFIX)
    attach(backbone)(*labeled(rows, 1), prompts=prompts_of(backbone), index=torch.arange(3))
    assert layouts[-1].rows.lengths == (6, 8, 7)


def test_randomly_shifted_prefix_is_not_shared(tiny_backbone: MakeBackbone, layouts: list[VarlenLayout]) -> None:
    """ADePT's dropout is on while the prompt trains and the backbone does not."""
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=PREFIX)
    prompt = ADePT(length=3, width=4, dropout=0.5).build(backbone.host(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in prompt.parameters():  # fresh ones shift nothing
            parameter += 0.3
    prompted = attach(backbone, prompt)
    prompted.train()
    prompted(*labeled(rows, 1))
    assert layouts[-1].rows.lengths == (6, 8, 7)
    prompted.eval()
    prompted(*labeled(rows, 1))
    assert layouts[-1].rows.lengths == (2, 4, 3)


def test_gradient_checkpointing_with_a_shared_prefix(tiny_backbone: MakeBackbone, layouts: list[VarlenLayout]) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=PREFIX)
    prompts, prompted = prompts_of(backbone)[1:2], attach(backbone)
    results = []
    for on in (False, True):
        with gradient_checkpointing(backbone.model, on):
            results.append(gradients(prompted(*labeled(rows, 1), prompts=prompts).loss, prompts))
    assert layouts[-1].rows.lengths == (2, 4, 3)
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, 1e-5)


def with_shared_prefix(prompted: PromptedModel, prompts: Sequence[SoftPrompt]) -> tuple[Any, list[Tensor], list[int]]:
    """Two prefixes per prompt, computed in two steps; with each full prefix and the index of its prompt."""
    first = prompted.with_shared_prefix(prompted.prepare(prompts), [[11]] * 3, torch.arange(3))
    prefixes = [[12, 13], [21], [22, 23, 24], [12, 13], [29], [30, 31]]
    prompt_index = [0, 0, 1, 1, 2, 2]
    prepared = prompted.with_shared_prefix(first, prefixes, torch.tensor(prompt_index))
    return prepared, [torch.tensor([11, *prefix]) for prefix in prefixes], prompt_index


@pytest.mark.parametrize("candidates", [[[5], [7]], [[5], [9, 11], [12, 13, 14]]])
@pytest.mark.parametrize("grad", [False, True])
def test_texts_after_prepared_prefixes(decoder: Backbone, candidates: list[list[int]], grad: bool) -> None:
    """Scores, generated tokens, and the logits of every token after the prefix."""
    prompted, prompts = attach(decoder), prompts_of(decoder)
    if not prompted.supports_prefix_sharing:
        assert decoder.model.config.model_type in ("mistral", "gemma2"), "they have a sliding window"
        with pytest.raises(ValueError, match="give full texts"):
            with_shared_prefix(prompted, prompts)
        return
    rests = rows_of([3, 1, 4, 2, 5, 3, 2])
    index = torch.tensor([5, 0, 2, 1, 3, 4, 0])
    ids, mask = padded(rests, "right", 2)
    with torch.set_grad_enabled(grad):
        prepared, prefixes, prompt_index = with_shared_prefix(prompted, prompts)
        scores = prompted.score(ids, mask, candidates, prepared, index)
        logits, targets = prompted.label_logits(ids, mask, ids.masked_fill(mask == 0, -100), prepared, index)
        tokens = torch.stack(
            list(prompted.generate(ids, mask, max_new_tokens=4, stop=[], prompts=prepared, index=index)), 1
        )
    for row, (prefix, rest) in enumerate(zip(index.tolist(), rests, strict=True)):
        prompt, prefix_length = prompts[prompt_index[prefix]], len(prefixes[prefix])
        text = torch.cat([prefixes[prefix], rest])
        for score, candidate in zip(scores[row], candidates, strict=True):
            log_probs = concatenated(decoder, prompt, torch.cat([text, torch.tensor(candidate)])).log_softmax(-1)
            expected = log_probs[len(text) : -1].gather(1, torch.tensor(candidate)[:, None])
            assert_near(score, expected.sum(), 1e-4)
        assert_near(logits[row][targets[row] != -100], concatenated(decoder, prompt, text)[prefix_length:-1])
        generated = torch.cat([text, tokens[row]])
        assert torch.equal(concatenated(decoder, prompt, generated)[len(text) : -1].argmax(-1), tokens[row])


def test_prefix_sharing_without_a_prompt(decoder: Backbone) -> None:
    prompted, rests = attach(decoder), rows_of([3, 1])
    if not prompted.supports_prefix_sharing:
        return
    ids, mask = padded(rests, "left", 1)
    prepared = prompted.with_shared_prefix(None, [PREFIX, PREFIX[:1]])
    scores = prompted.score(ids, mask, [[5], [7, 8]], prepared, torch.tensor([0, 1]))
    for row_scores, prefix_length, rest in zip(scores, (4, 1), rests, strict=True):
        text = torch.cat([torch.tensor(PREFIX[:prefix_length]), rest])
        for score, candidate in zip(row_scores, ([5], [7, 8]), strict=True):
            logits = decoder.model(input_ids=torch.cat([text, torch.tensor(candidate)])[None]).logits[0]
            expected = logits[len(text) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(candidate)[:, None])
            assert_near(score, expected.sum(), 1e-4)


CLASSES = Task(name="t", template="{x}", label="y", label_words={"a": "one", "b": "two"}, metrics=("accuracy",))
TEXTS = Task(name="t", template="{x}", target="y", metrics=("exact_match",))


@pytest.mark.parametrize("task", [CLASSES, TEXTS])
def test_answer_equals_answer_without_sharing(tiny_backbone: MakeBackbone, task: Task) -> None:
    """An instruction before all texts, and passages with several questions each."""
    backbone, counts = tiny_backbone("llama"), list[int]()
    table = backbone.model.get_input_embeddings()
    prompted = attach(backbone, prompts_of(backbone)[2])
    passages = rows_of([40, 5, 60, 30])
    questions = rows_of([4, 1, 3, 6, 2] * 7, seed=3)
    rows = [torch.cat([passages[number % 4], question]) for number, question in enumerate(questions)]
    examples = [
        Example(input_ids=(*PREFIX * 3, *row.tolist()), answer_ids=(), label=None, row=number)
        for number, row in enumerate(rows)
    ]
    with table.register_forward_hook(lambda _, args, __: counts.append(args[0].numel())):
        shared = answer(prompted, task, examples, batch_size=8, max_new_tokens=4)
        shared_tokens = sum(counts)
        prompted.supports_prefix_sharing = False
        unshared = answer(prompted, task, examples, batch_size=8, max_new_tokens=4)
    assert [result.row for result in shared] == list(range(35))
    assert [result.text for result in shared] == [result.text for result in unshared]
    for ours, theirs in zip(shared, unshared, strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
    assert shared_tokens * 3 < sum(counts) - shared_tokens


def test_with_shared_prefix_invalid_prefix_is_rejected(tiny_backbone: MakeBackbone) -> None:
    llama = attach(tiny_backbone("llama"))
    for wrong in ([], [[]], [[5], []]):
        with pytest.raises(ValueError, match="give at least one, each with at least one token"):
            llama.with_shared_prefix(llama.prepare([]), wrong)
    encoder = attach(tiny_backbone("bert_mlm"))
    with pytest.raises(ValueError, match="give full texts"):
        encoder.with_shared_prefix(encoder.prepare([]), [[5]])
