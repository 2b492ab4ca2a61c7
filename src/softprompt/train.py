"""The one training loop: step, evaluate, stop early, checkpoint, resume."""

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from softprompt import checkpoint, files, finish, runs
from softprompt.attach import attach, fresh_head
from softprompt.backbone import Backbone, load
from softprompt.baseline import RATES
from softprompt.checkpoint import Checkpoint
from softprompt.evaluate import draw, read_splits, score_answers, score_examples
from softprompt.experiment import Experiment
from softprompt.predict import answer, input_limit, pad_id
from softprompt.prompts import SoftPrompt
from softprompt.runs import Run
from softprompt.tasks import (
    Example,
    Score,
    Splits,
    Task,
    answer_ids,
    answer_labels,
    collate,
    encode,
    load_task,
    schedule,
)
from softprompt.watch import Interrupted, Progress, Silent, Watcher, interruptible


def train(
    experiment: Experiment,
    *,
    out: str | Path = "runs",
    name: str | None = None,
    backbone: Backbone | None = None,
    watch: Watcher | None = None,
    log_with: str | None = None,
) -> Run:
    """Train the experiment's prompt and keep it in a new folder `out/name`.

    Args:
        out: where runs are kept.
        name: the run's folder; none: made from task, method and seed.
        backbone: the experiment's own, if it is loaded already; it stays as it is.
        watch: who is told how it goes.
        log_with: a tracker that accelerate knows (`tensorboard`, `wandb`, ...).

    Raises:
        ValueError: settings, rows or backbone do not fit, or the loss is no number.
        Interrupted: Ctrl-C; a checkpoint is there to go on from.
    """
    _refuse_several_processes()
    watch = watch or Silent()
    watch.stage("reading rows")
    experiment = experiment.located()
    task = load_task(experiment.task, experiment.data)
    rows = read_splits(experiment, task)
    for warning in rows.warnings:
        watch.note(warning)
    watch.stage(f"loading {experiment.backbone}")
    backbone = backbone or load(experiment.backbone, dtype=experiment.backbone_dtype)
    # Before a folder is made: what does not fit is refused here.
    first = runs.first_prompt(experiment, task, backbone, warm=True)
    if experiment.start is not None:
        watch.note(_start_note(experiment.start, first, runs.read_prompt(Path(experiment.start), backbone)))
    _refuse_pointless(experiment, task, backbone)
    run = runs.create(experiment, task, backbone, Path(out), name, rows.fingerprint)
    with files.locked(run.folder):
        return _Training(run, backbone, rows, watch, log_with).go()


def resume(folder: str | Path, *, watch: Watcher | None = None, log_with: str | None = None) -> Run:
    """Go on with an unfinished run from its last checkpoint, to the same numbers as if it had never stopped.

    Raises:
        ValueError: the rows or the backbone's weights are not those it was started with.
    """
    _refuse_several_processes()
    watch = watch or Silent()
    run = runs.open_run(folder)
    if run.results is not None:
        return run
    watch.stage("reading rows")
    experiment = run.experiment
    rows = read_splits(experiment, run.task)
    if rows.fingerprint != run.record["data"]:
        raise ValueError(f"the rows of task {run.task.name} are not those {folder} was started with; start a new run")
    watch.stage(f"loading {experiment.backbone}")
    backbone = load(experiment.backbone, dtype=run.record["backbone"]["dtype"])
    if backbone.hash != run.record["backbone"]["hash"]:
        raise ValueError(
            f"the weights of {experiment.backbone} are not those that {folder} was started with; start a new run"
        )
    with files.locked(run.folder):
        return _Training(run, backbone, rows, watch, log_with).go()


def _refuse_several_processes() -> None:
    count = PartialState().num_processes
    if count > 1:
        raise ValueError(f"training was started as {count} processes, and only one is supported yet; start it alone")


def _refuse_pointless(experiment: Experiment, task: Task, backbone: Backbone) -> None:
    most = backbone.max_positions
    if most is not None and experiment.prompt.length >= most:
        raise ValueError(f"length is {experiment.prompt.length}, but {backbone.source} has {most} positions; lower it")
    head = fresh_head(backbone, len(task.words), torch.Generator())
    if experiment.training.untouched and head is not None:
        raise ValueError(
            f"{backbone.source} answers through a trained head, so untouched it says nothing; leave it out"
        )
    if experiment.baseline == "head" and head is None:
        raise ValueError(f"{backbone.source} answers in words and has no head to train; use the baseline lora or full")


class _Training:
    """One run in the making."""

    def __init__(self, run: Run, backbone: Backbone, rows: Splits, watch: Watcher, log_with: str | None) -> None:
        self.run, self.backbone, self.rows, self.watch = run, backbone, rows, watch
        self.settings = run.experiment.training
        self.accelerator = Accelerator(log_with=log_with, project_dir=run.folder, cpu=backbone.device.type == "cpu")
        if log_with:
            self.accelerator.init_trackers("softprompt", config=_flat(run.experiment.to_json()))
        self.attachment = run.start(backbone, warm=not checkpoint.steps(run.folder))
        torch.manual_seed(run.experiment.seed)  # what a method draws in training
        watch.stage("tokenising")
        self.train = self._encoded("train")
        self.dev = self._drawn("dev", 0 if rows.shared else self.settings.dev_rows, run.experiment.seed)
        rates = run.experiment.prompt.rates() | {"head": self.attachment.head_rate}
        rates["tuned"] = RATES[run.experiment.baseline]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "rate": rates[name]} for name, group in self.attachment.groups().items()],
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
        )
        self.done = 0
        self.best: dict[str, Tensor] = {}
        self.place: dict[str, Any] = {"best": -math.inf, "best_step": 0, "stale": 0, "seconds": 0.0}
        if steps := checkpoint.steps(run.folder):
            self._restore(checkpoint.load(run.folder, steps[-1]))
        run.rewind_metrics(self.done)

    def go(self) -> Run:
        """Train to the end and write down what came of it."""
        before = self.backbone.hash
        self.watch.stage("training")
        with interruptible() as interrupted, (self.run.folder / runs.METRICS).open("a", encoding="utf-8") as log:
            self._loop(log, interrupted)
        self.attachment.load_state_dict(self.best)
        if self.attachment.tuned is None and self.backbone.checksum() != before:
            raise RuntimeError(f"the weights of {self.backbone.source} changed in training; this is a bug, report it")
        return self._finish()

    def _loop(self, log: Any, interrupted: threading.Event) -> None:
        settings = self.settings
        lengths = [len(example.input_ids) for example in self.train]
        order = schedule(lengths, settings.batch, self.run.experiment.seed, start=self.done)
        score: Score | None = None
        while self.done < settings.steps and not self._stale():
            start = time.perf_counter()
            rows = [self.train[place] for place in next(order)[1]]
            rate = settings.rate(self.done)
            loss = self._step(rows, rate)
            speed = len(rows) / (time.perf_counter() - start)
            self.done += 1
            line: dict[str, Any] = {"step": self.done, "loss": loss, "lr": rate}
            if self.done % settings.evaluate_every == 0 or self.done == settings.steps:
                score = self._evaluate()
                line["dev"] = score.value
            seconds = time.perf_counter() - start
            self.place["seconds"] += seconds
            log.write(runs.json_line(line))
            log.flush()
            self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=self.done)
            if "dev" in line:
                self._save()
            self.watch.step(
                Progress(
                    step=self.done,
                    steps=settings.steps,
                    loss=loss,
                    lr=rate,
                    rows_per_second=speed,
                    dev=score,
                )
            )
            if interrupted.is_set():
                self._save()
                raise Interrupted(
                    f"stopped after step {self.done} of {settings.steps}; go on with: "
                    f"softprompt train --resume {self.run.folder}"
                )

    def _step(self, rows: Sequence[Example], rate: float) -> float:
        """One optimiser step; its loss is the mean over the whole batch, however it is cut into parts."""
        self.attachment.train()  # a method's own dropout; the backbone stays in evaluation mode
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        weight = len(rows) if self._candidates else sum(len(self._target(row)) for row in rows)
        loss = torch.zeros((), device=self.accelerator.device)
        with self.attachment.backbone.dropout(self.settings.dropout):
            for part in range(self.settings.accumulate):
                if piece := rows[part :: self.settings.accumulate]:
                    piece_loss = self._loss_sum(piece) / weight
                    piece_loss.backward()  # type: ignore[no-untyped-call]
                    loss += piece_loss.detach()
        parameters = list(self.attachment.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        self._refuse_not_finite(float(loss), float(norm), rate, rows)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    @property
    def _candidates(self) -> bool:
        return self.run.task.is_classification and (
            self.settings.objective == "candidates" or self.attachment.head is not None
        )

    def _target(self, row: Example) -> tuple[int, ...]:
        return self.attachment.target(row.answer_ids)

    def _loss_sum(self, rows: Sequence[Example]) -> Tensor:
        tokenizer, device = self.backbone.tokenizer, self.backbone.device
        joined = not self._candidates and not self.attachment.closed
        batch = collate(rows, pad_id=pad_id(tokenizer), side="left", with_answers=joined)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        if self._candidates:
            scores = self.attachment.score(ids, mask, answer_ids(self.run.task, tokenizer))
            return nn.functional.cross_entropy(scores, batch.classes.to(device), reduction="sum")
        labels = (batch.labels if joined else answer_labels([self._target(row) for row in rows])).to(device)
        loss: Tensor = self.attachment(ids, mask, labels).loss
        return loss * (labels != -100).sum()

    def _refuse_not_finite(self, loss: float, norm: float, rate: float, rows: Sequence[Example]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        numbers = ", ".join(str(row.row) for row in rows)
        raise ValueError(
            f"the loss is {loss} and its gradient's norm {norm} at step {self.done + 1} with learning rate {rate:.3g} "
            f"on rows {numbers} of the training split; lower --lr, or use --dtype float32"
        )

    def _evaluate(self) -> Score:
        """Score the development rows, and keep the best prompt."""
        self.attachment.eval()
        most = self.settings.max_new_tokens
        answers = answer(self.attachment, self.run.task, self.dev, max_new_tokens=most)
        score = score_answers(self.run.task, self.rows, "dev", self.dev, answers)
        if score.value > self.place["best"]:
            self.place.update(best=score.value, best_step=self.done, stale=0)
            self.best = {name: tensor.detach().clone() for name, tensor in self.attachment.state_dict().items()}
        else:
            self.place["stale"] += 1
        return score

    def _stale(self) -> bool:
        return 0 < self.settings.patience <= self.place["stale"]

    def _save(self) -> None:
        if self.done in checkpoint.steps(self.run.folder):
            return
        checkpoint.save(
            self.run.folder,
            Checkpoint(
                step=self.done,
                prompt=self.attachment.state_dict(),
                best=self.best,
                optimizer=checkpoint.pack(self.optimizer),
                random=checkpoint.random_states(self.backbone.device),
                place=self.place,
            ),
        )

    def _restore(self, saved: Checkpoint) -> None:
        folder, device = checkpoint.place(self.run.folder, saved.step), self.backbone.device
        if saved.place.keys() != self.place.keys():
            raise ValueError(f"{folder / 'place.json'} holds {sorted(saved.place)}; it is damaged, train again")
        if saved.best:  # loaded to be checked, like the prompt after it
            runs.load_tensors(self.attachment, saved.best, str(folder / "best.safetensors"))
        runs.load_tensors(self.attachment, saved.prompt, str(folder / "prompt.safetensors"))
        checkpoint.unpack(saved.optimizer, self.optimizer, folder / "optimizer.safetensors")
        checkpoint.restore_random(saved.random, device, folder / "random.safetensors")
        self.done, self.place = saved.step, dict(saved.place)
        self.best = {name: tensor.to(device) for name, tensor in saved.best.items()}

    def _encoded(self, split: str) -> list[Example]:
        limit = input_limit(self.attachment, self.run.task, self.settings)
        rows, closing = getattr(self.rows, split), self.attachment.closed
        examples, shortened = encode(self.run.task, self.backbone.tokenizer, rows, limit, closing=closing)
        if shortened:
            self.watch.note(f"{shortened} of {len(examples)} {split} rows were cut to {limit} tokens (--max-tokens)")
        return examples

    def _drawn(self, split: str, count: int, seed: int) -> list[Example]:
        return draw(self.run.task, getattr(self.rows, split), self._encoded(split), count, seed)

    def _finish(self) -> Run:
        """Test what was trained, and write it down."""
        self.watch.stage("testing")
        test = self._drawn("test", self.settings.test_rows, 0)
        progress = {
            "steps": self.done,
            "best_step": self.place["best_step"],
            "seconds": round(self.place["seconds"], 1),
        }
        results, answers = finish.tested(self.run, self.attachment, self.rows, self.dev, test)
        if caution := results.get("caution"):
            self.watch.note(str(caution))
        if self.settings.untouched:
            self.watch.stage("testing the untouched model")
            most = self.settings.max_new_tokens
            bare, _ = score_examples(attach(self.backbone), self.run.task, self.rows, "test", test, most)
            results["untouched"] = bare.value
        run = finish.written(self.run, self.attachment, self.rows, test, answers, {**results, **progress})
        self.accelerator.end_training()
        return run


def _start_note(source: str, first: SoftPrompt, start: SoftPrompt) -> str:
    """How much of a warm start the method can hold at all."""
    wanted = start.prompt().detach().cpu()
    error = float((first.prompt().detach().cpu() - wanted).norm() / wanted.norm())
    return f"starting from {source}, kept to a relative error of {error:.3g}"


def _flat(values: dict[str, Any], lead: str = "") -> dict[str, Any]:
    """Nested settings as `prompt.rank`, for trackers that know no nesting."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{lead}{key}.") if isinstance(value, dict) else {f"{lead}{key}": value})
    return flat
