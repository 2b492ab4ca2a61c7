"""Runs of an anchored DPT: files on disk suffice to resume, move and use them."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import WHOLE_WORDS
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    attach,
    evaluate,
    load_backbone,
    open_run,
    predict,
    resume,
    train,
)
from softprompt.analysis.rank import Truncation, functional_rank, load_prompts, measure
from softprompt.prompts import Folded, PromptConfig
from softprompt.prompts.deep import build
from softprompt.prompts.dpt import AnchoredPrompt
from softprompt.runs import build_prompted_model
from softprompt.serve.prompts.entry import from_folder
from softprompt.training import setup
from softprompt.training.callbacks import NullCallback

MakeBackbone = Callable[[str], Backbone]
SAME = ("metrics.jsonl", "softprompt.safetensors", "adapter_model.safetensors", "predictions.jsonl")
PROMPTS: dict[str, PromptConfig] = {
    "vocab": DPT(length=6, rank=2),
    "text": DPT(length=6, rank=2, anchor="text", init_text="ab"),
    "label_words": DPT(length=10, rank=2, anchor="label_words"),
    "gradient": DPT(length=6, rank=2, factor_init="gradient", gradient_batches=2),
    "bpt": BPT(length=6, rank=2, init="gradient", gradient_batches=2),
}
prompts = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=6, rank=2),
        training=TrainingConfig(steps=4, batch_size=8, eval_steps=2, lr=0.1),
        dtype="float32",
    )


@pytest.fixture(scope="module")
def backbone(llama_folder: Path) -> Backbone:
    return load_backbone(str(llama_folder), dtype="float32")


def tensors(run: Run) -> dict[str, Tensor]:
    return load_file(run.folder / "softprompt.safetensors")


def assert_same(run: Run, reference: Run) -> None:
    for name in SAME:
        assert (run.folder / name).read_bytes() == (reference.folder / name).read_bytes(), f"{name} of {run.name}"


def trainable(run: Run) -> int:
    assert run.results is not None
    return int(run.results["trainable"])


@prompts
def test_run_trains_the_factors_and_is_used_folded(
    prompt: PromptConfig, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    run = train(experiment.replace(prompt=prompt), out=tmp_path, backbone=backbone)
    assert trainable(run) == prompt.count(32) == 2 * (prompt.length + 32)
    live, matrix = run.prompt(backbone), load_file(run.folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(live.prompt(), matrix)
    assert run.results is not None
    assert evaluate(open_run(run.folder)).value == run.results["test"]
    prompt_entry = from_folder("one", run.folder, backbone)
    assert torch.equal(prompt_entry.prompt.prompt(), matrix)
    rows = [{"text": "a a b"}, {"text": "c"}]
    shutil.move(run.folder, tmp_path / "elsewhere")
    assert predict(open_run(tmp_path / "elsewhere"), rows) == predict(open_run(tmp_path / "elsewhere"), rows)


@prompts
def test_finished_prompt_needs_neither_seed_nor_gradient(
    prompt: PromptConfig, experiment: Experiment, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(experiment.replace(prompt=prompt), out=tmp_path, backbone=backbone)
    expected = run.prompt(backbone).prompt()
    record = json.loads((run.folder / "softprompt.json").read_text())
    record["experiment"]["seed"] = 99
    (run.folder / "softprompt.json").write_text(json.dumps(record))

    def fails(*start_matrix: Any) -> Any:
        raise AssertionError("the gradient was computed")

    monkeypatch.setattr(setup, "gradient_on", fails)
    reopened = open_run(run.folder)
    assert reopened.experiment.seed == 99
    assert torch.equal(reopened.prompt(backbone).prompt(), expected)
    reattached = reopened.prompted(backbone)
    assert reattached.prompt is not None
    assert torch.equal(reattached.prompt.prompt(), expected)


@prompts
@pytest.mark.parametrize("at", [1, 3])
def test_stopped_run_resumes_to_the_same_bits(
    prompt: PromptConfig, at: int, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = experiment.replace(prompt=prompt)
    reference = train(variant, out=tmp_path, name="whole")

    def step(_: object, progress: Progress) -> None:
        if progress.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(NullCallback, "on_step", step)
        with pytest.raises(Interrupted):
            train(variant, out=tmp_path, name="stopped")
    assert_same(resume(tmp_path / "stopped"), reference)


def test_run_without_checkpoint_recomputes_its_gradient(experiment: Experiment, tmp_path: Path) -> None:
    variant = experiment.replace(prompt=PROMPTS["gradient"])
    reference = train(variant, out=tmp_path, name="whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    record = json.loads((reference.folder / "softprompt.json").read_text())
    (bare / "softprompt.json").write_text(json.dumps({**record, "results": None}))
    assert_same(resume(bare), reference)


@pytest.mark.parametrize("prompt", [PROMPTS["vocab"], PROMPTS["gradient"], DPT(length=6, rank=1)])
def test_init_prompt_is_represented_exactly(
    prompt: DPT, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    first = train(experiment.replace(prompt=Plain(length=6)), out=tmp_path, name="first", backbone=backbone)
    start_matrix = first.prompt(backbone).prompt()
    assert torch.linalg.matrix_rank(start_matrix) == 6
    started = experiment.replace(
        init_prompt=str(first.folder), prompt=prompt, training=TrainingConfig(steps=2, eval_steps=1)
    )
    notes: list[str] = []

    class Notes(NullCallback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    run = train(started, out=tmp_path, name="again", backbone=backbone, callback=Notes())
    assert any(note.endswith("represented to a relative error of 0") for note in notes), notes
    assert torch.equal(tensors(run)["anchor"], start_matrix)
    shutil.rmtree(first.folder)  # a finished run holds a copy of what it started from
    assert torch.equal(open_run(run.folder).prompt(backbone).prompt(), run.prompt(backbone).prompt())
    assert evaluate(open_run(run.folder)).n > 0


@pytest.mark.parametrize("missing", ["anchor", "first_left", "first_right"])
def test_file_without_frozen_tensors_is_refused(
    missing: str, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    run = train(experiment, out=tmp_path, backbone=backbone)
    reference = tensors(run)
    for damaged in (
        {name: tensor for name, tensor in reference.items() if name != missing},
        reference | {missing: reference[missing][:, :-1].contiguous()},
        reference | {missing: torch.full_like(reference[missing], torch.nan)},
    ):
        save_file(damaged, run.folder / "softprompt.safetensors")
        with pytest.raises(ValueError, match=r"softprompt\.safetensors holds .*damaged"):
            run.prompt(backbone)


def test_frozen_tensors_do_not_change(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    run = train(experiment, out=tmp_path, backbone=backbone)
    first = build_prompted_model(experiment, run.task, backbone, initialize=True).prompt
    assert isinstance(first, AnchoredPrompt)
    assert torch.equal(first.prompt(), first.anchor)
    trained_tensors = tensors(run)
    for name, tensor in first.named_buffers():
        assert torch.equal(trained_tensors[name], tensor), name
    for name, parameter in first.named_parameters():
        assert not torch.equal(trained_tensors[name], parameter), name


@pytest.mark.parametrize("name", ["vocab", "label_words", "gradient"])
def test_update_rank_is_measured_from_the_anchor(
    name: str, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    run = train(experiment.replace(prompt=PROMPTS[name]), out=tmp_path, backbone=backbone)
    [loaded] = load_prompts(run.folder, checkpoints=True)
    assert loaded.start is not None
    assert torch.equal(loaded.start, tensors(run)["anchor"])
    assert torch.equal(loaded.history[0], loaded.start)
    functional = functional_rank(loaded, Truncation(part="update", split="train", rows=0))
    assert [cut.rank for cut in functional.truncations] == [0, 1, 2, 3, 4]  # at most twice the rank
    assert functional.truncations[-1].score == functional.full
    assert (
        functional.truncations[0].score
        == functional_rank(
            dataclasses.replace(loaded, prompt=Folded(loaded.start)),
            Truncation(ranks=(len(loaded.start),), split="train", rows=0),
        ).full
    )
    [measured] = measure(run.folder)
    assert measured.spectra["prompt"].numerical >= 6
    assert measured.spectra["update"].numerical == 4


def test_gradient_init_is_recomputed_for_the_update(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    run = train(experiment.replace(prompt=PROMPTS["bpt"]), out=tmp_path, backbone=backbone)
    gradient = setup.gradient_on(run.experiment, run.task, backbone, setup.read_splits(run.experiment, run.task).train)
    first = build_prompted_model(run.experiment, run.task, backbone, initialize=True, gradient=gradient).prompt
    assert first is not None
    [loaded] = load_prompts(run.folder)
    assert loaded.start is not None
    assert torch.equal(loaded.start, first.prompt())


@pytest.mark.parametrize("name", ["t5", "bert_mlm", "bert", "gpt2"])
@pytest.mark.parametrize("prompt_name", ["vocab", "gradient"])
def test_architecture_starts_from_an_anchor(
    name: str, prompt_name: str, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_backbone(name).model.save_pretrained(folder)
    tiny_backbone(name).tokenizer.save_pretrained(folder)
    file = tmp_path / "tickets.toml"
    lines = "".join(f'{label} = "{label_word}"\n' for label, label_word in WHOLE_WORDS.items())
    rows = f'train = "{ticket_task.parent / "train.csv"}"\n'
    file.write_text(rows + 'template = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n[label_words]\n' + lines)
    experiment = Experiment(
        backbone=str(folder),
        task=str(file),
        prompt=PROMPTS[prompt_name],
        training=TrainingConfig(steps=2, batch_size=4, eval_steps=1),
        dtype="float32",
    )
    run = train(experiment, out=tmp_path / "runs")
    assert run.results is not None
    assert evaluate(open_run(run.folder)).value == run.results["test"]
    assert torch.linalg.matrix_rank(tensors(run)["anchor"]) == 6


def test_deep_prompt_has_an_anchor_per_layer(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("vit").with_sample_images(
        torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    )
    config = DPT(length=4, rank=2)
    deep = build(config, backbone.hosts(3), torch.Generator().manual_seed(0))
    rows = build(Plain(length=4, scale=1.0), backbone.hosts(3), torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in deep.parameters()) == 3 * config.count(32)
    samples = backbone.hosts(3)
    for layer, (trained_tensors, host) in enumerate(zip(deep.prompt().chunk(3), samples, strict=True)):
        assert all(bool((row == host.embedding).all(1).any()) for row in trained_tensors), layer
    assert rows.num_matrices == deep.num_matrices == 3
    start_matrix = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(build(config, backbone.hosts(3, start=start_matrix), torch.Generator()).prompt(), start_matrix)
    assert torch.equal(deep.fold().prompt(), deep.prompt())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training": TrainingConfig(shard=True)}, "start from the gradient and shard is on"),
    ({"prompt": DPT(length=6, rank=2, anchor="text", init_text="a text that is far too long")}, "so its end would be"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_impossible_init_is_refused_before_the_folder(
    changes: dict[str, Any], message: str, experiment: Experiment, tmp_path: Path
) -> None:
    variant = experiment.replace(**{"prompt": PROMPTS["gradient"], **changes})
    with pytest.raises(ValueError, match=message):
        train(variant, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_deep_gradient_init_is_refused_before_the_folder(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    from PIL import Image

    photos = tmp_path / "photos"
    for label in ("a", "b"):
        (photos / label).mkdir(parents=True)
        for number in range(12):
            Image.effect_noise((32, 32), 9 + 30 * number).convert("RGB").save(photos / label / f"{number}.png")
    training = TrainingConfig(steps=2, batch_size=4, eval_steps=2)
    variant = Experiment(
        backbone="vit", task=str(photos), prompt=DPT(length=3, rank=1, factor_init="gradient"), training=training
    )
    backbone = tiny_backbone("vit")
    with pytest.raises(ValueError, match="gradient initialization needs a shallow prompt"):
        train(variant.replace(depth="deep"), out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()
    run = train(variant, out=tmp_path / "runs", backbone=backbone)
    assert torch.linalg.matrix_rank(tensors(run)["anchor"]) == 3


def test_build_without_gradient_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="gradient initialization needs a shallow prompt"):
        attach(backbone, DPT(length=6, rank=2, factor_init="gradient").build(backbone.host(), torch.Generator()))
