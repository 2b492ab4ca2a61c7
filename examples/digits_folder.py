"""MNIST's digits as a user's folder of class folders: digits/0/0001.png and so on.

Then the folder is a task:

    python examples/digits_folder.py digits --each 50
    softprompt train --backbone facebook/dinov2-small --task digits --image-size 56 plain --length 10
    softprompt predict runs/digits-plain-0 --input digits/7
"""

import argparse
from collections import Counter
from pathlib import Path

from softprompt import load_task
from softprompt.backbones.image_processor import read
from softprompt.tasks import splits


def main(folder: str, each: int = 50) -> int:
    """Write `each` training images of every digit; how many there are."""
    written: Counter[str] = Counter()
    for row in splits(load_task("mnist")).train:
        digit = row["label"]
        if written[digit] < each:
            written[digit] += 1
            file = Path(folder) / digit / f"{written[digit]:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            read(row["image"]).save(file)
    return written.total()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="where the folders go")
    parser.add_argument("--each", type=int, default=50, help="images of every digit")
    given = parser.parse_args()
    print(f"{main(given.folder, given.each)} images in {given.folder}")
