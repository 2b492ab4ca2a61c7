"""The one training loop: step, evaluate, stop early, checkpoint, resume."""

import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from softprompt import files, runs
from softprompt.backbones import Backbone, fsdp
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import score_answers
from softprompt.evaluation.predict import Answer, answer
from softprompt.models import PromptedModel, attach, verify
from softprompt.runs import Run
from softprompt.tasks import Example, Score, input_lengths, schedule
from softprompt.training import checkpoint, finalize, setup
from softprompt.training.callbacks import Interrupted, NullCallback, Progress, TrainingCallback, interruptible
from softprompt.training.checkpoint import Checkpoint, TrainerState
from softprompt.training.distributed import DistributedGroup
from softprompt.training.setup import TrainingSetup
from softprompt.training.step import Differentiate, TrainingStep, differentiate
from softprompt.training.tracking import check_tracker, start_tracker


def train(
    experiment: Experiment,
    *,
    out: str | Path = "runs",
    name: str | None = None,
    backbone: Backbone | None = None,
    watch: TrainingCallback | None = None,
    log_with: str | None = None,
    differentiate: Differentiate = differentiate,
) -> Run:
    """Train the experiment's prompt and keep it in a new folder `out/name`.

    Args:
        out: where runs are kept.
        name: the run's folder; none: made from task, method and seed.
        backbone: the experiment's own, if it is loaded already; it stays as it is.
        watch: who is told how it goes.
        log_with: a tracker that accelerate knows (`tensorboard`, `wandb`, ...).
        differentiate: who computes losses and gradients; other than the default where trainings share a pass.

    Raises:
        ValueError: settings, rows or backbone do not fit, or the loss is no number.
        Interrupted: Ctrl-C; a checkpoint is there to go on from.
    """
    check_tracker(log_with)
    runs.check_place(Path(out), name)
    processes, told = _processes(backbone, watch)
    whole = experiment.located()
    found = processes.main_process_first(lambda: setup.new_run(whole, backbone, told))
    processes.check_equal("the rows", found.rows.fingerprint)
    processes.check_equal("the weights", found.backbone.hash)
    run = processes.from_main(
        lambda: runs.create(whole, found.task, found.backbone, Path(out), name, found.rows.fingerprint)
    )
    return _work_on(run, found, processes, told, log_with, differentiate, fresh=True)


def resume(
    folder: str | Path,
    *,
    memory_options_of: Experiment | None = None,
    backbone: Backbone | str | Path | None = None,
    watch: TrainingCallback | None = None,
    log_with: str | None = None,
    differentiate: Differentiate = differentiate,
) -> Run:
    """Go on with an unfinished run from its last checkpoint, to the same numbers as if it had never stopped.

    A finished run is returned as it is, with a note.

    Args:
        memory_options_of: an experiment that asks for gradient checkpointing or sharding, if the run's own did not and
            ran out of memory.
        backbone: the run's own, loaded already, or where its weights lie now.
        differentiate: as of `train`.

    Raises:
        FileNotFoundError: the backbone is neither where the run recorded it nor where `backbone` says.
        ValueError: the rows or the backbone's weights are not those it was started with.
    """
    check_tracker(log_with)
    processes, told = _processes(backbone if isinstance(backbone, Backbone) else None, watch)
    run = processes.from_main(lambda: runs.open_run(folder))
    if run.results is not None:
        told.note(
            f"run {run.folder} is finished after {run.results['steps']} steps; to train it further, start a new run "
            f"from its prompt (--init-prompt {run.folder}) with the steps that are wanted"
        )
        return run
    if memory_options_of is not None:
        run = dataclasses.replace(run, experiment=run.experiment.with_memory_options(memory_options_of))
    found = processes.main_process_first(lambda: setup.resume_run(run, backbone, told))
    return _work_on(run, found, processes, told, log_with, differentiate)


def _processes(backbone: Backbone | None, watch: TrainingCallback | None) -> tuple[DistributedGroup, TrainingCallback]:
    """All that train this run, and who is told: the main process's watcher alone."""
    if backbone is not None and fsdp.is_sharded(backbone.model):
        raise ValueError(
            f"{backbone.source} was shared out among processes by an earlier training (--shard); load it anew"
        )
    cpu = not torch.cuda.is_available() if backbone is None else backbone.device.type == "cpu"
    processes = DistributedGroup(cpu=cpu)
    return processes, watch if watch and processes.is_main else NullCallback()


def _work_on(
    run: Run,
    found: TrainingSetup,
    processes: DistributedGroup,
    watch: TrainingCallback,
    log_with: str | None,
    differentiate: Differentiate,
    *,
    fresh: bool = False,
) -> Run:
    """Train to the end; what fails before the first step leaves nothing of a `fresh` run."""
    with ExitStack() as held:
        processes.from_main(lambda: held.enter_context(files.locked(run.folder)))
        saved = processes.from_main(lambda: checkpoint.latest(run.folder))
        if run.experiment.training.shard:
            found = _sharded(found, processes, watch)
        unmade = files.removed_on_failure(run.folder) if fresh and processes.is_main else nullcontext()
        with unmade, processes.collective_errors():
            work = _Training(run, found, saved, processes, watch, log_with, differentiate)
        return work.go()


def _sharded(found: TrainingSetup, processes: DistributedGroup, watch: TrainingCallback) -> TrainingSetup:
    """The same, the backbone's layers shared out among the processes for good, and compared anew as they now run."""
    if processes.world_size == 1:
        watch.note("one process holds the whole backbone (--shard); start several: torchrun --nproc-per-node 2 ...")
    backbone, first = found.backbone, found.prompted
    processes.check_equal("the layers' ways to run", first.supports_gradient_checkpointing)
    processes.shard(backbone.model)
    first.to(backbone.device)
    verify.forget(backbone.model)
    with processes.forward_scope():
        prompted = attach(
            backbone,
            first.prompt,
            head=first.head,
            prompt_position=first.prompt_position,
            prompt_attention=first.prompt_attention,
        )
    return dataclasses.replace(found, prompted=prompted)


class _Training:
    """One run in the making."""

    def __init__(
        self,
        run: Run,
        found: TrainingSetup,
        saved: Checkpoint | None,
        processes: DistributedGroup,
        watch: TrainingCallback,
        log_with: str | None,
        differentiate: Differentiate,
    ) -> None:
        self.run, self.processes, self.watch = run, processes, watch
        self.backbone, self.rows = found.backbone, found.rows
        self.settings = run.experiment.training
        self.accelerator = Accelerator(
            log_with=log_with, project_dir=run.folder, cpu=self.backbone.device.type == "cpu"
        )
        start_tracker(self.accelerator, log_with, _flat(run.experiment.to_json()))
        self.prompted = found.prompted
        # What a method and the model's dropout draw in training: other numbers for the rows of other processes.
        torch.manual_seed(processes.own_seed(run.experiment.seed))
        self.train, self.dev, self.test = found.train, found.dev, found.test
        self.training_step = TrainingStep(self.prompted, run.experiment, run.task, processes, differentiate)
        self.done = 0
        self.best: dict[str, Tensor] = {}
        self.state = TrainerState()
        if saved is not None:
            self._restore(saved)
        if processes.is_main:
            run.rewind_metrics(self.done)

    def go(self) -> Run:
        """Train to the end and write down what came of it."""
        before = self.backbone.hash
        self.processes.broadcast(self.prompted.state_dict().values())
        self.watch.stage("training")
        log_file = self.run.folder / runs.METRICS if self.processes.is_main else Path(os.devnull)
        with (
            interruptible(twice=self.processes.world_size == 1) as interrupted,
            log_file.open("a", encoding="utf-8") as log,
        ):
            self._loop(log, interrupted)
        self.prompted.load_state_dict(self.best)
        with self.processes.forward_scope():
            if self.prompted.tuned is None and self.backbone.checksum() != before:
                raise RuntimeError(
                    f"the weights of {self.backbone.source} changed in training; this is a bug, report it"
                )
        return self._finish()

    def _loop(self, log: Any, interrupted: threading.Event) -> None:
        settings = self.settings
        order = schedule(input_lengths(self.train), settings.batch_size, self.run.experiment.seed, start=self.done)
        while self.done < settings.steps and not self._stale():
            rows = [self.train[place] for place in next(order)[1]]
            rate = settings.rate(self.done)
            given = self.training_step.step(rows, rate, self.done + 1)
            loss, start = float(given.loss), time.perf_counter()
            self.done += 1
            line: dict[str, Any] = {"step": self.done, "loss": loss, "lr": rate}
            score: Score | None = None
            if self.done % settings.eval_steps == 0 or self.done == settings.steps:
                score = self._evaluate()
                line["dev"] = score.value
            seconds = self.state.seconds + given.seconds + time.perf_counter() - start
            self.state = dataclasses.replace(self.state, seconds=seconds)
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
                    rows_per_second=len(rows) / given.seconds,
                    dev=score,
                )
            )
            if self.processes.any(interrupted.is_set()):
                self._save()
                raise Interrupted(
                    f"stopped after step {self.done} of {settings.steps}; go on with: "
                    f"softprompt train --resume {self.run.folder}"
                )

    def _evaluate(self) -> Score:
        """Score the development rows, and keep the best prompt."""
        self.prompted.eval()
        answers = self._answers(self.prompted, self.dev)
        score = score_answers(self.run.task, self.rows, "dev", self.dev, answers, self.backbone.tokenizer)
        if score.value > self.state.best:
            self.state = dataclasses.replace(
                self.state, best=score.value, best_step=self.done, evals_without_improvement=0
            )
            self.best = {name: tensor.detach().clone() for name, tensor in self.prompted.state_dict().items()}
        else:
            patience = self.state.evals_without_improvement + 1
            self.state = dataclasses.replace(self.state, evals_without_improvement=patience)
        return score

    def _answers(self, prompted: PromptedModel, examples: Sequence[Example]) -> list[Answer]:
        """An answer an example, in their order; each process gives those of its share."""
        own: list[Answer] = []
        with self.processes.forward_scope():
            mine = self.processes.share(examples)
            given = self.processes.pad_shard(mine, examples)
            own = answer(prompted, self.run.task, given, max_new_tokens=self.settings.max_new_tokens)[: len(mine)]
        return self.processes.gather_in_order(own)

    def _stale(self) -> bool:
        return 0 < self.settings.patience <= self.state.evals_without_improvement

    def _save(self) -> None:
        random = checkpoint.of_each(self.processes.gather(checkpoint.random_states(self.backbone.device)))
        with self.processes.collective_errors():
            if self.processes.is_main and self.done not in checkpoint.steps(self.run.folder):
                checkpoint.save(
                    self.run.folder,
                    Checkpoint(
                        step=self.done,
                        prompt=self.prompted.state_dict(),
                        best=self.best,
                        optimizer=checkpoint.pack(self.training_step.adamw),
                        random=random,
                        trainer_state=self.state,
                    ),
                )

    def _restore(self, saved: Checkpoint) -> None:
        folder, device = checkpoint.folder_of(self.run.folder, saved.step), self.backbone.device
        if saved.best:  # loaded to be checked, like the prompt after it
            files.load_tensors(self.prompted, saved.best, str(folder / "best.safetensors"))
        files.load_tensors(self.prompted, saved.prompt, str(folder / "prompt.safetensors"))
        checkpoint.unpack(saved.optimizer, self.training_step.adamw, folder / "optimizer.safetensors")
        checkpoint.restore_random(saved.random, device, folder / "random.safetensors", self.processes.rank)
        self.done, self.state = saved.step, saved.trainer_state
        self.best = {name: tensor.to(device) for name, tensor in saved.best.items()}

    def _finish(self) -> Run:
        """Test what was trained, and write it down."""
        self.watch.stage("testing")
        test = self.test
        progress = {
            "steps": self.done,
            "best_step": self.state.best_step,
            "seconds": round(self.state.seconds, 3),
        }
        results, answers = finalize.evaluate_final(self.run, self.prompted, self.rows, self.dev, test, self._answers)
        if caution := results.get("caution"):
            self.watch.note(str(caution))
        if self.settings.zero_shot:
            self.watch.stage("testing zero-shot")
            bare = self._answers(attach(self.backbone), test)
            results["zero_shot"] = score_answers(
                self.run.task, self.rows, "test", test, bare, self.backbone.tokenizer
            ).value
        run = self.processes.from_main(
            lambda: finalize.save_run(self.run, self.prompted, self.rows, test, answers, {**results, **progress})
        )
        for tracker in self.accelerator.trackers:  # not `end_training`, after which processes cannot meet again
            tracker.finish()
        return run


def _flat(values: dict[str, Any], lead: str = "") -> dict[str, Any]:
    """Nested settings as `prompt.rank`, for trackers that know no nesting."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{lead}{key}.") if isinstance(value, dict) else {f"{lead}{key}": value})
    return flat
