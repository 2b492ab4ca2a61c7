"""A prompt behind an encoder's first token is concatenation, at a mask or before a trained head, whatever the padding.

The reference is a row at a time: `[first; prompt; rest]` as plain vectors through the model's own forward.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import WHOLE_WORDS, assert_same_gradients, padded, prompts_of, rows_of
from safetensors.torch import load_file
from torch import Tensor, nn

import softprompt
from softprompt.backbones import Backbone, load
from softprompt.models import PromptedModel, attach, fresh_head
from softprompt.prompts import Folded, SoftPrompt
from softprompt.prompts.dpt import DPT
from softprompt.runs import build_prompted_model

MODELS = ("bert", "roberta", "mpnet", "distilbert")
CLS, SEP, PAD, MASK = 0, 1, 2, 3
TEXTS, INDEX = (7, 2, 4, 9, 1), (2, 0, 1, 0, 2)
CLASSES = 4
LABEL_WORDS = ((11,), (12,), (40,), (41,))
MakeBackbone = Callable[[str], Backbone]
sides = pytest.mark.parametrize(
    ("side", "extra"), [("left", 0), ("right", 0), ("left", 1), ("right", 40), ("left", 40)]
)


def head_of(backbone: Backbone) -> nn.Linear | None:
    head = fresh_head(backbone, CLASSES, torch.Generator().manual_seed(6))
    if head is not None:
        with torch.no_grad():
            head.weight *= 10
    return head


@pytest.fixture(params=[*MODELS, *(f"{name}_mlm" for name in MODELS)])
def prompted(request: pytest.FixtureRequest, tiny_backbone: MakeBackbone) -> PromptedModel:
    backbone = tiny_backbone(request.param)
    assert backbone.masked_lm == request.param.endswith("_mlm")
    return attach(backbone, head=head_of(backbone))


def texts() -> list[Tensor]:
    return rows_of(TEXTS, front=[CLS], back=[SEP])


def single_row(prompted: PromptedModel, prompt: SoftPrompt | None, text: Tensor) -> Tensor:
    """The answer's logits for one row, from plainly concatenated vectors."""
    model = prompted.backbone.model
    if prompted.head is None:
        text = torch.cat([text[:-1], torch.tensor([MASK, SEP])])
    embeds, length = model.get_input_embeddings()(text)[None], 0
    if prompt is not None:
        own, length = prompt.shift(embeds, text[None], torch.arange(len(text))[None]), len(prompt.prompt())
        embeds = torch.cat([own[:, :1], prompt.prompt()[None], own[:, 1:]], 1)
    output = model(inputs_embeds=embeds)[0][0]
    if prompted.head is None:
        return output[-2]
    mine = torch.cat([output[:1], output[1 + length :]])
    return prompted.head(mine.mean(0))


def close(ours: Tensor, reference: Tensor) -> None:
    """Equal but for float32 sums over other shapes, which grow with the largest term."""
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=2e-5 * max(1.0, float(reference.abs().max())))


@sides
def test_logits_loss_and_gradients_match_concatenation(prompted: PromptedModel, side: str, extra: int) -> None:
    prompts, rows = prompts_of(prompted.backbone), texts()
    ids, mask = padded(rows, side, extra)
    labels = torch.tensor([1, 3, 0, 2, 1])
    actual = prompted(ids, mask, labels[:, None], prompts=prompts, index=torch.tensor(INDEX))
    logits = torch.stack(
        [single_row(prompted, prompts[number], text) for text, number in zip(rows, INDEX, strict=True)]
    )
    loss = nn.functional.cross_entropy(logits, labels)
    close(actual.logits.view_as(logits), logits)
    close(actual.loss, loss)
    trained = [p for prompt in prompts for p in prompt.parameters()] + list(prompted.parameters())
    assert len(trained) == (9 if prompted.head is None else 11)
    assert_same_gradients(actual.loss, loss, trained)


def test_bare_encoder_is_the_model_on_ids(prompted: PromptedModel) -> None:
    rows, model = texts(), prompted.backbone.model
    ids, mask = padded(rows, "left", 5)
    logits = prompted(ids, mask).logits
    for row, text in enumerate(rows):
        ids = (text if prompted.head is not None else torch.cat([text[:-1], torch.tensor([MASK, SEP])]))[None]
        # MPNet takes id 1, the end here, for padding, whatever its config says, and gives it no position.
        positions = (
            {"position_ids": torch.arange(2, 2 + ids.shape[1])[None]} if model.config.model_type == "mpnet" else {}
        )
        whole = model(input_ids=ids, **positions)[0][0]
        close(logits[row].flatten(), whole[-2] if prompted.head is None else prompted.head(whole.mean(0)))


def test_scores_are_log_probabilities(prompted: PromptedModel) -> None:
    prompts, rows = prompts_of(prompted.backbone), texts()
    ids, mask = padded(rows, "left", 3)
    prepared, index = prompted.prepare(prompts), torch.tensor(INDEX)
    scores = prompted.score(ids, mask, LABEL_WORDS, prompts=prepared, index=index)
    assert torch.equal(scores, prompted.score(ids, mask, LABEL_WORDS, prompts=prompts, index=index))
    for row, (text, number) in enumerate(zip(rows, INDEX, strict=True)):
        slow = single_row(prompted, prompts[number], text).log_softmax(-1)
        close(scores[row], slow if prompted.head is not None else slow[[word[0] for word in LABEL_WORDS]])


def test_rows_own_mask_keeps_its_position(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("bert_mlm")
    prompted, prompt = attach(backbone), prompts_of(backbone)[0]
    rows = [torch.tensor([CLS, 20, MASK, 30, SEP]), torch.tensor([CLS, MASK, 40, SEP])]
    ids, mask = padded(rows, "left", 2)
    logits = prompted(ids, mask, prompts=[prompt]).logits
    for row, text in enumerate(rows):
        embeds = backbone.model.get_input_embeddings()(text)[None]
        whole = backbone.model(inputs_embeds=torch.cat([embeds[:, :1], prompt.prompt()[None], embeds[:, 1:]], 1))[0][0]
        close(logits[row, 0], whole[3 + int((text == MASK).nonzero())])
    mixed = prompted(*padded([rows[0], torch.tensor([CLS, 20, SEP])], "left", 0), prompts=[prompt]).logits
    close(mixed[0], logits[0])
    close(mixed[1], prompted(torch.tensor([[CLS, 20, SEP]]), prompts=[prompt]).logits[0])


def test_row_without_closing_token_ends_with_mask(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("roberta_mlm")
    text = torch.tensor([CLS, 20, 30])
    whole = backbone.model(input_ids=torch.cat([text, torch.tensor([MASK])])[None])[0][0, -1]
    close(attach(backbone)(text[None]).logits[0, 0], whole)


def test_rows_longer_than_last_position_are_refused(tiny_backbone: MakeBackbone) -> None:
    # RoBERTa's and MPNet's tables begin behind the padding token's row: 256 - (2 + 1), and MPNet's padding is row 1.
    for name, limit in (("bert", 256), ("roberta", 253), ("mpnet", 254), ("distilbert", 256)):
        prompted = attach(tiny_backbone(name), head=head_of(tiny_backbone(name)))
        ids = torch.full((1, 10), 9)
        prompted(ids, prompts=[Folded(torch.zeros(limit - 10, 32))])
        with pytest.raises(ValueError, match=f"a row has {limit + 1} positions with its prompt and answer, but {name}"):
            prompted(ids, prompts=[Folded(torch.zeros(limit - 9, 32))])


def test_wrong_input_is_refused_by_name(tiny_backbone: MakeBackbone) -> None:
    label_words, classes = (
        attach(tiny_backbone("bert_mlm")),
        attach(tiny_backbone("bert"), head=head_of(tiny_backbone("bert"))),
    )
    ids, mask = padded(texts(), "left", 0)
    with pytest.raises(ValueError, match=r"candidates \[\[11, 12\]\] of bert_mlm are not one token each"):
        label_words.score(ids, mask, [[11, 12], [13]])
    with pytest.raises(ValueError, match=r"labels of bert_mlm are \(5, 2\); an encoder answers with one token"):
        label_words(ids, mask, torch.ones(5, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="the head has 4 classes and 2 candidates are given"):
        classes.score(ids, mask, LABEL_WORDS[:2])
    with pytest.raises(ValueError, match=r"bert \(encoder\) does not generate"):
        classes.generate(ids, mask)
    with pytest.raises(ValueError, match="bert has no vocabulary head to answer with; give a head to train"):
        attach(tiny_backbone("bert"))
    with pytest.raises(ValueError, match="answers with one of at least two classes, but there are 0"):
        fresh_head(tiny_backbone("bert"), 0, torch.Generator())


def test_fresh_head_depends_on_its_generator_only(tiny_backbone: MakeBackbone) -> None:
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), head_of(tiny_backbone("bert"))
    assert torch.equal(torch.get_rng_state(), before)
    assert one is not None
    assert torch.equal(one.weight, head_of(tiny_backbone("bert")).weight)  # type: ignore[union-attr]
    assert fresh_head(tiny_backbone("bert_mlm"), 0, torch.Generator()) is None
    assert fresh_head(tiny_backbone("llama"), 3, torch.Generator()) is None


@pytest.mark.parametrize("name", ["bert", "bert_mlm"])
def test_checkpoint_loads_with_its_own_head(name: str, tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    backbone = tiny_backbone(name)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), dtype="float32")
    assert loaded.architecture == "encoder"
    assert loaded.masked_lm == backbone.masked_lm
    assert loaded.checksum() == backbone.checksum()


@pytest.mark.parametrize("name", ["bert", "bert_mlm"])
def test_run_saves_head_and_answers_equal_after_loading(
    name: str, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    """Train, load and answer: the head travels with the prompt."""
    folder = tmp_path / "model"
    tiny_backbone(name).model.save_pretrained(folder)
    tiny_backbone(name).tokenizer.save_pretrained(folder)
    task = ticket_task
    if name == "bert_mlm":  # one mask holds one token
        text = 'template = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n[label_words]\n'
        label_words = "".join(f'{label} = "{word}"\n' for label, word in WHOLE_WORDS.items())
        task = tmp_path / "tickets.toml"
        task.write_text(f"train = {json.dumps(str(ticket_task.parent / 'train.csv'))}\n" + text + label_words)
    training = softprompt.TrainingConfig(steps=4, eval_steps=2, batch_size=4)
    experiment = softprompt.Experiment(
        backbone=str(folder), task=str(task), prompt=DPT(length=4, rank=2), training=training, dtype="float32"
    )
    run = softprompt.train(experiment, out=tmp_path)
    assert (run.folder / "head.safetensors").is_file() == (name == "bert")
    assert not (run.folder / "adapter_config.json").exists()
    rows = [{"text": "a a b"}, {"text": "c"}]
    answers = softprompt.predict(run, rows)
    reloaded = softprompt.predict(softprompt.open_run(run.folder), rows)
    assert answers == reloaded
    assert softprompt.evaluate(run).value == run.results["test"]  # type: ignore[index]
    if name == "bert":
        assert run.results["trainable"] == 4 * 2 + 2 * 32 + 32 * 6 + 6  # type: ignore[index]
        trained = load_file(run.folder / "head.safetensors")
        backbone = load(str(folder), dtype="float32")
        first = build_prompted_model(experiment, run.task, backbone, initialize=False).head
        assert first is not None
        assert not torch.equal(trained["weight"], first.weight)
        asked = experiment.replace(training=softprompt.TrainingConfig(steps=4, zero_shot=True))
        with pytest.raises(ValueError, match="answers through a trained head, so it has no zero-shot answer"):
            softprompt.train(asked, out=tmp_path)


class Stops(Exception):
    pass


class StopAt:
    """A watcher that ends the process's work after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.last = step

    def on_stage(self, text: str) -> None:
        pass

    def on_note(self, text: str) -> None:
        pass

    def on_step(self, progress: softprompt.Progress) -> None:
        if progress.step == self.last:
            raise Stops


def test_resumed_training_continues_with_its_head(
    tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_backbone("bert").model.save_pretrained(folder)
    tiny_backbone("bert").tokenizer.save_pretrained(folder)
    training = softprompt.TrainingConfig(steps=5, eval_steps=2, batch_size=4)
    experiment = softprompt.Experiment(
        backbone=str(folder), task=str(ticket_task), prompt=DPT(length=4, rank=2), training=training, dtype="float32"
    )
    whole = softprompt.train(experiment, out=tmp_path, name="whole")
    with pytest.raises(Stops):
        softprompt.train(experiment, out=tmp_path, name="cut", callback=StopAt(3))
    reloaded = softprompt.resume(tmp_path / "cut")
    for file in ("metrics.jsonl", "softprompt.safetensors", "head.safetensors", "predictions.jsonl"):
        assert (reloaded.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file


@pytest.mark.asset
def test_minilm_pools_like_its_sentence_vectors(tmp_path: Path) -> None:
    """The real checkpoint: with no prompt and the identity as head, it gives the mean of its token states."""
    backbone = load("minilm-l6", dtype="float32")
    assert not backbone.masked_lm
    head = nn.Linear(384, 384, bias=False)
    nn.init.eye_(head.weight)
    texts = ["a good film", "an extremely long and boring film about nothing at all"]
    made = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    ours = attach(backbone, head=head)(made["input_ids"], made["attention_mask"]).logits
    with torch.no_grad():
        states = backbone.model(input_ids=made["input_ids"], attention_mask=made["attention_mask"])[0]
    mask = made["attention_mask"][..., None]
    torch.testing.assert_close(ours, (states * mask).sum(1) / mask.sum(1), rtol=1e-4, atol=1e-5)
