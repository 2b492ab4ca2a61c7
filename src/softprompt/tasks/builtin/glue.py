"""GLUE's tasks except WNLI, each in three wordings.

`natural` is ours, `dpt` and `residual` are the papers', as in superglue.py; SST-2 has lm-evaluation-harness's
too. MNLI is scored on its matched rows.

Reference: Wang et al. 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softprompt.tasks.builtin.official import Official, Row, Rows, register_official, wordings
from softprompt.tasks.task import Template

HUB = "nyu-mll/glue"
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
_FILES = {"train": ("train.tsv",), "validation": ("dev.tsv",)}


def read_tsv(path: Path, header: Sequence[str] = (), short: bool = False) -> Iterator[dict[str, str]]:
    """Read a TSV file of GLUE, in which quotation marks have no special meaning.

    Args:
        header: the column names, if the file has no header.
        short: skip rows with too few cells; QQP's training file has some, the Hub's copy has none.

    Raises:
        ValueError: the file is not UTF-8, or a row has more or fewer cells than there are columns.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}); give the official file") from None
    # Not splitlines: it also splits at characters that occur in GLUE's sentences.
    lines = [line.removesuffix("\r").split("\t") for line in text.rstrip("\r\n").split("\n")]
    names = list(header) or lines.pop(0)
    for number, cells in enumerate(lines, start=1):
        if short and len(cells) < len(names):
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"row {number} of {path} has {len(cells)} cells, but there are {len(names)} columns; "
                "give the official file"
            )
        yield dict(zip(names, cells, strict=True))


def _flatten(columns: Mapping[str, str], row: Row) -> Rows:
    yield {column: row[name] for column, name in columns.items()}


def _preprocess(columns: Sequence[str], row: Row) -> Rows:
    """Remove the space around some sentences."""
    yield {column: row[column].strip() for column in columns} | {"label": row["label"]}


def _preprocess_stsb(row: Row) -> Rows:
    """Round the score to the nearest fifth, as T5 does; DPT's code rounds to the nearest tenth."""
    yield {
        "sentence1": row["sentence1"].strip(),
        "sentence2": row["sentence2"].strip(),
        "score": f"{round(float(row['label']) * 5) / 5:.1f}",
    }


def _official(folder: str, config: str, texts: Mapping[str, str], label: str = "label", **settings: Any) -> Official:
    """`texts` maps the Hub's column names to those of the TSV; `label` is the TSV's column of labels."""
    preprocess: Callable[[Row], Rows] = partial(_preprocess, tuple(texts))
    defaults: dict[str, Any] = {"files": _FILES, "read": read_tsv, "labels": BINARY, "preprocess": preprocess}
    flatten = partial(_flatten, {**texts, "label": label})
    return Official(folder=folder, hub=HUB, config=config, flatten=flatten, **{**defaults, **settings})


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


SST2 = register_official(
    "sst2",
    _official("SST-2", "sst2", _same("sentence")),
    "Is a phrase from a film review positive or negative?",
    wordings(
        BINARY,
        natural=("Review: {sentence}\nSentiment:", ("negative", "positive")),
        dpt="sentence: {sentence}",
        residual=("{sentence}", ("negative", "positive")),
        lm_eval=("{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive")),
    ),
    label="label",
    max_input_tokens=128,
)
"""67,349 training and 872 validation rows."""

COLA = register_official(
    "cola",
    _official(
        "CoLA",
        "cola",
        _same("sentence"),
        # The only file without a header; `mark` is the linguists' own annotation.
        read=partial(read_tsv, header=("origin", "label", "mark", "sentence")),
    ),
    "Is a sentence acceptable English?",
    wordings(
        BINARY,
        natural=("{sentence}\nQuestion: Is this sentence grammatical?\nAnswer:", ("no", "yes")),
        dpt="sentence: {sentence}",
        residual=("{sentence}", ("not_acceptable", "acceptable")),
    ),
    label="label",
    metrics=("matthews", "accuracy"),
    max_input_tokens=128,
)
"""8,551 training and 1,043 validation rows."""

MRPC = register_official(
    "mrpc",
    _official("MRPC", "mrpc", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality"),
    "Do two sentences from the news have the same meaning?",
    wordings(
        BINARY,
        natural=("{sentence1}\n{sentence2}\nQuestion: Do these two sentences say the same?\nAnswer:", ("no", "yes")),
        dpt="sentence1: {sentence1} sentence2: {sentence2}",
        residual=("sentence1: {sentence1} sentence2: {sentence2}", ("not_equivalent", "equivalent")),
    ),
    label="label",
    metrics=("f1", "accuracy"),
    max_input_tokens=256,
)
"""3,668 training and 408 validation rows."""

QQP = register_official(
    "qqp",
    _official("QQP", "qqp", _same("question1", "question2"), "is_duplicate", read=partial(read_tsv, short=True)),
    "Are two questions duplicates of each other?",
    wordings(
        BINARY,
        natural=("{question1}\n{question2}\nQuestion: Do these two questions ask the same?\nAnswer:", ("no", "yes")),
        dpt="question1: {question1} question2: {question2}",
        residual=("question1: {question1} question2: {question2}", ("not_duplicate", "duplicate")),
    ),
    label="label",
    metrics=("f1", "accuracy"),
    max_input_tokens=256,
)
"""363,846 training and 40,430 validation rows."""

MNLI = register_official(
    "mnli",
    _official(
        "MNLI",
        "mnli",
        {"premise": "sentence1", "hypothesis": "sentence2"},
        "gold_label",
        labels=("entailment", "neutral", "contradiction"),
        files={"train": ("train.tsv",), "validation": ("dev_matched.tsv",)},
        hub_splits={"validation": "validation_matched"},
    ),
    "Does a text entail a sentence, contradict it, or neither? The matched validation rows.",
    wordings(
        ("entailment", "neutral", "contradiction"),
        natural=(
            '{premise}\nQuestion: Does this mean that "{hypothesis}"? Yes, no or maybe?\nAnswer:',
            ("yes", "maybe", "no"),
        ),
        dpt="premise: {premise} hypothesis: {hypothesis}",
        residual=("premise: {premise} hypothesis: {hypothesis}", ("entailment", "neutral", "contradiction")),
    ),
    label="label",
    group="premise",
    max_input_tokens=256,
)
"""392,702 training and 9,815 validation rows."""

QNLI = register_official(
    "qnli",
    _official("QNLI", "qnli", _same("question", "sentence"), labels=ENTAILMENT),
    "Does a sentence answer a question?",
    wordings(
        ENTAILMENT,
        natural=("{sentence}\nQuestion: Does this answer the question: {question}\nAnswer:", ("yes", "no")),
        dpt="question: {question} sentence: {sentence}",
        residual=("text1: {question} text2: {sentence}", ENTAILMENT),
    ),
    label="label",
    group="question",
    max_input_tokens=256,
)
"""104,743 training and 5,463 validation rows."""

GLUE_RTE = register_official(
    "glue-rte",
    _official("RTE", "rte", _same("sentence1", "sentence2"), labels=ENTAILMENT),
    "RTE with GLUE's field names: the rows are those of rte.",
    wordings(
        ENTAILMENT,
        natural=('{sentence1}\nQuestion: Does this mean that "{sentence2}"? Yes or no?\nAnswer:', ("yes", "no")),
        dpt="sentence1: {sentence1} sentence2: {sentence2}",
        residual=("sentence1: {sentence1} sentence2: {sentence2}", ENTAILMENT),
    ),
    label="label",
    group="sentence1",
    max_input_tokens=256,
)
"""2,490 training and 277 validation rows."""

STSB = register_official(
    "stsb",
    _official("STS-B", "stsb", _same("sentence1", "sentence2"), "score", labels=(), preprocess=_preprocess_stsb),
    "How similar are two sentences, from 0.0 to 5.0? Generated as a number.",
    {
        "natural": Template(
            text="{sentence1}\n{sentence2}\nQuestion: How alike are these two sentences, from 0.0 to 5.0?\nAnswer:"
        ),
        "dpt": Template(text="sentence1: {sentence1} sentence2: {sentence2}"),
        # The published target is the first three characters of the score; ours is the number of the other wordings.
        "residual": Template(text="sentence1: {sentence1} sentence2: {sentence2}"),
    },
    target="score",
    metrics=("pearson", "spearman"),
    max_input_tokens=256,
)
"""5,749 training and 1,500 validation rows."""
