"""A decoder's deep prompt against virtual tokens with its keys and values, transformers' own cache, and PEFT."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from softprompt import (
    BPT,
    DPT,
    ULPT,
    Backbone,
    DePT,
    Experiment,
    Interrupted,
    Plain,
    Progress,
    Residual,
    Spectral,
    TrainingConfig,
    attach,
    evaluate,
    load_backbone,
    predict,
    resume,
    train,
)
from softprompt.backbones.kernels import llama
from softprompt.export import FORMATS, export_runs
from softprompt.models.deep_kv import as_deep
from softprompt.prompts import Folded
from softprompt.prompts.deep import Deep, build
from softprompt.runs import build_prompt, open_run, read_prompt
from softprompt.serve import Engine
from softprompt.training.callbacks import NullCallback
from softprompt.training.setup import new_run

MakeBackbone = Callable[[str], Backbone]
IDS = torch.tensor([[2, 2, 5, 6, 7], [8, 9, 10, 11, 12], [2, 2, 2, 2, 13]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


def virtual_tokens(backbone: Backbone, length: int, seed: int = 0) -> Tensor:
    return backbone.host().sample(length, torch.Generator().manual_seed(seed))


def deep_prompt(backbone: Backbone, length: int, seed: int = 0) -> Folded:
    return Folded(as_deep(backbone, virtual_tokens(backbone, length, seed)), num_matrices=backbone.max_matrices)


def test_keys_and_values_of_virtual_tokens_give_their_outputs(decoder: Backbone) -> None:
    backbone = decoder
    shallow = [Folded(virtual_tokens(backbone, length, seed)) for seed, length in enumerate((3, 6))]
    deep = [deep_prompt(backbone, length, seed) for seed, length in enumerate((3, 6))]
    index = torch.tensor([1, 0, 1])
    prompted = attach(backbone, None)
    expected = prompted(IDS, MASK, prompts=shallow, index=index).logits[MASK == 1]
    actual = prompted(IDS, MASK, prompts=deep, index=index).logits[MASK == 1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    candidates = ((20,), (21, 22), (23, 24, 25))
    scores = [prompted.score(IDS, MASK, candidates, prompts, index) for prompts in (shallow, deep)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    texts = [
        torch.stack(list(prompted.generate(IDS, MASK, max_new_tokens=4, prompts=prompts, index=index)))
        for prompts in (shallow, deep)
    ]
    assert torch.equal(texts[0], texts[1])
    assert expected.std() > 1e-3


def reference_losses(
    backbone: Backbone, matrices: Sequence[Tensor], ids: Tensor, mask: Tensor, labels: Tensor
) -> Tensor:
    """Each row alone through the model's own forward, after a cache of its matrix's keys and values."""
    layout, losses = backbone.kv_layout, []
    assert layout is not None
    shape = (1, -1, layout.num_kv_heads, layout.head_dim)
    for matrix, row, real, targets in zip(matrices, ids, mask, labels, strict=True):
        parts = [part.view(shape).transpose(1, 2) for part in matrix.chunk(2 * layout.num_layers)]
        cache = DynamicCache()
        for layer in range(layout.num_layers):
            cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        tokens, wanted = row[real == 1][None], targets[real == 1]
        logits = backbone.model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0]
        losses.append(nn.functional.cross_entropy(logits[:-1], wanted[1:], ignore_index=-100, reduction="sum"))
    return torch.stack(losses)


def test_losses_and_gradients_match_transformers_row_by_row(decoder: Backbone) -> None:
    backbone = decoder
    ids, mask = IDS[:2], MASK[:2]
    labels = torch.where(mask == 1, ids, -100)
    labels[0, 2] = labels[1, :3] = -100
    start = deep_prompt(backbone, 4).prompt()
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    actual = attach(backbone, Folded(ours, num_matrices=backbone.max_matrices)).losses(ids, mask, labels)
    expected = reference_losses(backbone, [theirs, theirs], ids, mask, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weights = torch.tensor([1.0, 0.3])
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert bool((ours.grad.view(backbone.max_matrices, -1).abs().amax(1) > 0).all())


def test_prompts_of_other_lengths_train_in_one_fused_batch(
    tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen failing with gradients of another prompt's rows, of other columns, and without the first layer's."""
    backbone, index = tiny_backbone("llama"), torch.tensor([1, 0, 1, 2])
    ids = torch.tensor([[2, 2, 5, 6, 7], [8, 9, 10, 11, 12], [2, 2, 2, 13, 14], [2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    labels = torch.where(mask == 1, ids, -100)
    starts = [deep_prompt(backbone, length, seed).prompt() for seed, length in enumerate((3, 6, 2))]
    ours, theirs = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    passes: list[int] = []
    run = llama.run

    def counted(*args: Any) -> Tensor:
        passes.append(1)
        return run(*args)

    monkeypatch.setattr(llama, "run", counted)
    prompts = [Folded(matrix, num_matrices=backbone.max_matrices) for matrix in ours]
    actual = attach(backbone, None).losses(ids, mask, labels, prompts=prompts, index=index)
    assert passes, "the rows did not run through our fused layers"
    expected = reference_losses(backbone, [theirs[number] for number in index], ids, mask, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weights = torch.tensor([1.0, 0.3, 0.7, 0.2])
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-3, atol=1e-6)
        assert bool((mine.grad.view(backbone.max_matrices, -1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("config", [Plain(length=4), DPT(length=4, rank=2), DPT(length=4, rank=4, anchor="none")])
def test_deep_prompt_starts_as_the_shallow_one(config: Any, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    start = as_deep(backbone, virtual_tokens(backbone, 4))
    hosts = backbone.hosts(backbone.max_matrices, start=start)
    prompt = build(config, hosts, torch.Generator().manual_seed(0))
    assert prompt.num_matrices == 2 * backbone.model.config.num_hidden_layers
    torch.testing.assert_close(prompt.prompt(), start, rtol=1e-5, atol=1e-5)
    width = backbone.prompt_dim(prompt.num_matrices)
    assert sum(parameter.numel() for parameter in prompt.parameters()) == prompt.num_matrices * config.count(width)


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    training = TrainingConfig(steps=6, batch_size=4, eval_steps=3, lr=0.1, dev_rows=6)
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=5, rank=2),
        depth="deep",
        training=training,
        dtype="float32",
    )


def test_run_of_a_deep_prompt_resumes_evaluates_and_loads_in_peft(
    experiment: Experiment, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    run = train(experiment, out=tmp_path / "runs")
    again = train(experiment.replace(prompt=Plain(length=5)), out=tmp_path / "again")
    assert run.results["trainable"] < again.results["trainable"] == 4 * 5 * 16
    assert evaluate(run).value == run.results["test"]
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] != losses[0]
    backbone = tiny_backbone("llama")
    prompted = open_run(run.folder).prompted(backbone)
    theirs = peft.PeftModel.from_pretrained(backbone.model, str(run.folder))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(prompted(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_deep_run_continues_from_a_checkpoint_to_the_same_bits(experiment: Experiment, tmp_path: Path) -> None:
    whole = train(experiment, out=tmp_path / "whole")

    class Interrupt(NullCallback):
        def on_step(self, progress: Progress) -> None:
            if progress.step == 5:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(experiment, out=tmp_path / "cut", callback=Interrupt())
    [folder] = (tmp_path / "cut").iterdir()
    resumed = resume(folder)
    assert [line["loss"] for line in resumed.metrics()] == [line["loss"] for line in whole.metrics()]
    assert torch.equal(*(one.prompt(one.load_backbone(None)).prompt() for one in (whole, resumed)))


def test_deep_prompt_starts_from_a_shallow_or_a_deep_run(experiment: Experiment, tmp_path: Path) -> None:
    shallow = train(experiment.replace(depth="shallow"), out=tmp_path / "shallow")
    backbone = shallow.load_backbone(None)
    warm = train(experiment.replace(init_prompt=str(shallow.folder)), out=tmp_path / "warm")
    start = as_deep(backbone, shallow.prompt(backbone).prompt().detach())
    initial = build_prompt(warm.experiment, warm.task, backbone, initialize=True)
    torch.testing.assert_close(initial.prompt(), start, rtol=1e-5, atol=1e-5)
    deeper = experiment.replace(init_prompt=str(warm.folder))
    initial = build_prompt(deeper, warm.task, backbone, initialize=True)
    torch.testing.assert_close(initial.prompt(), read_prompt(warm.folder, backbone).prompt(), rtol=1e-5, atol=1e-5)


class Notes(NullCallback):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    "prompt",
    [
        Plain(length=6),
        DPT(length=6, rank=2),
        DPT(length=6, rank=6, anchor="none"),
        Residual(length=6, width=3),
        Residual(length=6, width=3, shared=False, scale=1.0),
        Spectral(length=6),
        BPT(length=6, rank=6),
        BPT(length=6, rank=30),
        BPT(length=6, mode="tuned", through="inputs"),
        ULPT(length=6, rank=64),
    ],
    ids=str,
)
def test_deep_prompt_starts_at_the_shallow_prompts_keys_and_values(prompt: Any, experiment: Experiment) -> None:
    backbone, notes = load_backbone(experiment.backbone, dtype="float32"), Notes()
    made = new_run(experiment.replace(prompt=prompt), backbone, notes)
    assert isinstance(made.prompted.prompt, Deep)
    shallow = build(prompt, [backbone.host(made.task.answers)], torch.Generator().manual_seed(experiment.seed))
    start = as_deep(backbone, shallow.prompt().detach())
    actual = made.prompted.prompt.prompt().detach()
    assert float((actual - start).norm() / start.norm()) < 1e-4
    assert made.prompted.prompt.start_error == pytest.approx(0, abs=1e-4)
    assert not [note for note in notes.said if "represented" in note]


@pytest.mark.parametrize(
    "prompt", [BPT(length=6, rank=2), DPT(length=6, rank=2, anchor="none"), ULPT(length=6, rank=2)], ids=str
)
@pytest.mark.parametrize("warm", [False, True])
def test_note_says_how_far_an_inexact_deep_start_is(
    prompt: Any, warm: bool, experiment: Experiment, tmp_path: Path
) -> None:
    backbone, notes = load_backbone(experiment.backbone, dtype="float32"), Notes()
    asked, source = experiment.replace(prompt=prompt), "a shallow prompt"
    if warm:
        run = train(experiment.replace(depth="shallow", prompt=Plain(length=6)), out=tmp_path, backbone=backbone)
        shallow, source = run.prompt(backbone), str(run.folder)
        asked = asked.replace(init_prompt=source)
    made = new_run(asked, backbone, notes)
    if not warm:
        shallow = build(prompt, [backbone.host(made.task.answers)], torch.Generator().manual_seed(asked.seed))
    start = as_deep(backbone, shallow.prompt().detach())
    assert made.prompted.prompt is not None
    error = float((made.prompted.prompt.prompt().detach() - start).norm() / start.norm())
    assert error > 0.01
    said = f"starting from the keys and values of {source}, represented to a relative error of {error:.3g}"
    assert said in notes.said


def test_demonstrations_are_distilled_into_a_deep_prompt(experiment: Experiment, tmp_path: Path) -> None:
    training = TrainingConfig(steps=20, batch_size=8, eval_steps=20, lr=0.1, dev_rows=6)
    run = train(experiment.replace(demonstrations=6, training=training, prompt=Plain(length=5)), out=tmp_path)
    distilled = run.results["distillation"]
    assert distilled["prompt_tokens"] == 5
    assert distilled["prompt"]["kl"] < distilled["no_context"]["kl"]
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < 0.7 * losses[0]


def test_service_mixes_deep_and_shallow_prompts(experiment: Experiment, tmp_path: Path) -> None:
    deep = train(experiment, out=tmp_path / "deep")
    shallow = train(experiment.replace(depth="shallow"), out=tmp_path / "shallow")
    backbone = deep.load_backbone(None)
    with Engine(backbone) as engine:
        for name, run in (("deep", deep), ("shallow", shallow)):
            engine.add(name, run.folder)
        texts = ["aaa", "b", "cc dd"]
        for name, run in (("deep", deep), ("shallow", shallow)):
            requests = [request for text in texts for request in engine.classify(name, [text])]
            for request, expected in zip(requests, predict(run, texts, backbone=backbone), strict=True):
                probabilities = torch.tensor(request.result(30.0).logprobs).softmax(0)
                assert probabilities.tolist() == pytest.approx(list(expected.probabilities.values()), abs=1e-5)


def test_deep_prompts_are_refused_where_they_do_not_fit(
    experiment: Experiment, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    for part in (tiny_backbone("t5").model, tiny_backbone("t5").tokenizer):
        part.save_pretrained(tmp_path / "t5")
    cases = {
        "a vision model, or a decoder": experiment.replace(backbone=str(tmp_path / "t5")),
        "come before the text": experiment.replace(prompt_position="suffix"),
        "no deep form": experiment.replace(prompt=DePT(length=4, rank=2)),
    }
    for message, refused in cases.items():
        with pytest.raises(ValueError, match=message):
            train(refused, out=tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    backbone = tiny_backbone("llama")
    mixed = [deep_prompt(backbone, 3), Folded(virtual_tokens(backbone, 3))]
    with pytest.raises(ValueError, match="run each kind on its own"):
        attach(backbone, None)(IDS, MASK, prompts=mixed, index=torch.tensor([0, 1, 0]))
    run = train(experiment, out=tmp_path / "runs")
    for form in ("vllm", "vocab", "gguf", "llamacpp", "trtllm"):
        with pytest.raises(ValueError, match="this prompt is deep"):
            export_runs([run], FORMATS[form], tmp_path / form)
        assert not (tmp_path / form).exists()
    for form in ("peft", "npz"):
        export_runs([run], FORMATS[form], tmp_path / form)
