"""Time to train to a given development score, compared with transformers' Trainer and PEFT.

    python benchmarks/whole_run.py [--target 0.8] [--steps 100] [--length 100] [--dtype float32] [--rounds 1]

The task is `sentiment` (rotten-tomatoes). Both sides use the same weights, tokenized rows, dtype, initial prompt,
schedule and development rows, and train on the answer's cross-entropy over the vocabulary. Our side is
`softprompt.train`; the peer is transformers' Trainer with PEFT's prompt tuning, with rows grouped by length and padded
to the longest row of the batch. softprompt trains a prompt in units of its scale, PEFT in raw units, so the peer's
learning rate is ours times that scale: with Adam the same step. Each side runs in its own process until an evaluation
reaches the target. `s` is the time since the process started, with imports, loading, tokenization and evaluations;
`training_s` is the part after the first step began. Each side draws its own order of rows, so they may reach the target
at different steps: `steps` is that step, `per_step` the speedup per step, and `speedup_of_sums` the ratio of the
seconds summed over rounds, which depends least on the luck of one seed.

The last line of stdout is JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import tyro

BACKBONE, TASK = "smollm2-135m", "sentiment"


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by both sides."""

    target: float = 0.8
    """Development accuracy at which a side stops."""
    steps: int = 100
    """Maximum number of steps; the learning rate schedule spans them."""
    eval_steps: int = 20
    """Steps between two evaluations."""
    batch_size: int = 16
    """Rows per step."""
    length: int = 100
    """Virtual tokens."""
    lr: float = 0.03
    """Peak learning rate, in units of the prompt's scale."""
    dev_rows: int = 200
    """Development rows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The backbone's dtype."""
    rounds: int = 1
    """How often each side is started, alternating; each round has its own seed."""

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target is {self.target}; it is an accuracy, between 0 and 1")


class TargetReached(Exception):
    """An evaluation reached the target."""


class Clock:
    """Records the score and the time of every evaluation."""

    def __init__(self, target: float, start: float) -> None:
        self.target, self.start, self.first_step = target, start, 0.0
        self.evaluations: list[tuple[int, float, float]] = []

    def begin(self) -> None:
        """Record the start of the first step."""
        self.first_step = self.first_step or time.time()

    def note(self, step: int, score: float) -> None:
        """Record an evaluation.

        Raises:
            TargetReached: the score is at least the target.
        """
        self.evaluations.append((step, score, time.time() - self.start))
        print(f"step {step}: {score:.3f} after {self.evaluations[-1][2]:.0f} s", file=sys.stderr)
        if score >= self.target:
            raise TargetReached


def experiment(settings: Settings, seed: int) -> Any:
    """The experiment of our side."""
    from softprompt import Experiment, TrainingConfig
    from softprompt.prompts.plain import Plain

    training = TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, eval_steps=settings.eval_steps,
        dev_rows=settings.dev_rows, test_rows=1, vocabulary_weight=1.0,
    )  # fmt: skip
    return Experiment(
        backbone=BACKBONE, task=TASK, prompt=Plain(length=settings.length), training=training, seed=seed,
        dtype=settings.dtype,
    )  # fmt: skip


def ours(settings: Settings, seed: int, clock: Clock) -> None:
    """Our side: `softprompt.train`."""
    from softprompt import train
    from softprompt.training.callbacks import Progress

    class Watch:
        evaluated: Any = None

        def on_stage(self, text: str) -> None:
            if text.startswith("training"):
                clock.begin()

        def on_note(self, text: str) -> None:
            """Ignore the note."""

        def on_step(self, progress: Progress) -> None:
            if progress.dev is not None and progress.dev is not self.evaluated:
                self.evaluated = progress.dev
                clock.note(progress.step, progress.dev.value)

    with tempfile.TemporaryDirectory() as folder:
        train(experiment(settings, seed), out=folder, callback=Watch())


def peft(settings: Settings, seed: int, clock: Clock) -> None:
    """The peer: a PEFT model in transformers' Trainer."""
    import torch
    import transformers
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    from softprompt import load_backbone, load_task
    from softprompt.evaluation.evaluate import read_splits, sample_examples
    from softprompt.tasks.data.tokenize import answer_ids, encode

    config = experiment(settings, seed)
    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    backbone.model.set_attn_implementation("sdpa")  # transformers' default; attach() installs our own
    task = load_task(TASK)
    rows = read_splits(config, task)
    answers = torch.tensor([ids for (ids,) in answer_ids(task, backbone.tokenizer)])
    split = {
        name: encode(task, backbone.tokenizer, getattr(rows, name), task.max_input_tokens)[0]
        for name in ("train", "dev")
    }
    split["dev"] = sample_examples(task, rows.dev, split["dev"], settings.dev_rows, seed)
    prompt = config.prompt.build(backbone.host(), torch.Generator().manual_seed(seed))
    peft_config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=settings.length, prompt_tuning_init=PromptTuningInit.RANDOM
    )
    model = get_peft_model(backbone.model, peft_config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt.prompt())

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in examples)
        padded = {name: torch.full((len(examples), longest), fill) for name, fill in FILLS.items()}
        for index, row in enumerate(examples):
            for name in FILLS:
                padded[name][index, : len(row["input_ids"])] = torch.tensor(row[name])
        return padded

    def predictions(logits: Any, labels: Any) -> Any:
        positions = settings.length + (labels != -100).long().argmax(1) - 1  # the token before the answer
        return logits[torch.arange(len(positions)), positions][:, answers].argmax(1)

    def accuracy(output: Any) -> dict[str, float]:
        gold = output.label_ids[output.label_ids != -100]
        return {"accuracy": float((answers.numpy()[output.predictions] == gold).mean())}

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_evaluate(self, _: Any, state: Any, __: Any, metrics: Any, **___: Any) -> None:
            clock.note(state.global_step, metrics["eval_accuracy"])

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=2 * settings.batch_size, learning_rate=settings.lr * backbone.host().rms,
            warmup_steps=round(0.1 * settings.steps), weight_decay=1e-5, max_grad_norm=1.0, eval_strategy="steps",
            eval_steps=settings.eval_steps, train_sampling_strategy="group_by_length", save_strategy="no",
            report_to="none", use_cpu=True, seed=seed, dataloader_pin_memory=False, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(
            model, arguments, data_collator=collate, train_dataset=table(split["train"]),
            eval_dataset=table(split["dev"]), compute_metrics=accuracy, preprocess_logits_for_metrics=predictions,
            callbacks=[Watch()],
        ).train()  # fmt: skip


FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def table(examples: list[Any]) -> Any:
    """A data set for the Trainer: text and answer, with labels on the answer only."""
    from datasets import Dataset

    rows = [(row.input_ids, row.answer_ids) for row in examples]
    return Dataset.from_dict(
        {
            "input_ids": [[*text, *answer] for text, answer in rows],
            "attention_mask": [[1] * (len(text) + len(answer)) for text, answer in rows],
            "labels": [[-100] * len(text) + list(answer) for text, answer in rows],
        }
    )


SIDES = {"softprompt": ours, "peft": peft}


def worker(side: str, settings: Settings, seed: int, start: float) -> None:
    """Run one side in this process and print the result."""
    clock = Clock(settings.target, start)
    reached = False
    try:
        SIDES[side](settings, seed, clock)
    except TargetReached:
        reached = True
    step, _, seconds = clock.evaluations[-1]
    print(
        json.dumps(
            {"reached": reached, "steps": step, "s": seconds, "training_s": seconds - (clock.first_step - start)}
        )
    )


def run_worker(side: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Run one side in a new process.

    Raises:
        RuntimeError: the process failed.
    """
    print(f"{side}, seed {seed}", file=sys.stderr)
    command = [sys.executable, __file__, "worker", side, json.dumps(asdict(settings)), str(seed), str(time.time())]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the process of {side} ended with {process.returncode}; its stderr is above")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def total(rounds: Sequence[Mapping[str, Mapping[str, Any]]], side: str, name: str) -> float:
    """The sum over rounds."""
    return sum(float(results[side][name]) for results in rounds)


def main() -> None:
    """Compare the sides, or act as the worker process of one of them."""
    if sys.argv[1:2] == ["worker"]:
        side, values, seed, start = sys.argv[2:]
        worker(side, Settings(**json.loads(values)), int(seed), float(start))
        return
    settings = tyro.cli(Settings, description=__doc__)
    load = os.getloadavg()[0]
    rounds = [{side: run_worker(side, settings, seed) for side in SIDES} for seed in range(settings.rounds)]
    speedups = {
        name: [results["peft"][name] / results["softprompt"][name] for results in rounds]
        for name in ("s", "training_s")
    }
    per_step = [
        (results["peft"]["training_s"] / results["peft"]["steps"])
        / (results["softprompt"]["training_s"] / results["softprompt"]["steps"])
        for results in rounds
    ]
    report = {
        "benchmark": "whole_run", "cores": os.cpu_count(), "load_before": load, **asdict(settings), "runs": rounds,
        "speedup": statistics.median(speedups["s"]), "spread": [min(speedups["s"]), max(speedups["s"])],
        "training_speedup": statistics.median(speedups["training_s"]), "per_step": statistics.median(per_step),
        "speedup_of_sums": total(rounds, "peft", "s") / total(rounds, "softprompt", "s"),
    }  # fmt: skip
    print(json.dumps(report))
    if not all(side["reached"] for results in rounds for side in results.values()):
        sys.exit(
            f"a side did not reach {settings.target} in {settings.steps} steps: there is no ratio of equal results"
        )


if __name__ == "__main__":
    main()
