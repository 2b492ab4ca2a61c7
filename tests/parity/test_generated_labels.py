"""`evaluate(generate=True)`: label words in freely generated text, against transformers' own `generate`, row by row."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt import Backbone, Experiment, Plain, Run, TrainingConfig, evaluate, train
from softprompt.evaluation.evaluate import run_splits
from softprompt.tasks.data.tokenize import answer_ids, encode
from softprompt.tasks.user import load_task

MakeBackbone = Callable[[str], Backbone]
TRAINING = TrainingConfig(steps=1, eval_steps=1, dev_rows=2, max_new_tokens=2)


@pytest.fixture(scope="module", params=["llama", "t5"])
def run(
    request: pytest.FixtureRequest,
    tiny_backbone: MakeBackbone,
    ticket_task: Path,
    one_token_task: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A run that writes a label word for some rows.

    The decoder has learned a little of label words of several tokens. The T5 has not, so label words of one token are
    made more likely than its other tokens.
    """
    folder = tmp_path_factory.mktemp("generated")
    backbone = tiny_backbone(request.param)
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(folder / "model")
    task, training = ticket_task, TRAINING
    if request.param == "t5":
        task, model = one_token_task, type(backbone.model).from_pretrained(folder / "model")
        with torch.no_grad():
            words = answer_ids(load_task(str(task)), backbone.tokenizer)
            model.get_output_embeddings().weight[[word[0] for word in words]] *= 3
        model.save_pretrained(folder / "model")
    else:
        training = TrainingConfig(steps=60, eval_steps=60, batch_size=8, lr=1.0, vocabulary_weight=1.0)
    prompt = Plain(length=6)
    experiment = Experiment(
        backbone=str(folder / "model"), task=str(task), prompt=prompt, training=training, dtype="float32"
    )
    return train(experiment, out=folder / "runs")


def reference(run: Run) -> tuple[list[bool], list[bool]]:
    """Whether each row's text begins with a label word, and with its own, from `model.generate` on the row alone."""
    backbone = run.load_backbone(None)
    prompted = run.prompted(backbone)
    prompt = prompted.prompt.prompt().detach()  # type: ignore[union-attr]
    rows = encode(run.task, backbone.tokenizer, run_splits(run).test, 512, appends_eos=prompted.appends_eos)[0]
    words = answer_ids(run.task, backbone.tokenizer)
    length = max(map(len, words))
    begins, correct = [], []
    for row in rows:
        embeds = torch.cat([prompt, backbone.model.get_input_embeddings()(torch.tensor(row.input_ids))])[None]
        ids = backbone.model.generate(inputs_embeds=embeds, max_new_tokens=length, do_sample=False)[0].tolist()
        text = ids[1:] if backbone.architecture == "encoder_decoder" else ids
        match = [index for index, word in enumerate(words) if tuple(text[: len(word)]) == word]
        begins.append(bool(match))
        correct.append(match == [row.label])
    return begins, correct


def test_generated_labels_match_single_rows(run: Run) -> None:
    score = evaluate(run, generate=True)
    begins, correct = reference(run)
    assert 0 < sum(correct) <= sum(begins)
    assert score.extra_metrics["label_word_rate"] == pytest.approx(sum(begins) / len(begins))
    assert score.extra_metrics["generated_accuracy"] == pytest.approx(sum(correct) / len(begins))
    assert "label_word_rate" not in evaluate(run).extra_metrics


def test_generate_is_refused_without_label_words_to_look_for(
    tiny_backbone: MakeBackbone, ticket_task: Path, llama_folder: Path, tmp_path: Path
) -> None:
    file, rows = tmp_path / "texts.toml", ticket_task.parent / "train.csv"
    file.write_text(f'train = "{rows}"\ntemplate = "{{text}}"\ntarget = "queue"\nmetrics = ["exact_match"]\n')
    experiment = Experiment(backbone=str(llama_folder), task=str(file), prompt=Plain(length=2), training=TRAINING)
    with pytest.raises(ValueError, match="generated anyway; leave it out"):
        evaluate(train(experiment, out=tmp_path / "runs"), generate=True)
    for part in (tiny_backbone("bert").model, tiny_backbone("bert").tokenizer):
        part.save_pretrained(tmp_path / "bert")
    experiment = experiment.replace(backbone=str(tmp_path / "bert"), task=str(ticket_task))
    with pytest.raises(ValueError, match="does not generate text; leave it out, or use a decoder"):
        evaluate(train(experiment, out=tmp_path / "runs"), generate=True)
