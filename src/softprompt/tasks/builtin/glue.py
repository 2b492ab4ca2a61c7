"""GLUE's tasks but WNLI, each in three wordings.

`natural` is ours, `dpt` and `residual` are the papers', as in superglue.py; SST-2 has lm-evaluation-harness's
too. MNLI is scored on its matched rows.

Reference: Wang et al. 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softprompt.tasks.builtin.official import Official, Row, Rows, register_official
from softprompt.tasks.task import Template

HUB = "nyu-mll/glue"
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
_FILES = {"train": ("train.tsv",), "validation": ("dev.tsv",)}


def read_tsv(path: Path, header: Sequence[str] = (), short: bool = False) -> Iterator[dict[str, str]]:
    """The rows of one of GLUE's TSVs: cells stand as they are, a quotation mark is a letter like any other.

    Args:
        header: the columns' names, where the file has no line for them.
        short: leave out rows with too few cells; QQP's training file has some, and the hub's copy has not.

    Raises:
        ValueError: the file is not UTF-8, or a row has another number of cells than there are columns.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}); give the official file") from None
    # Not splitlines: it also breaks at characters that stand within GLUE's sentences.
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


def _prepare(columns: Sequence[str], row: Row) -> Rows:
    """Without the space that stands around some sentences."""
    yield {column: row[column].strip() for column in columns} | {"label": row["label"]}


def _prepare_stsb(row: Row) -> Rows:
    """The score as T5 writes it: to the nearest fifth. Differs from DPT's code, which rounds to the nearest tenth."""
    yield {
        "sentence1": row["sentence1"].strip(),
        "sentence2": row["sentence2"].strip(),
        "score": f"{round(float(row['label']) * 5) / 5:.1f}",
    }


def _official(folder: str, config: str, texts: Mapping[str, str], label: str = "label", **settings: Any) -> Official:
    """`texts` and `label` name the TSV's columns, by the hub's names."""
    prepare: Callable[[Row], Rows] = partial(_prepare, tuple(texts))
    chosen: dict[str, Any] = {"files": _FILES, "read": read_tsv, "labels": BINARY, "prepare": prepare, **settings}
    return Official(
        folder=folder, hub=HUB, config=config, flatten=partial(_flatten, {**texts, "label": label}), **chosen
    )


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _wordings(
    natural: str, dpt: str, labels: Sequence[str], ours: Sequence[str], theirs: Sequence[str], residual: str = ""
) -> Mapping[str, Template]:
    """Three wordings of a classification: our words, digits, and the label names of Residual Prompt Tuning."""
    digits = [str(number) for number in range(len(labels))]
    return {
        "natural": Template(text=natural, label_words=dict(zip(labels, ours, strict=True))),
        "dpt": Template(text=dpt, label_words=dict(zip(labels, digits, strict=True))),
        "residual": Template(text=residual or dpt, label_words=dict(zip(labels, theirs, strict=True))),
    }


SST2 = register_official(
    "sst2",
    _official("SST-2", "sst2", _same("sentence")),
    "Is a phrase of a film review for or against the film?",
    {
        **_wordings(
            "Review: {sentence}\nSentiment:",
            "sentence: {sentence}",
            BINARY,
            ours=("negative", "positive"),
            theirs=("negative", "positive"),
            residual="{sentence}",
        ),
        "lm-eval": Template(
            text="{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            label_words={"0": "negative", "1": "positive"},
        ),
    },
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
        # The one file without a line of names; `mark` is the linguists' own sign.
        read=partial(read_tsv, header=("origin", "label", "mark", "sentence")),
    ),
    "Is a sentence acceptable English?",
    _wordings(
        "{sentence}\nQuestion: Is this sentence grammatical?\nAnswer:",
        "sentence: {sentence}",
        BINARY,
        ours=("no", "yes"),
        theirs=("not_acceptable", "acceptable"),
        residual="{sentence}",
    ),
    label="label",
    metrics=("matthews", "accuracy"),
    max_input_tokens=128,
)
"""8,551 training and 1,043 validation rows."""

MRPC = register_official(
    "mrpc",
    _official("MRPC", "mrpc", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality"),
    "Do two sentences of the news say the same?",
    _wordings(
        "{sentence1}\n{sentence2}\nQuestion: Do these two sentences say the same?\nAnswer:",
        "sentence1: {sentence1} sentence2: {sentence2}",
        BINARY,
        ours=("no", "yes"),
        theirs=("not_equivalent", "equivalent"),
    ),
    label="label",
    metrics=("f1", "accuracy"),
    max_input_tokens=256,
)
"""3,668 training and 408 validation rows."""

QQP = register_official(
    "qqp",
    _official("QQP", "qqp", _same("question1", "question2"), "is_duplicate", read=partial(read_tsv, short=True)),
    "Do two questions ask the same?",
    _wordings(
        "{question1}\n{question2}\nQuestion: Do these two questions ask the same?\nAnswer:",
        "question1: {question1} question2: {question2}",
        BINARY,
        ours=("no", "yes"),
        theirs=("not_duplicate", "duplicate"),
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
    _wordings(
        '{premise}\nQuestion: Does this mean that "{hypothesis}"? Yes, no or maybe?\nAnswer:',
        "premise: {premise} hypothesis: {hypothesis}",
        ("entailment", "neutral", "contradiction"),
        ours=("yes", "maybe", "no"),
        theirs=("entailment", "neutral", "contradiction"),
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
    _wordings(
        "{sentence}\nQuestion: Does this answer the question: {question}\nAnswer:",
        "question: {question} sentence: {sentence}",
        ENTAILMENT,
        ours=("yes", "no"),
        theirs=ENTAILMENT,
        residual="text1: {question} text2: {sentence}",
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
    _wordings(
        '{sentence1}\nQuestion: Does this mean that "{sentence2}"? Yes or no?\nAnswer:',
        "sentence1: {sentence1} sentence2: {sentence2}",
        ENTAILMENT,
        ours=("yes", "no"),
        theirs=ENTAILMENT,
    ),
    label="label",
    group="sentence1",
    max_input_tokens=256,
)
"""2,490 training and 277 validation rows."""

STSB = register_official(
    "stsb",
    _official("STS-B", "stsb", _same("sentence1", "sentence2"), "score", labels=(), prepare=_prepare_stsb),
    "How alike are two sentences, from 0.0 to 5.0? Written out as a number.",
    {
        "natural": Template(
            text="{sentence1}\n{sentence2}\nQuestion: How alike are these two sentences, from 0.0 to 5.0?\nAnswer:"
        ),
        "dpt": Template(text="sentence1: {sentence1} sentence2: {sentence2}"),
        # The published target is the score's first three letters; ours is the same number as in the other wordings.
        "residual": Template(text="sentence1: {sentence1} sentence2: {sentence2}"),
    },
    target="score",
    metrics=("pearson", "spearman"),
    max_input_tokens=256,
)
"""5,749 training and 1,500 validation rows."""
