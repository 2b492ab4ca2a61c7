"""Time of one training step of each text method, alternating in one process.

    python benchmarks/methods.py [--backbone smollm2-135m] [--tokens 30] [--batch-size 16] [--rounds 5]

The sizes are those of docs/results/methods. A step is the scores of the label words, cross-entropy, backward, and
AdamW. The first round is a warm-up. The last line of stdout is JSON: the median seconds of each method, and the load
average before the start.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, final

import tyro

SIZES: dict[str, dict[str, Any]] = {
    "plain": {"length": 20},
    "dpt": {"length": 20, "rank": 10},
    "residual": {"length": 20, "width": 100},
    "dept": {"length": 10, "rank": 8, "positions": 128},
    "adept": {"length": 10, "width": 5},
}


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all methods."""

    backbone: str = "smollm2-135m"
    """Hub id, folder, .gguf file or asset."""
    tokens: int = 30
    """Tokens per row."""
    batch_size: int = 16
    """Rows per step."""
    rounds: int = 5
    """Timed steps of each method, after one warm-up."""


def main(settings: Settings) -> None:
    import torch

    from softprompt import METHODS, attach, load_backbone
    from softprompt.models import fresh_head

    load = os.getloadavg()[0]
    backbone = load_backbone(settings.backbone)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(
        1000, backbone.host().embedding.shape[0], (settings.batch_size, settings.tokens), generator=draw
    )
    classes = torch.zeros(settings.batch_size, dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in SIZES}
    models = {}
    for name, sizes in SIZES.items():
        prompt = METHODS[name](**sizes).build(backbone.host(), torch.Generator().manual_seed(0))
        model = attach(backbone, prompt, head=fresh_head(backbone, 2, torch.Generator().manual_seed(0)))
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(settings.rounds + 1):
        for name, (model, optimizer) in models.items():
            start = time.perf_counter()
            scores = model.score(ids, torch.ones_like(ids), [[5], [9]])
            torch.nn.functional.cross_entropy(scores, classes).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(times[1:]), 3) for name, times in seconds.items()}
    print(json.dumps({"benchmark": "methods", "backbone": settings.backbone, "load_before": load, "seconds": medians}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
