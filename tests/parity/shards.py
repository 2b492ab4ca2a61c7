"""Backbones whole and shared out: `python shards.py BACKBONES` forks two processes, which meet in each pass.

BACKBONES holds `{name: (backbone, attend)}`, saved by torch. Each process leaves `N.pt` beside it: by name its own
rows' loss, gradients, scores and generated tokens, how many of the layers' numbers it holds, where the rest lies, and
the backbone's checksum: of the whole backbone, of the sharded one, and of that with layers computed again.
"""

import os
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from cases import attached, loss_of
from torch.distributed.tensor import DTensor

from softprompt import Backbone
from softprompt.backbones import fsdp
from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing, layers
from softprompt.models import PromptedModel, attach


def said(prompted: PromptedModel, index: int, recompute: bool = False) -> dict[str, Any]:
    """What comes of this process's own rows, of which each has another number."""
    backbone = prompted.backbone
    with gradient_checkpointing(backbone.model, recompute):
        loss = loss_of(prompted, 3 + index, seed=index)
        gradients = torch.autograd.grad(loss, list(prompted.parameters()))
    held = [weights for layer in layers(backbone.model) for weights in layer.parameters()]
    actual = {
        "loss": loss.detach(),
        "gradients": gradients,
        "held": sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in held),
        "rest": next(backbone.model.parameters()).data_ptr(),
        "checksum": backbone.checksum(),
    }
    if backbone.architecture != "vision":
        ids = torch.randint(3, 200, (2 + index, 9 + index), generator=torch.Generator().manual_seed(9 + index))
        answers = [[1], [2], [0]] if backbone.architecture == "encoder" else [[11, 12], [13], [14, 15, 16]]
        scores = prompted.score(ids, None, answers)
        actual["scores"] = scores.detach(), torch.autograd.grad(scores[:, 0].sum(), list(prompted.parameters()))
        if backbone.architecture in ("causal", "encoder_decoder"):
            ever = torch.stack(list(prompted.generate(ids, max_new_tokens=6, stop=[])), 1)
            stop = set(ever[:, 0].tolist()) if index == 0 else set()  # this one ends at once, the other never
            actual["tokens"], actual["ever"] = list(prompted.generate(ids, max_new_tokens=6, stop=list(stop))), ever
    return actual


def child(index: int, port: int, backbones: dict[str, tuple[Backbone, Any]], out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), world_size=2, rank=index
    )
    actual = {}
    for name, (backbone, prompt_attention) in backbones.items():
        full = attached(backbone, prompt_attention)
        before = said(full, index)
        fsdp.shard(backbone.model, "cpu")
        parts = attach(backbone, full.prompt, head=full.head, prompt_attention=prompt_attention)
        actual[name] = before, said(parts, index), said(parts, index, recompute=True)
    torch.save(actual, out / f"{index}.pt")


def main(file: Path) -> None:
    backbones = torch.load(file, weights_only=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(2):
        if (process := os.fork()) == 0:
            code = 1
            try:
                child(index, port, backbones, file.parent)
                code = 0
            except Exception:
                traceback.print_exc()
            os._exit(code)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
