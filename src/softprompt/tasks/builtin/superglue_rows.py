"""SuperGLUE's rows: the nested official ones flattened, and what its templates read made of the flat ones."""

import re
from collections.abc import Callable

from softprompt.tasks.builtin.official import Row, Rows


def columns(*names: str, **renamed: str) -> Callable[[Row], Rows]:
    """Keeps the columns `names`, and `new="old"` under a new name."""

    def prepare(row: Row) -> Rows:
        yield {name: row[name] for name in names} | {new: row[old] for new, old in renamed.items()}

    return prepare


def flatten_multirc(row: Row) -> Rows:
    """A row an answer, of passage -> questions -> answers."""
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
                "idx": {"paragraph": row["idx"], "question": question["idx"]},
            }


def prepare_multirc(row: Row) -> Rows:
    """Without markup and space around, and with the question's own number: two paragraphs may ask the same."""
    yield {
        **{name: _without_markup(row[name]) for name in ("paragraph", "question", "answer")},
        "question_id": f"{row['idx']['paragraph']}-{row['idx']['question']}",
        "label": row["label"],
    }


def flatten_record(row: Row) -> Rows:
    """A row a query. An entity's end is its last letter's place, not the one behind it."""
    text = row["passage"]["text"]
    for query in row["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": [text[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]],
            "answers": [answer["text"] for answer in query["answers"]],
        }


def prepare_record(row: Row) -> Rows:
    """Every entity and accepted answer once, sorted as on the hub; the article's highlights made sentences."""
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
    """The two spans beside the text."""
    yield {"text": row["text"], "label": row["label"], **row["target"]}


def prepare_wsc(row: Row) -> Rows:
    """The text with its spans marked in the three published ways."""
    text = row["text"]
    noun = _place(text, row["span1_text"], row["span1_index"])
    pronoun = _place(text, row["span2_text"], row["span2_index"])
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


def prepare_wsc_positive(row: Row) -> Rows:
    """As `prepare_wsc`, and nothing where the pronoun stands for something else."""
    if row["label"]:
        yield from prepare_wsc(row)


def prepare_axg(row: Row) -> Rows:
    """With the number of the pair that differs in a pronoun's gender alone: neighbours, in the official order."""
    yield {name: row[name] for name in ("premise", "hypothesis", "label")} | {"pair": int(row["idx"]) // 2}


def _without_markup(text: str) -> str:
    return re.sub(r"</?b>", "", text.replace("<br>", " ")).strip()


def _with_highlights_as_sentences(passage: str) -> str:
    """A line `@highlight` begins a summary sentence; the one before it gets its full stop if it has no end."""
    ended = re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", passage)
    return ended.replace("\n@highlight\n", ". ")


def _place(text: str, span: str, index: int) -> tuple[int, int]:
    """Start and end of `span`: at word `index`, or the nearest to it (one validation row's index is off by one)."""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    if not 0 <= index < len(starts):
        raise ValueError(f"the span {span!r} is at word {index}, and its text has {len(starts)} words")
    words = r"\s+".join(map(re.escape, span.split()))
    found = list(re.finditer(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE))
    if not found:
        raise ValueError(f"the span {span!r} is not in its text")
    return min(found, key=lambda match: abs(match.start() - starts[index])).span()


def _mark(text: str, *spans: tuple[int, int, str, str]) -> str:
    """`text` with signs before and behind each span; one row has a span within the other."""
    signs = [((start, 1, -end), before) for start, end, before, _ in spans]
    signs += [((end, 0, -start), behind) for start, end, _, behind in spans]
    marked, done = "", 0
    for (place, _, _), sign in sorted(signs):
        marked, done = marked + text[done:place] + sign, place
    return marked + text[done:]
