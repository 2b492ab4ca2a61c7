"""What texts begin with alike is read once, and changes nothing: the reference is a row at a time, read whole."""

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
from softprompt.models import varlen as packed_module
from softprompt.prompts import SoftPrompt
from softprompt.prompts.adept import ADePT
from softprompt.tasks import Example, Task

MakeBackbone = Callable[[str], Backbone]
BEGINNING = (11, 12, 13, 14)
INDEX = torch.tensor([2, 0, 1, 0, 2])


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[VarlenLayout]:
    """How each pass was laid out."""
    made: list[VarlenLayout] = []

    def noted(*given: Any, **also: Any) -> VarlenLayout:
        made.append(VarlenLayout(*given, **also))
        return made[-1]

    monkeypatch.setattr(packed_module, "VarlenLayout", noted)
    return made


def answered(rows: Sequence[Tensor], last: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch whose rows are labelled at their `last` tokens."""
    ids, mask = padded(rows, "left", 2)
    return ids, mask, torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - last, ids, -100)


def loss_of(backbone: Backbone, prompts: Sequence[SoftPrompt], rows: Sequence[Tensor], last: int) -> Tensor:
    """The same batch's, a row at a time."""
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        logits = concatenated(backbone, prompt, row)
        found.append(cross_entropy(logits[len(row) - last : len(row)], row[-last:], reduction="none"))
    return torch.cat(found).mean()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("last", [1, 2])
def test_a_training_batch(decoder: Backbone, last: int, several: bool, packings: list[VarlenLayout]) -> None:
    """One row is hardly more than the beginning, and the tokens of the last answer are read in no row."""
    prompts, rows = prompts_of(decoder), rows_of([7, last, 4, 9, 3], front=BEGINNING)
    index = INDEX if several else torch.ones_like(INDEX)
    prompted = attach(decoder)
    packings.clear()
    live = prompts if several else prompts[1:2]
    loss = prompted(*answered(rows, last), prompts=live, index=INDEX if several else None).loss
    wanted = loss_of(decoder, [prompts[which] for which in index], rows, last)
    assert_near(loss, wanted)
    for ours, theirs in zip(gradients(loss, prompts), gradients(wanted, prompts), strict=True):
        assert_near(ours, theirs, 2e-4)
    if prompted.packs:
        (packing,) = packings
        left = min(4, 4 + last - 2)  # each row is left one token, and the last one is not read
        assert packing.rows.lengths == tuple(4 + own - 1 - left for own in (7, last, 4, 9, 3))
        assert packing.prompts is not None
        assert packing.prompts.lengths == tuple(len(prompt.prompt()) + left for prompt in live)


def test_labels_in_what_is_shared_are_answered_in_every_row(
    tiny_backbone: MakeBackbone, packings: list[VarlenLayout]
) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 3, 3], front=BEGINNING)
    prompt = prompts_of(backbone)[1]
    loss = attach(backbone)(*answered(rows, 6), prompts=[prompt]).loss
    assert_near(loss, loss_of(backbone, [prompt] * 3, rows, 6))
    assert packings[-1].rows.lengths == (5, 5, 5), "the first label is for the second token: the first alone is shared"


def test_without_a_prompt_the_beginning_alone_is_shared(
    tiny_backbone: MakeBackbone, packings: list[VarlenLayout]
) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=BEGINNING)
    loss = attach(backbone)(*answered(rows, 1)).loss
    logits = [backbone.model(input_ids=row[None]).logits[0, -2] for row in rows]
    assert_near(loss, cross_entropy(torch.stack(logits), torch.stack([row[-1] for row in rows])))
    assert packings[-1].rows.lengths == (2, 4, 3)


def test_one_row_a_prompt_shares_nothing(tiny_backbone: MakeBackbone, packings: list[VarlenLayout]) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=BEGINNING)
    attach(backbone)(*answered(rows, 1), prompts=prompts_of(backbone), index=torch.arange(3))
    assert packings[-1].rows.lengths == (6, 8, 7)


def test_a_beginning_that_is_shifted_by_chance_is_each_rows_own(
    tiny_backbone: MakeBackbone, packings: list[VarlenLayout]
) -> None:
    """ADePT's dropout, which is on while the prompt trains and the backbone does not."""
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=BEGINNING)
    prompt = ADePT(length=3, width=4, dropout=0.5).build(backbone.host(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in prompt.parameters():  # fresh ones shift nothing
            parameter += 0.3
    prompted = attach(backbone, prompt)
    prompted.train()
    prompted(*answered(rows, 1))
    assert packings[-1].rows.lengths == (6, 8, 7)
    prompted.eval()
    prompted(*answered(rows, 1))
    assert packings[-1].rows.lengths == (2, 4, 3)


def test_layers_that_are_computed_again(tiny_backbone: MakeBackbone, packings: list[VarlenLayout]) -> None:
    backbone, rows = tiny_backbone("llama"), rows_of([3, 5, 4], front=BEGINNING)
    prompts, prompted = prompts_of(backbone)[1:2], attach(backbone)
    found = []
    for on in (False, True):
        with gradient_checkpointing(backbone.model, on):
            found.append(gradients(prompted(*answered(rows, 1), prompts=prompts).loss, prompts))
    assert packings[-1].rows.lengths == (2, 4, 3)
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, 1e-5)


def with_shared_prefix(prompted: PromptedModel, prompts: Sequence[SoftPrompt]) -> tuple[Any, list[Tensor], list[int]]:
    """Two beginnings behind each prompt, one of them read in two parts, and what each has in all."""
    first = prompted.with_shared_prefix(prompted.prepare(prompts), [[11]] * 3, torch.arange(3))
    beginnings = [[12, 13], [21], [22, 23, 24], [12, 13], [29], [30, 31]]
    every = [0, 0, 1, 1, 2, 2]
    ready = prompted.with_shared_prefix(first, beginnings, torch.tensor(every))
    return ready, [torch.tensor([11, *beginning]) for beginning in beginnings], every


@pytest.mark.parametrize("candidates", [[[5], [7]], [[5], [9, 11], [12, 13, 14]]])
@pytest.mark.parametrize("grad", [False, True])
def test_texts_behind_beginnings_that_were_read_before(
    decoder: Backbone, candidates: list[list[int]], grad: bool
) -> None:
    """Scores, generated tokens and the logits of every token that is left."""
    prompted, prompts = attach(decoder), prompts_of(decoder)
    if not prompted.supports_prefix_sharing:
        assert decoder.model.config.model_type in ("mistral", "gemma2"), "they have a sliding window"
        with pytest.raises(ValueError, match="give the whole text"):
            with_shared_prefix(prompted, prompts)
        return
    rests = rows_of([3, 1, 4, 2, 5, 3, 2])
    index = torch.tensor([5, 0, 2, 1, 3, 4, 0])
    ids, mask = padded(rests, "right", 2)
    with torch.set_grad_enabled(grad):
        ready, beginnings, every = with_shared_prefix(prompted, prompts)
        scores = prompted.score(ids, mask, candidates, ready, index)
        logits, targets = prompted.label_logits(ids, mask, ids.masked_fill(mask == 0, -100), ready, index)
        tokens = torch.stack(
            list(prompted.generate(ids, mask, max_new_tokens=4, stop=[], prompts=ready, index=index)), 1
        )
    for place, (which, rest) in enumerate(zip(index.tolist(), rests, strict=True)):
        prompt, lead = prompts[every[which]], len(beginnings[which])
        text = torch.cat([beginnings[which], rest])
        for found, candidate in zip(scores[place], candidates, strict=True):
            whole = concatenated(decoder, prompt, torch.cat([text, torch.tensor(candidate)])).log_softmax(-1)
            chances = whole[len(text) : -1].gather(1, torch.tensor(candidate)[:, None])
            assert_near(found, chances.sum(), 1e-4)
        assert_near(logits[place][targets[place] != -100], concatenated(decoder, prompt, text)[lead:-1])
        made = torch.cat([text, tokens[place]])
        assert torch.equal(concatenated(decoder, prompt, made)[len(text) : -1].argmax(-1), tokens[place])


def test_a_bare_model_reads_beginnings_too(decoder: Backbone) -> None:
    prompted, rest = attach(decoder), rows_of([3, 1])
    if not prompted.supports_prefix_sharing:
        return
    ids, mask = padded(rest, "left", 1)
    ready = prompted.with_shared_prefix(None, [BEGINNING, BEGINNING[:1]])
    scores = prompted.score(ids, mask, [[5], [7, 8]], ready, torch.tensor([0, 1]))
    for found, lead, own in zip(scores, (4, 1), rest, strict=True):
        text = torch.cat([torch.tensor(BEGINNING[:lead]), own])
        for chance, candidate in zip(found, ([5], [7, 8]), strict=True):
            logits = decoder.model(input_ids=torch.cat([text, torch.tensor(candidate)])[None]).logits[0]
            wanted = logits[len(text) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(candidate)[:, None])
            assert_near(chance, wanted.sum(), 1e-4)


CLASSES = Task(name="t", template="{x}", label="y", label_words={"a": "one", "b": "two"}, metrics=("accuracy",))
TEXTS = Task(name="t", template="{x}", target="y", metrics=("exact_match",))


@pytest.mark.parametrize("task", [CLASSES, TEXTS])
def test_answers_are_those_of_texts_read_whole(tiny_backbone: MakeBackbone, task: Task) -> None:
    """An instruction in front of all, and passages with several questions each."""
    backbone, counts = tiny_backbone("llama"), list[int]()
    table = backbone.model.get_input_embeddings()
    prompted = attach(backbone, prompts_of(backbone)[2])
    passages = rows_of([40, 5, 60, 30])
    rows = [torch.cat([passages[place % 4], own]) for place, own in enumerate(rows_of([4, 1, 3, 6, 2] * 7, seed=3))]
    examples = [
        Example(input_ids=(*BEGINNING * 3, *row.tolist()), answer_ids=(), label=None, row=place)
        for place, row in enumerate(rows)
    ]
    with table.register_forward_hook(lambda _, given, __: counts.append(given[0].numel())):
        found = answer(prompted, task, examples, batch_size=8, max_new_tokens=4)
        read = sum(counts)
        prompted.supports_prefix_sharing = False
        wanted = answer(prompted, task, examples, batch_size=8, max_new_tokens=4)
    assert [one.row for one in found] == list(range(35))
    assert [one.text for one in found] == [one.text for one in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
    assert read * 3 < sum(counts) - read, "tokens"


def test_beginnings_are_refused_where_they_cannot_be_read(tiny_backbone: MakeBackbone) -> None:
    llama = attach(tiny_backbone("llama"))
    for wrong in ([], [[]], [[5], []]):
        with pytest.raises(ValueError, match="give at least one, each with at least one token"):
            llama.with_shared_prefix(llama.prepare([]), wrong)
    encoder = attach(tiny_backbone("bert_mlm"))
    with pytest.raises(ValueError, match="give the whole text"):
        encoder.with_shared_prefix(encoder.prepare([]), [[5]])
