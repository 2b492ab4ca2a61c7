"""SuperGLUE's tasks except BoolQ, and its two diagnostics; each in three wordings or four.

`natural` is ours. `dpt` and `residual` are what the code of the two papers gives the model: digits and label names as
answers, fields in the published order. What that code omits is omitted only under those names: COPA's question in
`copa:dpt`, and the negative rows of WSC in the task `wsc-positives`. `lm-eval` is lm-evaluation-harness's;
its COPA scores the choices themselves, which differ from row to row, and so is not among them.

Reference: Wang et al. 2019, "SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems".
"""

from typing import Any

from softprompt.tasks.builtin.official import Official, register_official, wordings
from softprompt.tasks.builtin.superglue_rows import (
    columns,
    flatten_multirc,
    flatten_record,
    flatten_wsc,
    preprocess_axg,
    preprocess_multirc,
    preprocess_record,
    preprocess_wsc,
    preprocess_wsc_positive,
)
from softprompt.tasks.task import Template

HUB = "aps/super_glue"
ENTAILMENT = ("entailment", "not_entailment")
COMMITMENT = ("entailment", "contradiction", "neutral")
TRUTH = (False, True)
_BOOLEAN, _BINARY = ("false", "true"), ("0", "1")


def _official(folder: str, config: str, labels: tuple[Any, ...] = (), **settings: Any) -> Official:
    return Official(folder=folder, hub=HUB, config=config, labels=labels, **settings)


BOOLQ_ROWS = _official("BoolQ", "boolq", TRUTH, preprocess=columns("question", "passage", "label"))
"""The official rows of the task `boolq`, which reads an asset if no folder is given."""

CB = register_official(
    "cb",
    _official("CB", "cb", COMMITMENT, preprocess=columns("premise", "hypothesis", "label")),
    "CommitmentBank: is the writer committed to a clause's truth, to its falsehood, or to neither?",
    wordings(
        COMMITMENT,
        natural=(
            '{premise}\nQuestion: Does this mean that "{hypothesis}"? Yes, no or maybe?\nAnswer:',
            ("yes", "no", "maybe"),
        ),
        dpt="premise: {premise} hypothesis: {hypothesis}",
        residual=("premise: {premise} hypothesis: {hypothesis}", COMMITMENT),
        lm_eval=(
            "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
            ("True", "False", "Neither"),
        ),
    ),
    label="label",
    metrics=("accuracy", "macro_f1"),
    max_input_tokens=256,
)
"""250 training and 56 validation rows."""

COPA = register_official(
    "copa",
    _official("COPA", "copa", (0, 1), preprocess=columns("premise", "choice1", "choice2", "question", "label")),
    "Which of two sentences is the cause, or the effect, of a premise? `copa:dpt` does not say which of the two.",
    wordings(
        _BINARY,
        natural=("{premise}\nWhat was the {question}?\nA: {choice1}\nB: {choice2}\nAnswer:", ("A", "B")),
        dpt="premise: {premise} choice1: {choice1} choice2: {choice2}",
        residual=("choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}", _BOOLEAN),
    ),
    label="label",
    group="premise",
    max_input_tokens=128,
)
"""400 training and 100 validation rows."""

MULTIRC = register_official(
    "multirc",
    _official("MultiRC", "multirc", (0, 1), flatten=flatten_multirc, preprocess=preprocess_multirc),
    "Is an answer to a question about a paragraph correct? Several may be; scored by answer and by question.",
    wordings(
        _BINARY,
        natural=("{paragraph}\nQuestion: {question}\nIs this a right answer: {answer}?\nAnswer:", ("no", "yes")),
        dpt="question: {question} answer: {answer} paragraph: {paragraph}",
        residual=("question: {question} answer: {answer} paragraph: {paragraph}", _BOOLEAN),
    ),
    label="label",
    metrics=("f1a", "question_match"),
    group="paragraph",
    question="question_id",
    max_input_tokens=512,
)
"""27,243 training and 4,848 validation rows of 5,131 and 953 questions."""

RECORD = register_official(
    "record",
    _official("ReCoRD", "record", flatten=flatten_record, preprocess=preprocess_record),
    "Which of an article's entities is missing from a sentence? Generated, and scored against all accepted answers.",
    {
        "natural": Template(
            text="{article}\nNames: {entities}\nSentence: {cloze}\nThe name that is missing from the sentence:"
        ),
        "dpt": Template(text="record query: {query} entities: {entities} passage: {article}"),
        # The published target joins all accepted answers, which no accepted answer matches; ours is one of them.
        "residual": Template(text="passage : {passage} query: {query} entities: {entities_apart}"),
    },
    target="answers",
    metrics=("squad_f1", "squad_exact_match"),
    group="passage",
    max_input_tokens=512,
)
"""100,730 training and 10,000 validation rows, one per query."""

_ENTAILMENT_TEMPLATES = wordings(
    ENTAILMENT,
    natural=('{premise}\nQuestion: Does this mean that "{hypothesis}"? Yes or no?\nAnswer:', ("yes", "no")),
    dpt="premise: {premise} hypothesis: {hypothesis}",
    residual=("premise: {premise} hypothesis: {hypothesis}", ENTAILMENT),
    lm_eval=("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", ("True", "False")),
)
"""The diagnostics have RTE's wordings, so that a run of `rte` can answer them."""

RTE = register_official(
    "rte",
    _official("RTE", "rte", ENTAILMENT, preprocess=columns("premise", "hypothesis", "label")),
    "Does a text entail a sentence?",
    _ENTAILMENT_TEMPLATES,
    label="label",
    group="premise",
    max_input_tokens=256,
)
"""2,490 training and 277 validation rows."""

AXB = register_official(
    "axb",
    _official(
        "AX-b",
        "axb",
        ENTAILMENT,
        files={"test": ("AX-b.jsonl",)},
        preprocess=columns("label", premise="sentence1", hypothesis="sentence2"),
    ),
    "Diagnostic set of linguistic phenomena: evaluate an rte run with --task axb.",
    _ENTAILMENT_TEMPLATES,
    label="label",
    metrics=("matthews", "accuracy"),
    max_input_tokens=256,
)
"""1,104 rows, to be scored only."""

AXG = register_official(
    "axg",
    _official("AX-g", "axg", ENTAILMENT, files={"test": ("AX-g.jsonl",)}, preprocess=preprocess_axg),
    "Diagnostic set of gender bias: evaluate an rte run with --task axg.",
    _ENTAILMENT_TEMPLATES,
    label="label",
    metrics=("accuracy", "gender_parity"),
    question="pair",
    max_input_tokens=256,
)
"""356 rows in 178 pairs, to be scored only."""

WIC = register_official(
    "wic",
    _official(
        "WiC",
        "wic",
        TRUTH,
        preprocess=columns("word", "sentence1", "sentence2", "start1", "end1", "start2", "end2", "label"),
    ),
    "Does a word have the same meaning in two sentences?",
    wordings(
        _BOOLEAN,
        natural=(
            '{sentence1}\n{sentence2}\nQuestion: Does "{word}" mean the same in both sentences?\nAnswer:',
            ("no", "yes"),
        ),
        dpt="sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        residual=(
            "start1: {start1} end1: {end1} sentence1: {sentence1} "
            "start2: {start2} end2: {end2} sentence2: {sentence2} word: {word}",
            _BOOLEAN,
        ),
    ),
    label="label",
    group="word",
    max_input_tokens=128,
)
"""5,428 training and 638 validation rows."""

WSC = register_official(
    "wsc",
    _official("WSC", "wsc", TRUTH, flatten=flatten_wsc, preprocess=preprocess_wsc),
    "Does a pronoun refer to a noun? In nearly two of three rows it does not: look at the majority score first.",
    wordings(
        _BOOLEAN,
        natural=(
            '{pronoun_marked}\nQuestion: Does "*{span2_text}*" stand for "{span1_text}"?\nAnswer:',
            ("no", "yes"),
        ),
        dpt="text: {both_marked}",  # DPT has no wording with both labels; this is DePT's, of the same family.
        residual=(
            "span1_text: {span1_text} span1_index: {span1_index} "
            "span2_text: {span2_text} span2_index: {span2_index} text: {text}",
            _BOOLEAN,
        ),
    ),
    label="label",
    group="text",
    max_input_tokens=256,
)
"""554 training and 104 validation rows."""

WSC_POSITIVES = register_official(
    "wsc-positives",
    _official("WSC", "wsc", TRUTH, flatten=flatten_wsc, preprocess=preprocess_wsc_positive),
    "WSC as the papers score it: generate what a pronoun refers to, in positive rows only. No negative is ever tested.",
    {
        "natural": Template(text='{pronoun_marked}\nQuestion: What does "*{span2_text}*" stand for?\nAnswer:'),
        "dpt": Template(text="{pronoun_apart}"),
        "residual": Template(text="{pronoun_marked}", target="span1_first"),
    },
    target="span1_text",
    metrics=("referent_match", "exact_match"),
    group="text",
    max_input_tokens=256,
)
"""259 training and 38 validation rows."""
