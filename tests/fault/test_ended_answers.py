"""Answers whose text ends with the end of sequence, as fine-tuning tutorials ask for."""

import json
from pathlib import Path

from datasets import Dataset

import softprompt
from softprompt.evaluation.evaluate import score_answers
from softprompt.evaluation.predict import Answer
from softprompt.runs import PREDICTIONS
from softprompt.tasks import Task
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.splits import Splits
from softprompt.training.callbacks import NullCallback


class _Notes(NullCallback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def _train(folder: Path, backbone: Path, end: str) -> tuple[softprompt.runs.Run, list[str]]:
    rows = "".join(f"fine film {n % 7},{'good' if n % 2 else 'bad'}{end}\n" for n in range(40))
    (folder / "rows.csv").write_text("text,answer\n" + rows)
    task = folder / "task.toml"
    task.write_text('train = "rows.csv"\ntemplate = "Review: {text}\\nVerdict:"\ntarget = "answer"\n')
    experiment = softprompt.Experiment(
        backbone=str(backbone),
        task=str(task),
        prompt=softprompt.DPT(rank=2, length=3),
        training=softprompt.TrainingConfig(steps=2, batch_size=4, eval_steps=2, max_new_tokens=3),
        dtype="float32",
    )
    callback = _Notes()
    return softprompt.train(experiment, out=folder / "runs", callback=callback), callback.notes


def test_answers_with_an_end_train_the_same(tmp_path: Path, llama_folder: Path, tiny_backbone: object) -> None:
    results_by_form = {}
    end = tiny_backbone("llama").tokenizer.eos_token  # type: ignore[operator]
    for name, text in (("bare", ""), ("ended", end)):
        (tmp_path / name).mkdir()
        run, notes = _train(tmp_path / name, llama_folder, text)
        metrics = (run.folder / "metrics.jsonl").read_text()
        golds = [json.loads(line)["gold"] for line in (run.folder / PREDICTIONS).read_text().splitlines()]
        results = {key: run.record["results"][key] for key in ("test", "majority", "dev")}
        results_by_form[name] = (metrics, golds, results)
        warnings = [note for note in notes if f"answers end with the tokenizer's own {end}" in note]
        assert len(warnings) == (3 if text else 0)
    assert results_by_form["bare"] == results_by_form["ended"]


def test_golds_and_majority_have_no_end(tiny_backbone: object) -> None:
    tokenizer = tiny_backbone("llama").tokenizer  # type: ignore[operator]
    end = tokenizer.eos_token
    task = Task(name="t", template="{text}", target="answer", metrics=("exact_match",))
    rows = Dataset.from_list([{"text": f"{n}", "answer": ["yes" + end, "yep" + end]} for n in range(20)])
    splits = Splits(
        train=rows,
        dev=rows,
        test=rows,
        fingerprint="",
        full_fingerprint="",
        test_fingerprint="",
        majority="yep" + end,
    )
    examples = [Example((1,), (), None, row) for row in range(2)]
    answers = [Answer(row=0, text="yes"), Answer(row=1, text="yep")]
    score = score_answers(task, splits, "test", examples, answers, tokenizer)
    assert (score.value, score.majority) == (1.0, 1.0)
