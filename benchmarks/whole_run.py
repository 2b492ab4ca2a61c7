"""Seconds of a whole training on rotten-tomatoes to one development score, beside transformers' Trainer with PEFT.

    python benchmarks/whole_run.py [--target 0.8] [--steps 100] [--length 100] [--dtype float32] [--rounds 1]

Both sides get the same weights, rows in the same tokens, dtype, first prompt, schedule and development rows, and train
on the answer's cross-entropy over the vocabulary. Ours is `softprompt.train`; the peer is transformers'
Trainer with PEFT's prompt tuning, rows padded to the longest of the batch and grouped by length. A prompt is trained in
units of its own size here and as it is there, so the peer's learning rate is ours times that size: with Adam the same
step. Each side runs in a process of its own until an evaluation reaches the target; the seconds are those since the
process started, imports, loading, tokenising and evaluations among them, and `training_s` what of them came after the
first step began. The order of rows differs (each side draws its own), so the step that reaches the target may differ
too: `steps` says which it was, `per_step` is the ratio of seconds by step, and `ratio_of_sums` that of all rounds'
seconds, in which one seed's luck counts least.

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
    """What both sides are given."""

    target: float = 0.8
    """Development accuracy at which the clock stops."""
    steps: int = 100
    """Most steps, over which the learning rate rises and falls."""
    every: int = 20
    """Steps between two evaluations."""
    batch: int = 16
    """Rows a step."""
    length: int = 100
    """Virtual tokens."""
    lr: float = 0.03
    """Peak learning rate, in units of the prompt's size."""
    dev_rows: int = 200
    """Development rows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the backbone computes in."""
    rounds: int = 1
    """Times that each side is started, in turn, each with a seed of its own."""

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target is {self.target}; it is an accuracy, between 0 and 1")


class Reached(Exception):
    """The clock stops."""


class Clock:
    """What an evaluation found, and when."""

    def __init__(self, target: float, start: float) -> None:
        self.target, self.start, self.first = target, start, 0.0
        self.seen: list[tuple[int, float, float]] = []

    def begin(self) -> None:
        """The first step begins."""
        self.first = self.first or time.time()

    def note(self, step: int, score: float) -> None:
        """An evaluation.

        Raises:
            Reached: with the target's score.
        """
        self.seen.append((step, score, time.time() - self.start))
        print(f"step {step}: {score:.3f} after {self.seen[-1][2]:.0f} s", file=sys.stderr)
        if score >= self.target:
            raise Reached


def experiment(settings: Settings, seed: int) -> Any:
    """The training, as ours has it."""
    from softprompt import Experiment, TrainingConfig
    from softprompt.prompts.plain import Plain

    training = TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, eval_steps=settings.every,
        dev_rows=settings.dev_rows, test_rows=1, vocabulary_weight=1.0,
    )  # fmt: skip
    return Experiment(
        backbone=BACKBONE, task=TASK, prompt=Plain(length=settings.length), training=training, seed=seed,
        dtype=settings.dtype,
    )  # fmt: skip


def ours(settings: Settings, seed: int, clock: Clock) -> None:
    """`softprompt.train`."""
    from softprompt import train
    from softprompt.training.callbacks import Progress

    class Watch:
        evaluated: Any = None

        def on_stage(self, text: str) -> None:
            if text.startswith("training"):
                clock.begin()

        def on_note(self, text: str) -> None:
            """Nothing."""

        def on_step(self, progress: Progress) -> None:
            if progress.dev is not None and progress.dev is not self.evaluated:
                self.evaluated = progress.dev
                clock.note(progress.step, progress.dev.value)

    with tempfile.TemporaryDirectory() as folder:
        train(experiment(settings, seed), out=folder, callback=Watch())


def peft(settings: Settings, seed: int, clock: Clock) -> None:
    """A PEFT model in transformers' Trainer."""
    import torch
    import transformers
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    from softprompt import load_backbone, load_task
    from softprompt.evaluation.evaluate import draw, read_splits
    from softprompt.tasks import answer_ids, encode

    whole = experiment(settings, seed)
    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    backbone.model.set_attn_implementation("sdpa")  # as transformers loads it; ours brings its own attention
    task = load_task(TASK)
    rows = read_splits(whole, task)
    answers = torch.tensor([ids for (ids,) in answer_ids(task, backbone.tokenizer)])
    split = {
        name: encode(task, backbone.tokenizer, getattr(rows, name), task.max_input_tokens)[0]
        for name in ("train", "dev")
    }
    split["dev"] = draw(task, rows.dev, split["dev"], settings.dev_rows, seed)
    prompt = whole.prompt.build(backbone.host(), torch.Generator().manual_seed(seed))
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=settings.length, prompt_tuning_init=PromptTuningInit.RANDOM
    )
    model = get_peft_model(backbone.model, config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt.prompt())

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(one["input_ids"]) for one in examples)
        wide = {name: torch.full((len(examples), longest), fill) for name, fill in FILLS.items()}
        for at, one in enumerate(examples):
            for name in FILLS:
                wide[name][at, : len(one["input_ids"])] = torch.tensor(one[name])
        return wide

    def chosen(logits: Any, labels: Any) -> Any:
        at = settings.length + (labels != -100).long().argmax(1) - 1  # the token before the answer
        return logits[torch.arange(len(at)), at][:, answers].argmax(1)

    def scored(found: Any) -> dict[str, float]:
        gold = found.label_ids[found.label_ids != -100]
        return {"accuracy": float((answers.numpy()[found.predictions] == gold).mean())}

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
            eval_steps=settings.every, train_sampling_strategy="group_by_length", save_strategy="no", report_to="none",
            use_cpu=True, seed=seed, dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(
            model, arguments, data_collator=collate, train_dataset=table(split["train"]),
            eval_dataset=table(split["dev"]), compute_metrics=scored, preprocess_logits_for_metrics=chosen,
            callbacks=[Watch()],
        ).train()  # fmt: skip


FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def table(examples: list[Any]) -> Any:
    """Rows as a trainer reads them: text and answer, the answer alone with labels."""
    from datasets import Dataset

    rows = [(one.input_ids, one.answer_ids) for one in examples]
    return Dataset.from_dict(
        {
            "input_ids": [[*text, *answer] for text, answer in rows],
            "attention_mask": [[1] * (len(text) + len(answer)) for text, answer in rows],
            "labels": [[-100] * len(text) + list(answer) for text, answer in rows],
        }
    )


SIDES = {"softprompt": ours, "peft": peft}


def worker(side: str, settings: Settings, seed: int, start: float) -> None:
    """One side in this process; prints what it found."""
    clock = Clock(settings.target, start)
    reached = False
    try:
        SIDES[side](settings, seed, clock)
    except Reached:
        reached = True
    step, _, seconds = clock.seen[-1]
    print(json.dumps({"reached": reached, "steps": step, "s": seconds, "training_s": seconds - (clock.first - start)}))


def started(side: str, settings: Settings, seed: int) -> dict[str, Any]:
    """What a side finds in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    print(f"{side}, seed {seed}", file=sys.stderr)
    command = [sys.executable, __file__, "worker", side, json.dumps(asdict(settings)), str(seed), str(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process of {side} ended with {done.returncode}; what it said is above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def total(rounds: Sequence[Mapping[str, Mapping[str, Any]]], side: str, name: str) -> float:
    """Of all rounds."""
    return sum(float(one[side][name]) for one in rounds)


def main() -> None:
    """Compare the sides, or be one of them."""
    if sys.argv[1:2] == ["worker"]:
        side, values, seed, start = sys.argv[2:]
        worker(side, Settings(**json.loads(values)), int(seed), float(start))
        return
    settings = tyro.cli(Settings, description=__doc__)
    busy = os.getloadavg()[0]
    rounds = [{side: started(side, settings, seed) for side in SIDES} for seed in range(settings.rounds)]
    ratios = {name: [one["peft"][name] / one["softprompt"][name] for one in rounds] for name in ("s", "training_s")}
    per_step = [
        (one["peft"]["training_s"] / one["peft"]["steps"])
        / (one["softprompt"]["training_s"] / one["softprompt"]["steps"])
        for one in rounds
    ]
    found = {
        "benchmark": "whole_run", "cores": os.cpu_count(), "load_before": busy, **asdict(settings), "runs": rounds,
        "ratio": statistics.median(ratios["s"]), "spread": [min(ratios["s"]), max(ratios["s"])],
        "training_ratio": statistics.median(ratios["training_s"]), "per_step": statistics.median(per_step),
        "ratio_of_sums": total(rounds, "peft", "s") / total(rounds, "softprompt", "s"),
    }  # fmt: skip
    print(json.dumps(found))
    if not all(side["reached"] for one in rounds for side in one.values()):
        sys.exit(
            f"a side did not reach {settings.target} in {settings.steps} steps: there is no ratio of equal results"
        )


if __name__ == "__main__":
    main()
