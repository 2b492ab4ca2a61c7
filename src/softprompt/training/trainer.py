"""The training loop: step, evaluate, checkpoint; and how a run starts, resumes and ends."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from softprompt import files, runs
from softprompt.backbones import Backbone, fsdp
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import score_answers
from softprompt.evaluation.predict import Answer, answer
from softprompt.models import PromptedModel
from softprompt.runs import Run
from softprompt.tasks import Score
from softprompt.tasks.data.collate import schedule
from softprompt.tasks.data.examples import Example, input_lengths
from softprompt.training import checkpoint
from softprompt.training.callbacks import Interrupted, NullCallback, Progress, TrainingCallback, interruptible
from softprompt.training.checkpoint import Checkpoint, TrainerState
from softprompt.training.distributed import DistributedGroup
from softprompt.training.finalize import evaluate_final, save_run
from softprompt.training.setup import TrainingSetup, new_run, resume_run, shard_backbone
from softprompt.training.step import Differentiate, TrainingStep, differentiate
from softprompt.training.tracking import Tracker, check_tracker


def train(
    experiment: Experiment,
    *,
    out: str | Path = "runs",
    name: str | None = None,
    backbone: Backbone | None = None,
    callback: TrainingCallback | None = None,
    log_with: str | None = None,
    differentiate: Differentiate = differentiate,
) -> Run:
    """Train the experiment's prompt and save it in a new folder `out/name`.

    Args:
        out: the folder that holds the runs.
        name: the run's folder in it; None: made from task, method and seed.
        backbone: the experiment's backbone, if it is already loaded; it is not changed.
        callback: receives the progress.
        log_with: an experiment tracker that accelerate supports (`tensorboard`, `wandb`, ...).
        differentiate: computes losses and gradients; other than the default only for concurrent runs.

    Raises:
        FileNotFoundError: there is no such task file, data or backbone.
        FileExistsError: `name` is taken.
        OSError: `out` cannot be written.
        ValueError: settings, rows or backbone do not fit together, or the loss is not finite.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    check_tracker(log_with)
    out = Path(out).expanduser()
    runs.check_new_run(out, name)
    processes, main_callback = _start_processes(backbone, callback)
    experiment = experiment.with_absolute_paths()
    setup = processes.main_process_first(lambda: new_run(experiment, backbone, main_callback))
    processes.check_equal("the rows", setup.rows.fingerprint)
    processes.check_equal("the weights", setup.backbone.hash)
    rows, context = setup.rows, setup.context
    run = processes.from_main(
        lambda: runs.create(
            experiment, setup.task, setup.backbone, out, name, rows.fingerprints, context, rows.demonstrations
        )
    )
    return _train_to_end(run, setup, processes, main_callback, log_with, differentiate, is_new=True)


def resume(
    folder: str | Path,
    *,
    memory_options_of: Experiment | None = None,
    backbone: Backbone | str | Path | None = None,
    callback: TrainingCallback | None = None,
    log_with: str | None = None,
    differentiate: Differentiate = differentiate,
) -> Run:
    """Resume an unfinished run from its last checkpoint, with the same result as if it had never stopped.

    A finished run is returned unchanged, with a note.

    Args:
        memory_options_of: an experiment whose memory options (gradient checkpointing, sharding) are added to the run's.
        backbone: the run's backbone, if it is already loaded, or where its weights are now.
        callback: as in `train`.
        log_with: as in `train`.
        differentiate: as in `train`.

    Raises:
        FileNotFoundError: the backbone is neither where the run recorded it nor at `backbone`.
        ValueError: the rows or the backbone's weights have changed since the run was started.
    """
    check_tracker(log_with)
    processes, main_callback = _start_processes(backbone, callback)
    run = processes.from_main(lambda: runs.open_run(folder))
    if run.results is not None:
        main_callback.on_note(
            f"run {run.folder} is finished after {run.results['steps']} steps; to train it further, start a new run "
            f"from its prompt with --init-prompt {run.folder}"
        )
        return run
    if memory_options_of is not None:
        run = replace(run, experiment=run.experiment.with_memory_options(memory_options_of))
    setup = processes.main_process_first(lambda: resume_run(run, backbone, main_callback))
    return _train_to_end(run, setup, processes, main_callback, log_with, differentiate)


def _start_processes(
    backbone: Backbone | str | Path | None, callback: TrainingCallback | None
) -> tuple[DistributedGroup, TrainingCallback]:
    """The processes that train this run, and the callback of the main one; the others have none."""
    cpu = not torch.cuda.is_available()
    if isinstance(backbone, Backbone):
        if fsdp.is_sharded(backbone.model):
            raise ValueError(
                f"{backbone.source} was sharded over the processes by an earlier training (--shard); load it again"
            )
        cpu = backbone.device.type == "cpu"
    processes = DistributedGroup(cpu=cpu)
    return processes, callback if callback and processes.is_main else NullCallback()


def _train_to_end(
    run: Run,
    setup: TrainingSetup,
    processes: DistributedGroup,
    callback: TrainingCallback,
    log_with: str | None,
    differentiate: Differentiate,
    *,
    is_new: bool = False,
) -> Run:
    """Train under the folder's lock; if a new run fails before its first step, its folder is removed."""
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(files.locked(run.folder)))
        saved = processes.from_main(lambda: checkpoint.latest(run.folder))
        if run.experiment.training.shard:
            setup = shard_backbone(setup, processes, callback)
        cleanup = files.removed_on_failure(run.folder) if is_new and processes.is_main else nullcontext()
        with cleanup, processes.collective_errors():
            trainer = _Trainer(run, setup, saved, processes, callback, log_with, differentiate)
        return trainer.train()


class _Trainer:
    """Trains one run."""

    def __init__(
        self,
        run: Run,
        setup: TrainingSetup,
        saved: Checkpoint | None,
        processes: DistributedGroup,
        callback: TrainingCallback,
        log_with: str | None,
        differentiate: Differentiate,
    ) -> None:
        self.run, self.setup, self.processes, self.callback = run, setup, processes, callback
        self.settings = run.experiment.training
        self.backbone, self.prompted = setup.backbone, setup.prompted
        on_cpu = self.backbone.device.type == "cpu"
        self.tracker = Tracker(log_with, run.folder, run.experiment.to_json(), cpu=on_cpu)
        # For the random draws of a method and of the model's dropout: each process has other rows and other draws.
        torch.manual_seed(processes.process_seed(run.experiment.seed))
        self.training_step = TrainingStep(
            self.prompted, run.experiment, run.task, processes, differentiate, setup.teacher
        )
        self.state = TrainerState()
        self.best: dict[str, Tensor] = {}
        if saved is not None:
            self._restore(saved)
        if processes.is_main:
            run.rewind_metrics(self.state.step)

    def train(self) -> Run:
        """Train, evaluate the best prompt and write the run's folder."""
        hash_before = self.backbone.hash
        self.processes.broadcast(self.prompted.state_dict().values())
        self.callback.on_stage("training")
        metrics_file = self.run.folder / runs.METRICS if self.processes.is_main else Path(os.devnull)
        with (
            interruptible(twice=self.processes.world_size == 1) as stop_requested,
            metrics_file.open("a", encoding="utf-8") as metrics_log,
        ):
            self._loop(metrics_log, stop_requested)
        self.prompted.load_state_dict(self.best)
        with self.processes.forward_scope():
            if self.backbone.checksum() != hash_before:
                raise RuntimeError(
                    f"the weights of {self.backbone.source} changed in training; this is a bug, report it"
                )
        results, answers = evaluate_final(self.run, self.setup, self.state, self._predict, self.callback)
        run = self.processes.from_main(lambda: save_run(self.run, self.setup, answers, results, self.callback))
        self.tracker.finish()
        return run

    def _loop(self, metrics_log: TextIO, stop_requested: threading.Event) -> None:
        settings, state, rows = self.settings, self.state, self.setup.train
        batches = schedule(input_lengths(rows), settings.batch_size, self.run.experiment.seed, start=state.step)
        while state.step < settings.steps and not self._out_of_patience():
            batch = [rows[index] for index in next(batches)[1]]
            lr = settings.learning_rate(state.step)
            loss, step_seconds = self.training_step.step(batch, lr, state.step + 1)

            started = time.perf_counter()
            state.step += 1
            is_evaluation = state.step % settings.eval_steps == 0 or state.step == settings.steps
            dev = self._evaluate() if is_evaluation else None
            state.seconds += step_seconds + time.perf_counter() - started

            progress = Progress(
                step=state.step,
                steps=settings.steps,
                loss=loss,
                lr=lr,
                rows_per_second=len(batch) / step_seconds,
                dev=dev,
            )
            metrics_log.write(runs.json_line({"step": state.step, **progress.metrics}))
            metrics_log.flush()
            self.tracker.log(progress.metrics, state.step)
            if is_evaluation:
                self._save_checkpoint()
            self.callback.on_step(progress)

            if self.processes.any(stop_requested.is_set()):
                self._save_checkpoint()
                raise Interrupted(
                    f"stopped after step {state.step} of {settings.steps}; continue with: "
                    f"softprompt train --resume {self.run.folder}"
                )

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.state.evals_without_improvement

    def _evaluate(self) -> Score:
        """Score the development rows, and remember the trainable tensors if they are the best so far."""
        self.prompted.eval()
        dev, tokenizer = self.setup.dev, self.backbone.tokenizer
        answers = self._predict(self.prompted, dev)
        score = score_answers(self.run.task, self.setup.rows, "dev", dev, answers, tokenizer)
        if score.value > self.state.best:
            self.state.best, self.state.best_step = score.value, self.state.step
            self.state.evals_without_improvement = 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.prompted.state_dict().items()}
        else:
            self.state.evals_without_improvement += 1
        return score

    def _predict(self, prompted: PromptedModel, examples: Sequence[Example]) -> list[Answer]:
        """The answers to all examples in their order; each process computes its share."""
        with self.processes.forward_scope():
            local = self.processes.share(examples)
            padded = self.processes.pad_shard(local, examples)
            answers = answer(prompted, self.run.task, padded, max_new_tokens=self.settings.max_new_tokens)
        return self.processes.gather_in_order(answers[: len(local)])

    def _save_checkpoint(self) -> None:
        random = checkpoint.merge_random_states(self.processes.gather(checkpoint.random_states(self.backbone.device)))
        with self.processes.collective_errors():
            if self.processes.is_main and self.state.step not in checkpoint.steps(self.run.folder):
                saved = Checkpoint(
                    trainer_state=self.state,
                    prompt=self.prompted.state_dict(),
                    best=self.best,
                    optimizer=checkpoint.pack_optimizer(self.training_step.optimizer),
                    random=random,
                )
                checkpoint.save(self.run.folder, saved)

    def _restore(self, saved: Checkpoint) -> None:
        folder, device = checkpoint.folder_of(self.run.folder, saved.step), self.backbone.device
        if saved.best:  # loaded only to check them; the current tensors follow
            files.load_tensors(self.prompted, saved.best, str(folder / "best.safetensors"))
        files.load_tensors(self.prompted, saved.prompt, str(folder / "prompt.safetensors"))
        checkpoint.unpack_optimizer(saved.optimizer, self.training_step.optimizer, folder / "optimizer.safetensors")
        checkpoint.restore_random(saved.random, device, folder / "random.safetensors", self.processes.rank)
        self.state = saved.trainer_state
        self.best = {name: tensor.to(device) for name, tensor in saved.best.items()}
