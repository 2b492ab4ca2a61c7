"""What users do with a model, from training to serving, on one device; every number that comes out.

`python journeys.py JOB` runs in a process of its own. JOB is a JSON file: the tiny models' folders and tasks, and the
devices. The result is written beside it.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pretend
import strict
import torch

import softprompt
from softprompt import Backbone, Experiment, Progress, Run, Sampling, TrainingConfig, attach
from softprompt.analysis.rank import Truncation, gradient_spectra, measure
from softprompt.backbones import precision
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.predict import predict
from softprompt.export import FORMATS, export_runs
from softprompt.prompts import METHODS, PromptConfig
from softprompt.runs import build_prompted_model
from softprompt.serve import Engine, Limits
from softprompt.training.callbacks import NullCallback
from softprompt.training.concurrent import run_concurrently
from softprompt.training.step import differentiate

TEXTS = ("a a a", "c", "b b b b b b a", "Ticket: e e")
PROMPTS: Mapping[str, PromptConfig] = {
    "llama": METHODS["dpt"](rank=2, length=5),
    "t5": METHODS["adept"](length=4, width=3),
    "bert": METHODS["dpt"](rank=2, length=4),
    "bert_mlm": METHODS["dpt"](rank=2, length=4),
    "vit": METHODS["dpt"](rank=2, length=3),
}
"""What each model is trained with; `adept` also changes the text's embeddings."""
EXPORTS = {
    "llama": ("peft", "vocab", "gguf", "vllm", "trtllm", "llamacpp", "npz"),
    "t5": ("npz",),
    "bert_mlm": ("npz",),
}
LAYOUTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "llama": ({"prompt_position": "after_bos"}, {"prompt_position": "suffix"}),
    "t5": ({"prompt_attention": "self"},),
    "bert_mlm": ({"prompt_attention": "self"},),
}
"""Other positions of a prompt, and other attention."""
STEPS = 5
SMALL = {"length": 4, "rank": 2, "width": 4, "positions": 30}


class Stopped(Exception):
    """Ends a training as a kill would."""


class StopAt(NullCallback):
    """Ends the training after a step."""

    def on_step(self, progress: Progress) -> None:
        """Raise at step 3, one after a checkpoint."""
        if progress.step == 3:
            raise Stopped


@contextmanager
def auto_device(device: str) -> Iterator[None]:
    """Make `device` the one that `auto` stands for, as it is on a machine with that accelerator."""
    choose = precision.resolve_device
    precision.resolve_device = lambda name: choose(device if name == "auto" else name)
    try:
        yield
    finally:
        precision.resolve_device = choose


def numbers(values: Any) -> Any:
    """Tensors as lists of numbers."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().tolist()
    if isinstance(values, Mapping):
        return {str(key): numbers(value) for key, value in values.items()}
    return [numbers(value) for value in values] if isinstance(values, (list, tuple)) else values


class Journey:
    """The journey of one model on one device: each method is a stage; later ones use the run of the first."""

    def __init__(self, model: str, source: str, task: str, folder: Path) -> None:
        self.model, self.source, self.task, self.folder = model, source, task, folder
        self.run: Run | None = None

    @cached_property
    def backbone(self) -> Backbone:
        """The model on the device, for stages that need not load it themselves."""
        return softprompt.load_backbone(self.source, dtype="float32")

    @property
    def experiment(self) -> Experiment:
        training = TrainingConfig(steps=STEPS, batch_size=4, eval_steps=2, dev_rows=4, test_rows=6, max_new_tokens=3)
        prompt, source = PROMPTS[self.model], self.source
        return Experiment(backbone=source, task=self.task, prompt=prompt, training=training, dtype="float32")

    def train(self) -> Any:
        """Steps with gradients, evaluations and the final test."""
        self.run = softprompt.train(self.experiment, out=self.folder, name=f"{self.model}-run")
        assert self.run.results is not None
        answers = [line["answer"] for line in self.run.predictions()]
        losses = [line["loss"] for line in self.run.metrics()]
        fresh = build_prompted_model(self.experiment, self.run.task, self.backbone, initialize=False)
        trained = self.run.prompted(self.backbone)
        devices = {tensor.device for model in (fresh, trained) for tensor in model.state_dict().values()}
        return {
            "losses": losses,
            "test": self.run.results["test"],
            "answers": answers,
            "on_device": devices == {self.backbone.device},
        }

    def resume(self) -> Any:
        """The same training, killed after a checkpoint and resumed: equal bits on its device."""
        assert self.run is not None
        name = f"{self.model}-stopped"
        try:
            softprompt.train(self.experiment, out=self.folder, name=name, backbone=self.backbone, callback=StopAt())
        except Stopped:
            resumed = softprompt.resume(self.folder / name)
        files = ("metrics.jsonl", "softprompt.safetensors", "predictions.jsonl")
        return [(resumed.folder / file).read_bytes() == (self.run.folder / file).read_bytes() for file in files]

    def evaluate(self) -> Any:
        """The score on a split of the finished run."""
        assert self.run is not None
        return evaluate(self.run.folder, split="dev", backbone=self.backbone).value

    def predict(self) -> Any:
        """Answers to rows without labels."""
        assert self.run is not None
        rows = list(TEXTS) if self.model != "vit" else self._images()
        return [
            dict(answer.probabilities) or answer.text
            for answer in predict(self.run.folder, rows, backbone=self.backbone)
        ]

    def _images(self) -> list[dict[str, str]]:
        return [{"image": str(path)} for path in sorted(Path(self.task).glob("*/*.png"))[::11]]

    def serve(self) -> Any:
        """Requests to the service's engine."""
        assert self.run is not None
        result: dict[str, Any] = {}
        with Engine(self.backbone, Limits(max_batch=4, timeout=60.0)) as engine:
            engine.add("run", self.run.folder)
            rows: Sequence[Any] = TEXTS
            if self.model == "vit":
                rows = [Path(row["image"]).read_bytes() for row in self._images()]
            labels = ("yes", "no", "maybe") if self.model == "t5" else None
            requests = engine.classify("run", rows, labels)
            result["scores"] = [request.result(60.0).logprobs for request in requests]
            if self.model in ("llama", "t5"):
                lengths = (2, 5, 3, 6)
                texts = [
                    engine.generate("run", text, max_new_tokens=length)
                    for text, length in zip(TEXTS, lengths, strict=True)
                ]
                result["tokens"] = [list(request.result(60.0).tokens) for request in texts]
                drawn = engine.generate("run", TEXTS[0], max_new_tokens=4, sampling=Sampling(temperature=1.0, seed=3))
                result["drawn"] = list(drawn.result(60.0).tokens)
        return result

    def export(self) -> Any:
        """Each format that can hold the run: written, read back and compared with the live model."""
        assert self.run is not None
        for form in EXPORTS[self.model]:
            export_runs([self.run], FORMATS[form], self.folder / f"{self.model}-{form}", backbone=self.backbone)
        return list(EXPORTS[self.model])

    def rank(self) -> Any:
        """Spectra along the run, truncations with their scores, and the gradient's spectrum."""
        assert self.run is not None
        [ranks] = measure(self.run.folder, checkpoints=True, functional=Truncation(ranks=(1, 2), rows=6))
        assert ranks.functional is not None
        result = {
            "values": {name: spectrum.values for name, spectrum in ranks.spectra.items()},
            "history": len(ranks.history),
            "truncations": [cut.score.value for cut in ranks.functional.truncations],
        }
        if self.model in ("llama", "bert_mlm"):
            result["gradient"] = [point.spectrum.values for point in gradient_spectra(self.run.folder, batches=1)]
        return result

    def prompts(self) -> Any:
        """Every method: loss, gradients, and several prompts over one batch; greedy and drawn text."""
        backbone, result, folded = self.backbone, dict[str, Any](), []
        for name, config in METHODS.items():
            prompt = small(config).build(backbone.host(("yes", "no")), torch.Generator().manual_seed(0))
            prompted = attach(backbone, prompt.to(backbone.device))
            ids, mask, labels = batch(backbone)
            loss = prompted(ids, mask, labels=labels).loss
            loss.backward()
            norms = {part: parameter.grad.norm() for part, parameter in prompt.named_parameters()
                     if parameter.grad is not None}  # fmt: skip
            result[name] = {"loss": loss, "norms": norms}
            folded.append(prompt.fold())
        for layout in LAYOUTS[self.model]:
            prompt = small(METHODS["dpt"]).build(backbone.host(("yes", "no")), torch.Generator().manual_seed(0))
            prompted = attach(backbone, prompt.to(backbone.device), **layout)
            ids, mask, labels = batch(backbone)
            loss = prompted(ids, mask, labels=labels).loss
            loss.backward()
            norms = [parameter.grad.norm() for parameter in prompt.parameters() if parameter.grad is not None]
            with torch.no_grad():
                prepared = prompted.prepare([prompt])
                scores = prompted.score(ids, mask, [(5,), (7,)], prompts=prepared)
            result[str(layout)] = {"loss": loss, "norms": norms, "scores": scores}
        model = attach(backbone)
        ids, mask, _ = batch(backbone)
        index = torch.tensor([2, 0, len(folded) - 1, 0], device=backbone.device)
        candidates = [(5,), (7, 9), (8, 4, 6)] if self.model != "bert_mlm" else [(5,), (7,)]
        with torch.no_grad():
            prepared = model.prepare(folded)
            for kind, prompts in (("live", folded), ("prepared", prepared)):
                result[kind] = model.score(ids, mask, candidates, prompts=prompts, index=index)
            if self.model != "bert_mlm":
                greedy = model.generate(ids, mask, max_new_tokens=4, stop=[], prompts=prepared, index=index)
                result["greedy"] = list(greedy)
                sampling = Sampling(temperature=1.3, top_k=5, top_p=0.9, seed=1)
                drawn = model.generate(ids, mask, max_new_tokens=4, sampling=sampling, prompts=prepared, index=index)
                result["drawn"] = len(list(drawn))
        return result

    def together(self) -> Any:
        """Two runs that share their forward passes, a distillation of demonstrations, and a deep prompt."""
        training = dataclasses.replace(self.experiment.training, steps=2)
        first = self.experiment.replace(training=training)
        second = first.replace(prompt=METHODS["adept"](length=3, width=4), seed=1)
        taught, deep = first.replace(demonstrations=2), first.replace(depth="deep")

        def job(experiment: Experiment, name: str) -> Any:
            return lambda compute: softprompt.train(
                experiment, out=self.folder, name=name, backbone=self.backbone, differentiate=compute
            )

        runs = [*run_concurrently([job(first, "first"), job(second, "second")], 2)]
        runs = [
            *sorted(runs, key=lambda run: run.name),
            *(job(each, name)(differentiate) for each, name in ((taught, "taught"), (deep, "deep"))),
        ]
        return [[line["loss"] for line in run.metrics()] for run in runs]

    def layers(self) -> Any:
        """How often the host waits for the device in a training step, with N layers and with 2 N."""
        counts = []
        backbone = softprompt.load_backbone(self.source, dtype="float32")
        prompt = PROMPTS[self.model].build(backbone.host(("yes",)), torch.Generator().manual_seed(0))
        head = softprompt.models.fresh_head(backbone, 2, torch.Generator().manual_seed(0))
        for times in (1, 2):
            repeat_layers(backbone.model, times)
            prompted = attach(backbone, prompt.to(backbone.device), head=head)
            ids, mask, labels = batch(backbone)
            if head is not None:
                labels = labels % 2
            pretend.syncs.clear()
            prompted(ids, mask, labels=labels).loss.backward()
            counts.append(dict(pretend.syncs))
        return counts


STAGES = ("train", "resume", "evaluate", "predict", "serve", "export", "rank", "prompts", "together", "layers")
SKIPPED = {
    *(("bert", stage) for stage in ("resume", "export", "rank", "layers")),  # bert_mlm does them
    *(("vit", stage) for stage in ("export", "layers")),  # no format has images
    *((model, "prompts") for model in ("bert", "vit")),  # no method's prompt needs a head
    *((model, "together") for model in ("t5", "bert", "bert_mlm", "vit")),  # a matter of threads, not of models
}
"""What would only repeat another stage. On the CPU, `resume` and `layers` are left out: tests/fault resumes there."""


def small(config: type[PromptConfig]) -> PromptConfig:
    """The method with small settings."""
    settings = config()
    return settings.replace(**{name: value for name, value in SMALL.items() if hasattr(settings, name)})


def batch(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four rows of token ids of several lengths, their mask, and labels as the architecture takes them."""
    ids = torch.randint(3, 290, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 5, 1)):
        mask[row, :padding] = 0
    labels = torch.full_like(ids, -100)
    if backbone.architecture == "encoder":
        labels = torch.tensor([[7], [5], [7], [5]])
    elif backbone.architecture == "encoder_decoder":
        labels = torch.tensor([[7, 9, 1], [5, 1, -100], [8, 1, -100], [6, 6, 1]])
    else:
        labels[:, -2:] = ids[:, -2:]
    return ids.to(backbone.device), mask.to(backbone.device), labels.to(backbone.device)


def repeat_layers(model: Any, times: int) -> None:
    """Let the model run through its layers several times."""
    for module in model.modules():
        for name, layers in module.named_children():
            if isinstance(layers, torch.nn.ModuleList) and len(layers) == 2 and name in ("layers", "layer", "block"):
                setattr(module, name, torch.nn.ModuleList([*layers] * times))
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if isinstance(getattr(model.config, name, None), int):
            setattr(model.config, name, getattr(model.config, name) * times)


def main(job: Path) -> None:
    """Run the journeys of a job, each stage on every device, and write what came out."""
    settings = json.loads(job.read_text())
    results: dict[str, Any] = {"seconds": {}}
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # a run's curve would take a third of the time
    if "cuda" in settings["devices"]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = False
    if "pretend" in settings["devices"]:
        pretend.register()
        results["pretend"] = refusals()
    for device in settings["devices"]:
        with auto_device(device), strict.strict_devices() as faults:
            for model, (source, task) in settings["models"].items():
                folder = job.parent / device
                folder.mkdir(exist_ok=True)
                journey = Journey(model, source, task, folder)
                for stage in STAGES:
                    if (model, stage) in SKIPPED or (device == "cpu" and stage in ("resume", "layers")):
                        continue
                    started = time.perf_counter()
                    try:
                        value = numbers(getattr(journey, stage)())
                    except Exception:
                        value = {"error": traceback.format_exc()[-3000:]}
                    results[f"{model} {stage} {device}"] = value
                    results["seconds"][f"{model} {stage} {device}"] = round(time.perf_counter() - started, 2)
            results[f"faults {device}"] = sorted(set(faults))
    job.with_suffix(".result.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # the thread in which autograd serves the pretend device never ends


def refusals() -> dict[str, str]:
    """What the pretend device does with mistakes: each one's error, or an empty string where there is none."""
    on_device, on_cpu = torch.ones(2, 3, device=pretend.NAME), torch.ones(2, 3)
    mistakes = {
        "add": lambda: on_device + on_cpu,
        "matmul": lambda: on_device @ on_cpu.T,
        "cat": lambda: torch.cat([on_device, on_cpu]),
        "index": lambda: on_device[torch.tensor([0])],
        "numpy": lambda: on_device.numpy(),
        "scalar": lambda: on_device * torch.tensor(2.0),
        "copy": lambda: on_device.copy_(on_cpu),
    }
    errors = {}
    for name, call in mistakes.items():
        try:
            call()
            errors[name] = ""
        except (RuntimeError, TypeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
