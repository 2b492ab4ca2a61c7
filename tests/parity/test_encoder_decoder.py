"""A prompt in an encoder is concatenation: the same logits, losses, scores, tokens and gradients, whatever the padding.

The reference is a row at a time: the prompt's vectors in front of the text's own, without mask, padding or cache.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from cases import assert_same_gradients, padded, prompts_of, rows_of
from torch import Tensor, nn

import softprompt
from softprompt.backbones.backbone import Backbone, _check_embeddings
from softprompt.evaluation.evaluate import read_splits
from softprompt.models import PromptedModel, Sampling, attach
from softprompt.prompts import Folded, SoftPrompt
from softprompt.prompts.plain import Plain
from softprompt.runs import build_prompted_model
from softprompt.tasks.data.collate import schedule
from softprompt.tasks.data.tokenize import encode

NAMES = ("t5", "t5_1.1", "mt5", "bart", "bart_forced", "marian")
TEXTS, INDEX = (7, 2, 4, 9, 3), (2, 0, 1, 0, 2)
CANDIDATES = ((11,), (12, 13), (12, 13, 14))
MakeBackbone = Callable[[str], Backbone]


@pytest.fixture(params=NAMES)
def backbone(request: pytest.FixtureRequest, tiny_backbone: MakeBackbone) -> Backbone:
    return tiny_backbone(request.param)


def single_row(backbone: Backbone, prompt: SoftPrompt | None, text: Tensor, decoder_ids: Sequence[int]) -> Tensor:
    """The decoder's logits for one row whose encoder reads plainly concatenated vectors."""
    embeds = backbone.model.get_input_embeddings()(text)[None]
    if prompt is not None:
        own = prompt.shift(embeds, text[None], torch.arange(len(text))[None])
        embeds = torch.cat([prompt.prompt()[None], own], 1)
    return backbone.model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([list(decoder_ids)])).logits[0]


def close(ours: Tensor, reference: Tensor) -> None:
    """Equal but for float32 sums over other shapes, which grow with the largest term."""
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=2e-5 * max(1.0, float(reference.abs().max())))


def start_of(backbone: Backbone) -> int:
    return int(backbone.model.config.decoder_start_token_id)


@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("right", 0), ("left", 1), ("right", 40), ("left", 40)])
def test_logits_loss_and_gradients_match_concatenation(backbone: Backbone, side: str, extra: int) -> None:
    prompts, rows, prompted = prompts_of(backbone), rows_of(TEXTS), attach(backbone)
    ids, mask = padded(rows, side, extra)
    answers = rows_of((3, 1, 2, 4, 2), seed=7)
    labels = nn.utils.rnn.pad_sequence(answers, True, -100)
    actual = prompted(ids, mask, labels, prompts=prompts, index=torch.tensor(INDEX))
    losses, logits = [], []
    for text, answer, number in zip(rows, answers, INDEX, strict=True):
        own = single_row(backbone, prompts[number], text, [start_of(backbone), *answer[:-1].tolist()])
        losses.append(nn.functional.cross_entropy(own, answer, reduction="none"))
        logits.append(own)
    loss = torch.cat(losses).mean()
    for row, (own, answer) in enumerate(zip(logits, answers, strict=True)):
        close(actual.logits[row, : len(answer)], own)
    close(actual.loss, loss)
    parameters = [parameter for prompt in prompts for parameter in prompt.parameters()]
    assert_same_gradients(actual.loss, loss, parameters)


def test_bare_encoder_decoder_is_the_model(backbone: Backbone) -> None:
    rows = rows_of(TEXTS)
    ids, mask = padded(rows, "left", 5)
    logits = attach(backbone)(ids, mask).logits
    for row, text in enumerate(rows):
        whole = backbone.model(input_ids=text[None], decoder_input_ids=torch.tensor([[start_of(backbone)]])).logits[0]
        close(logits[row], whole)


@pytest.mark.parametrize("candidates", [CANDIDATES, CANDIDATES[:1], ((11,), (12,))])
def test_scores_are_log_likelihoods_with_eos(backbone: Backbone, candidates: Sequence[Sequence[int]]) -> None:
    prompts, rows, prompted = prompts_of(backbone), rows_of(TEXTS), attach(backbone)
    ids, mask = padded(rows, "left", 3)
    scores = prompted.score(ids, mask, candidates, prompts=prompts, index=torch.tensor(INDEX))
    forced = backbone.model.generation_config.forced_bos_token_id
    lead = [start_of(backbone)] + ([] if forced is None else [forced])
    assert (backbone.source == "bart_forced") == (forced is not None)
    for row, (text, number) in enumerate(zip(rows, INDEX, strict=True)):
        for column, candidate in enumerate(candidates):
            answer = [*candidate, 1]
            logp = single_row(backbone, prompts[number], text, [*lead, *answer[:-1]]).log_softmax(-1)[len(lead) - 1 :]
            slow = logp[torch.arange(len(answer)), torch.tensor(answer)].sum()
            close(scores[row, column], slow)


def test_loss_of_target_is_minus_its_score(backbone: Backbone) -> None:
    if backbone.model.generation_config.forced_bos_token_id is not None:
        pytest.skip("a forced first token is in the target's loss and not in its score")
    prompt, prompted = prompts_of(backbone)[1], attach(backbone)
    ids, mask = padded(rows_of((5,)), "left", 0)
    target = prompted.target((12, 13))
    assert target == (12, 13, 1)
    assert prompted.target(target) == target
    loss = prompted(ids, mask, torch.tensor([target]), prompts=[prompt]).loss
    score = prompted.score(ids, mask, [(12, 13)], prompts=[prompt])
    close(-loss * len(target), score[0, 0])


def test_forced_bos_is_in_targets_and_generations(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("bart_forced")
    prompted = attach(backbone)
    assert prompted.target((12,)) == (0, 12, 1)
    assert prompted.target((0, 12, 1)) == (0, 12, 1)
    ids, mask = padded(rows_of(TEXTS), "left", 0)
    assert next(prompted.generate(ids, mask)).tolist() == [0] * len(ids)


def run(prompted: PromptedModel, ids: Tensor, mask: Tensor, **settings: object) -> Tensor:
    return torch.stack(list(prompted.generate(ids, mask, **settings)), 1)  # type: ignore[arg-type]


def theirs(backbone: Backbone, prompt: SoftPrompt, text: Tensor, **settings: object) -> Tensor:
    embeds = backbone.model.get_input_embeddings()(text)[None]
    own = prompt.shift(embeds, text[None], torch.arange(len(text))[None])
    whole = torch.cat([prompt.prompt()[None], own], 1)
    return backbone.model.generate(inputs_embeds=whole, max_new_tokens=8, do_sample=False, **settings)[0, 1:]


@torch.no_grad()
def test_greedy_generation_matches_transformers(backbone: Backbone) -> None:
    prompts, rows = prompts_of(backbone), rows_of(TEXTS)
    ids, mask = padded(rows, "left", 2)
    # An end that comes up, so that rows finish at other steps.
    settings = {"max_new_tokens": 8, "prompts": prompts, "index": torch.tensor(INDEX)}
    end = int(run(attach(backbone), ids, mask, stop=[], **settings)[0, 3])
    ours = run(attach(backbone), ids, mask, stop=[end], **settings)
    for row, (text, number) in enumerate(zip(rows, INDEX, strict=True)):
        expected = theirs(backbone, prompts[number], text, num_beams=1, eos_token_id=end)
        got = ours[row].tolist()
        assert got[: len(expected)] == expected.tolist()
        assert all(token == end for token in got[len(expected) :])


@torch.no_grad()
def test_sampling_follows_distribution_and_seed(tiny_backbone: MakeBackbone) -> None:
    prompted = attach(tiny_backbone("t5"), prompts_of(tiny_backbone("t5"))[0])
    ids, mask = padded(rows_of((5,)), "left", 0)
    ids, mask = ids.expand(400, -1), mask.expand(400, -1)
    draws = [run(prompted, ids, mask, max_new_tokens=1, sampling=Sampling(temperature=4.0, seed=s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    probabilities = (prompted(ids[:1], mask[:1]).logits[0, 0] / 4).softmax(-1)
    likeliest = int(probabilities.argmax())
    share, probability = float((draws[0] == likeliest).float().mean()), float(probabilities[likeliest])
    assert (
        abs(share - probability) < 4 * (probability * (1 - probability) / 400) ** 0.5
    )  # four standard errors of 400 draws


def test_prepared_prompts_match_live_prompts(backbone: Backbone) -> None:
    prompts, prompted = prompts_of(backbone), attach(backbone)
    ids, mask = padded(rows_of(TEXTS), "left", 0)
    index = torch.tensor(INDEX)
    prepared = prompted.prepare(prompts)
    for _ in range(2):
        reloaded = prompted.score(ids, mask, CANDIDATES, prompts=prepared, index=index)
        assert torch.equal(reloaded, prompted.score(ids, mask, CANDIDATES, prompts=prompts, index=index))


def test_ids_and_embeddings_agree_with_scaled_embedding(tiny_backbone: MakeBackbone) -> None:
    for name in NAMES:
        _check_embeddings(tiny_backbone(name))
    assert tiny_backbone("bart").model.get_input_embeddings().embed_scale > 1


def test_marian_scaling_after_embedding_is_refused(tiny_backbone: MakeBackbone) -> None:
    config = transformers.MarianConfig.from_dict(tiny_backbone("marian").model.config.to_dict())
    config.scale_embedding = True
    model = transformers.MarianMTModel(config)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 20  # as large as trained ones
    with pytest.raises(ValueError, match=r"scaled \(marian\) gives other outputs for embeddings than for their ids"):
        _check_embeddings(Backbone(model, None, "scaled", "scaled", "encoder_decoder"))


def test_encoder_attending_to_padding_is_refused(tiny_backbone: MakeBackbone) -> None:
    config = tiny_backbone("t5").model.config
    model = transformers.T5ForConditionalGeneration(config)
    # Attention by blocks lets the padding change a row; the plainest such encoder shifts by the row's width.
    model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, out: out.__class__(last_hidden_state=out[0] + kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    backbone = Backbone(model, tiny_backbone("t5").tokenizer, "blocks", "blocks", "encoder_decoder")
    with pytest.raises(ValueError, match=r"blocks \(t5\) gives different logits with padding after the row"):
        attach(backbone)


@pytest.mark.parametrize("name", ["t5", "bart_forced"])
@pytest.mark.parametrize("objective", ["vocabulary", "candidates", "texts"])
def test_run_trains_and_answers(
    name: str, objective: str, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    """The whole path: the text closed, the answer apart and ended; a first loss that the slow way gives too."""
    folder, backbone = tmp_path / "model", tiny_backbone(name)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    task = tmp_path / "tickets.toml"
    answer = 'target = "queue"\nmetrics = ["exact_match"]' if objective == "texts" else 'label = "queue"'
    data = json.dumps(str(ticket_task.parent / "train.csv"))
    task.write_text(f'train = {data}\ntemplate = "Ticket: {{text}}\\nQueue:"\n{answer}\n')
    training = softprompt.TrainingConfig(
        steps=2, eval_steps=2, batch_size=4, vocabulary_weight=0.0 if objective == "candidates" else 1.0
    )
    experiment = softprompt.Experiment(
        backbone=str(folder), task=str(task), prompt=Plain(length=3), training=training, dtype="float32"
    )
    run = softprompt.train(experiment, out=tmp_path)
    assert (run.folder / "adapter_config.json").is_file()
    assert softprompt.predict(run, [{"text": "a a b"}]) == softprompt.predict(run, [{"text": "a a b"}])
    if objective == "candidates":
        return
    prompted = build_prompted_model(experiment, run.task, backbone, initialize=False)
    table = read_splits(experiment, run.task).train
    examples = encode(run.task, backbone.tokenizer, table, 512, appends_eos=True)[0]
    batch = next(schedule([len(example.input_ids) for example in examples], 4, 0))[1]
    losses = []
    for example in (examples[position] for position in batch):
        assert example.input_ids[-1] == 1
        target = torch.tensor(prompted.target(example.answer_ids))
        assert target[-1] == 1
        assert (target[0] == 0) == (name == "bart_forced")
        decoder_ids = [start_of(backbone), *target[:-1].tolist()]
        own = single_row(backbone, prompted.prompt, torch.tensor(example.input_ids), decoder_ids)
        losses.append(nn.functional.cross_entropy(own, target, reduction="none"))
    first = next(iter(run.metrics()))["loss"]
    close(torch.tensor(first), torch.cat(losses).mean().detach())


def test_wrong_input_is_refused_by_name(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("bart")
    prompted, (ids, mask) = attach(backbone), padded(rows_of(TEXTS), "left", 0)
    labels = torch.full((5, 2), 7)
    labels[1, 0] = -100
    with pytest.raises(ValueError, match="labels have -100 before a token"):
        prompted(ids, mask, labels)
    with pytest.raises(ValueError, match="no row has a label"):
        prompted(ids, mask, torch.full((5, 2), -100))
    with pytest.raises(ValueError, match=r"candidates are \[\[\]\]; give at least one"):
        prompted.score(ids, mask, [[]])
    with pytest.raises(ValueError, match="a row has 257 positions with its prompt and answer, but bart has 256"):
        prompted(ids, mask, prompts=[Folded(torch.zeros(248, 32))])
    with pytest.raises(ValueError, match="an answer of 300 tokens does not fit the 256 positions of bart"):
        next(prompted.generate(ids, mask, max_new_tokens=300))
    with pytest.raises(ValueError, match="the prompt is 16 wide, but bart embeds in 32"):
        prompted(ids, mask, prompts=[Folded(torch.zeros(3, 16))])
    prefix = attach(tiny_backbone("llama")).prepare([Folded(torch.zeros(3, 32))])
    with pytest.raises(ValueError, match="was prepared for another architecture"):
        prompted(ids, mask, prompts=prefix)
    with pytest.raises(ValueError, match="answers in words and takes no head"):
        attach(backbone, head=nn.Linear(2, 2))
