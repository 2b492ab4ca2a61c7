"""How much a first step of Adam lowers the loss, to first order, relative to `plain` at the same rate and length.

    python benchmarks/first_step.py DATA

DATA is the official GLUE folder. The step is the rate times the gradient's sign, so it lowers the loss by the rate
times the sum of the absolute gradients of the parameters. The gradient is the mean of two batches at the start.
"""

import argparse

import torch

from softprompt import DPT, Experiment, Plain, load_backbone, load_task
from softprompt.evaluation.evaluate import read_splits
from softprompt.training.gradients import gradient_on

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("data", help="the official GLUE folder")
DATA = arguments.parse_args().data
BACKBONE = load_backbone("smollm2-135m")
RMS = BACKBONE.host().rms

for name, data in (("sst2", DATA), ("sentiment", None)):
    task = load_task(name, data)
    for length in (100, 20):
        experiment = Experiment(task=name, data=data, prompt=Plain(length=length))
        gradient_at = gradient_on(experiment, task, BACKBONE, read_splits(experiment, task).train)
        for seed in (0, 1):
            start = Plain(length=length).build(BACKBONE.host(), torch.Generator().manual_seed(seed)).prompt().detach()
            gradient = gradient_at(start, 2)
            for rank in (10, 1):
                for label, scale in (("default scale", None), ("RMS / sqrt(rank)", RMS / rank**0.5)):
                    config = DPT(length=length, rank=rank, scale=scale)
                    prompt = config.build(BACKBONE.host(), torch.Generator().manual_seed(seed))
                    parts = torch.autograd.grad((prompt.prompt() * gradient).sum(), list(prompt.parameters()))
                    ratio = sum(float(part.abs().sum()) for part in parts) / (RMS * float(gradient.abs().sum()))
                    print(f"{name} length {length} seed {seed} rank {rank} {label}: {ratio:.2f}", flush=True)
