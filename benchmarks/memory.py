"""Memory and time of a training step with gradient checkpointing or 4-bit weights, compared with a step without.

    python benchmarks/memory.py [--batch-size 8 32] [--tokens 128] [--length 100] [--dtype float32] [--rounds 3]

`checkpointing` is a step with `--gradient-checkpointing`; `nf4` is a step on a backbone with `--dtype nf4` (extra
`quantize`; its weights differ, so its loss is not compared); `both` combines them. The peer, `default`, is our own step
with unquantized weights and without checkpointing. The measurements and the JSON are described in harness.py; the
roofline is that of train_step.py and does not count recomputed layers twice.
"""

from typing import Any

from harness import Pair, Settings, WorkerSpec, main
from train_step import BACKBONE, ours, plain


def nf4(spec: WorkerSpec) -> Any:
    """The backbone with 4-bit weights."""
    from softprompt import load_backbone

    return load_backbone(BACKBONE, dtype="nf4", device="cpu")


if __name__ == "__main__":
    SIDES = {
        "default": ours(plain),
        "checkpointing": ours(plain, checkpointing=True),
        "nf4": ours(plain, nf4),
        "both": ours(plain, nf4, checkpointing=True),
    }
    PAIRS = [Pair("checkpointing", "default"), Pair("nf4", "default", same=False), Pair("both", "default", same=False)]
    main(__file__, SIDES, PAIRS, Settings(tokens=(128,), batch_size=(8, 32)), str(__doc__))
