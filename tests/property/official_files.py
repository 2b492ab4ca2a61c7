"""Official folders of SuperGLUE and GLUE with a few rows of our own, for tests."""

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "official"
SUPERGLUE = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "wsc-positives": "WSC",
    "axb": "AX-b",
    "axg": "AX-g",
}
GLUE = {
    "sst2": "SST-2",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "glue-rte": "RTE",
    "stsb": "STS-B",
}
DIAGNOSTIC = ("axb", "axg")
TRAINED = [name for name in SUPERGLUE if name not in DIAGNOSTIC]

Rows = list[dict[str, Any]]


def rows_of(name: str) -> Rows:
    """Three rows of ours in a task's official format; `§` becomes a number in those that are many."""
    rows: Rows = json.loads((GOLDEN / "rows.json").read_text())[name]
    return rows


def many(name: str, copies: int) -> Rows:
    """The three rows again and again, each time with other texts, numbered through."""
    text = json.dumps(rows_of(name), ensure_ascii=False)
    rows = [row for number in range(copies) for row in json.loads(text.replace("§", str(number)))]
    return [{**row, "idx": number} for number, row in enumerate(rows)]


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_superglue(folder: Path, copies: int = 6, validation: str = "val.jsonl") -> Path:
    """SuperGLUE's folder as it is downloaded."""
    for name, subfolder in SUPERGLUE.items():
        if name == "wsc-positives":
            continue
        (folder / subfolder).mkdir(parents=True)
        if name in DIAGNOSTIC:
            (folder / subfolder / f"{subfolder}.jsonl").write_text(lines(many(name, copies)))
        else:
            (folder / subfolder / "train.jsonl").write_text(lines(many(name, copies)))
            (folder / subfolder / validation).write_text(lines(many(name, copies + 2)))
            unlabeled = [{key: value for key, value in row.items() if key != "label"} for row in many(name, 1)]
            (folder / subfolder / "test.jsonl").write_text(lines(unlabeled))
    return folder


def write_glue(folder: Path, copies: int = 6) -> Path:
    """GLUE's folder: TSVs without quoting, CoLA's without a header, MRPC's with a byte order mark."""
    for name, subfolder in GLUE.items():
        (folder / subfolder).mkdir(parents=True)
        for file, more in (("train", 0), ("dev_matched" if name == "mnli" else "dev", 2)):
            rows = many(name, copies + more)
            table = [[value for key, value in row.items() if key != "idx"] for row in rows]
            header = [[key for key in rows[0] if key != "idx"]] if name != "cola" else []
            text = "".join("\t".join(row) + "\n" for row in header + table)
            (folder / subfolder / f"{file}.tsv").write_text(text, encoding="utf-8-sig" if name == "mrpc" else "utf-8")
    return folder


def folder_of(name: str, superglue: Path, glue: Path) -> Path:
    return superglue if name in SUPERGLUE else glue
