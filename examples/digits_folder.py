"""Write MNIST's digits into a folder with one subfolder per class: digits/0/0001.png and so on.

The folder can then be used as a task:

    python examples/digits_folder.py digits --each 50
    softprompt train --backbone facebook/dinov2-small --task digits --image-size 56 plain --length 10
    softprompt predict runs/digits-plain-0 --input digits/7
"""

import argparse
from collections import Counter
from pathlib import Path

from softprompt import load_task
from softprompt.backbones.image_processor import read
from softprompt.tasks.data.splits import splits


def main(folder: str, each: int = 50) -> int:
    """Write `each` training images per digit; return their number."""
    counts: Counter[str] = Counter()
    for row in splits(load_task("mnist")).train:
        digit = row["label"]
        if counts[digit] < each:
            counts[digit] += 1
            file = Path(folder) / digit / f"{counts[digit]:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            read(row["image"]).save(file)
    return counts.total()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="output folder")
    parser.add_argument("--each", type=int, default=50, help="images per digit")
    arguments = parser.parse_args()
    print(f"{main(arguments.folder, arguments.each)} images in {arguments.folder}")
