"""Memory and seconds of a training step whose layers are computed again, or quantised, beside ours without either.

    python benchmarks/memory.py [--batch-size 8 32] [--tokens 128] [--length 100] [--dtype float32] [--rounds 3]

`recomputed` is a step under `--gradient-checkpointing`, `nf4` one of a backbone of `--dtype nf4` (extra `quantize`; its
weights are others, so its loss is not compared), `both` is both. The peer is ourselves: the same step of whole weights,
keeping what it needs. sides.py says how they are measured and what the JSON holds; the floor is train_step.py's, in
which layers that are computed again count once.
"""

from typing import Any

from sides import Pair, Part, Settings, main
from train_step import BACKBONE, ours, plain


def nf4(part: Part) -> Any:
    """The backbone in four bits a weight."""
    from softprompt import load_backbone

    return load_backbone(BACKBONE, dtype="nf4", device="cpu")


if __name__ == "__main__":
    SIDES = {
        "kept": ours(plain),
        "recomputed": ours(plain, recompute=True),
        "nf4": ours(plain, nf4),
        "both": ours(plain, nf4, recompute=True),
    }
    PAIRS = [Pair("recomputed", "kept"), Pair("nf4", "kept", same=False), Pair("both", "kept", same=False)]
    main(__file__, SIDES, PAIRS, Settings(tokens=(128,), batch=(8, 32)), str(__doc__))
