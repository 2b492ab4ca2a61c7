"""Conversion of SuperGLUE's rows: `flatten_*` the nested official ones, `prepare_*` the templates' columns."""

import re
from collections.abc import Callable

from softprompt.tasks.builtin.official import Row, Rows


def columns(*names: str, **renamed: str) -> Callable[[Row], Rows]:
    """A `preprocess` that keeps the columns `names`, and renames columns by `new="old"`."""

    def preprocess(row: Row) -> Rows:
        yield {name: row[name] for name in names} | {new: row[old] for new, old in renamed.items()}

    return preprocess


def flatten_multirc(row: Row) -> Rows:
    """One row per answer, from passage -> questions -> answers."""
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
                "idx": {"paragraph": row["idx"], "question": question["idx"]},
            }


def preprocess_multirc(row: Row) -> Rows:
    """Remove markup and surrounding space, and add a question id: two paragraphs may ask the same question."""
    yield {
        **{name: _without_markup(row[name]) for name in ("paragraph", "question", "answer")},
        "question_id": f"{row['idx']['paragraph']}-{row['idx']['question']}",
        "label": row["label"],
    }


def flatten_record(row: Row) -> Rows:
    """One row per query. The end of an entity is the index of its last character."""
    text = row["passage"]["text"]
    for query in row["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": [text[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]],
            "answers": [answer["text"] for answer in query["answers"]],
        }


def preprocess_record(row: Row) -> Rows:
    """Remove duplicate entities and answers, sort them as on the Hub, and turn highlights into sentences."""
    entities = sorted(set(row["entities"]))
    yield {
        "passage": row["passage"],
        "article": _with_highlights_as_sentences(row["passage"]),
        "query": row["query"],
        "cloze": row["query"].replace("@placeholder", "____"),
        "entities": ", ".join(entities),
        "entities_apart": "; ".join(entities),
        "answers": sorted(set(row["answers"])),
    }


def flatten_wsc(row: Row) -> Rows:
    """The text and its two spans in one row."""
    yield {"text": row["text"], "label": row["label"], **row["target"]}


def preprocess_wsc(row: Row) -> Rows:
    """Add the text with its spans marked in the three published ways."""
    text = row["text"]
    noun = _locate(text, row["span1_text"], row["span1_index"])
    pronoun = _locate(text, row["span2_text"], row["span2_index"])
    noun_text = " ".join(row["span1_text"].split())
    yield {
        "text": text,
        "both_marked": _mark(text, (*noun, "* ", " *"), (*pronoun, "# ", " #")),
        "pronoun_apart": _mark(text, (*pronoun, "* ", " *")),
        "pronoun_marked": _mark(text, (*pronoun, "*", "*")),
        "span1_text": noun_text,
        "span1_first": noun_text.split()[0],
        "span1_index": row["span1_index"],
        "span2_text": row["span2_text"],
        "span2_index": row["span2_index"],
        "label": row["label"],
    }


def preprocess_wsc_positive(row: Row) -> Rows:
    """As `preprocess_wsc`, but only rows whose pronoun refers to the noun."""
    if row["label"]:
        yield from preprocess_wsc(row)


def preprocess_axg(row: Row) -> Rows:
    """Add the index of the pair: neighboring rows, which differ only in a pronoun's gender."""
    yield {name: row[name] for name in ("premise", "hypothesis", "label")} | {"pair": int(row["idx"]) // 2}


def _without_markup(text: str) -> str:
    return re.sub(r"</?b>", "", text.replace("<br>", " ")).strip()


def _with_highlights_as_sentences(passage: str) -> str:
    """Join the summary sentences that lines `@highlight` introduce, ending the text before each with a full stop."""
    ended = re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", passage)
    return ended.replace("\n@highlight\n", ". ")


def _locate(text: str, span: str, index: int) -> tuple[int, int]:
    """The start and end of the occurrence of `span` nearest to word `index` (one validation row is off by one)."""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    if not 0 <= index < len(starts):
        raise ValueError(f"the span {span!r} is at word {index}, but its text has {len(starts)} words")
    pattern = r"\s+".join(map(re.escape, span.split()))
    matches = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE))
    if not matches:
        raise ValueError(f"the span {span!r} is not in its text")
    return min(matches, key=lambda match: abs(match.start() - starts[index])).span()


def _mark(text: str, *spans: tuple[int, int, str, str]) -> str:
    """Insert marks before and after each span `(start, end, before, after)`; one row has nested spans."""
    marks = [((start, 1, -end), before) for start, end, before, _ in spans]
    marks += [((end, 0, -start), after) for start, end, _, after in spans]
    marked, copied = "", 0
    for (position, _, _), mark in sorted(marks):
        marked, copied = marked + text[copied:position] + mark, position
    return marked + text[copied:]
