"""Tasks: what render, encode, collate, the batches' order and the splits promise for any input."""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softprompt import assets
from softprompt.tasks import (
    IGNORED,
    READERS,
    TASKS,
    Example,
    Splits,
    Task,
    Template,
    answer_ids,
    batches,
    collate,
    encode,
    load_task,
    schedule,
    shots,
    splits,
)
from softprompt.tasks.template import parse

SENTENCES = ["A fine film about two cooks.", "Review: dull\nSentiment: negative", "positive, and a great cast!"] * 3
REVIEW = Task(
    name="review",
    template="Review: {text}\nTitle: {title}\nSentiment:",
    label="verdict",
    words={"0": "negative", "1": "positive"},
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def byte_level(special: bool = True) -> PreTrainedTokenizerFast:
    """GPT-like, with <s> in front and </s> behind where `special`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )


def prefixing() -> PreTrainedTokenizerFast:
    """Llama-2-like: a space of its own in front of every text."""
    pieces = ["<unk>", "</s>", "▁", ":", "▁:", "▁yes", "▁no", *"yesno"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))], unk_id=0))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


TOKENIZER = byte_level()


def table(n: int, groups: int = 0) -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"film number {i}" for i in range(n)],
            "title": [f"title {i % 7}" for i in range(n)],
            "verdict": [str(int(i % 3 == 0)) for i in range(n)],
            "film": [f"f{i % groups}" if groups else str(i) for i in range(n)],
        }
    )


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch):
    """Puts splits in the place of a source: `source(train=..., dev=...)` gives the name to read them by."""

    def put(**found: Dataset) -> str:
        monkeypatch.setitem(READERS, "here", lambda task, folder: found)
        return "here"

    return put


# Templates and rendering


@given(parts=st.lists(st.tuples(st.booleans(), st.text(min_size=1)), min_size=1, max_size=6))
def test_a_template_is_read_as_it_was_written(parts: list[tuple[bool, str]]) -> None:
    parts = [
        (is_field, "".join(c for c in text if c not in "{}.[]!:") if is_field else text) for is_field, text in parts
    ]
    parts = [(is_field, text) for is_field, text in parts if text.strip() or not is_field]
    written = "".join(
        "{" + text + "}" if is_field else text.replace("{", "{{").replace("}", "}}") for is_field, text in parts
    )
    merged: list[tuple[bool, str]] = []
    for is_field, text in parts:
        if merged and not is_field and not merged[-1][0]:
            merged[-1] = (False, merged[-1][1] + text)
        else:
            merged.append((is_field, text))
    assert parse(written) == tuple(merged)


@given(text=TEXT, title=TEXT)
def test_render_puts_cells_in_as_they_are(text: str, title: str) -> None:
    """Braces in a cell are text, never fields."""
    assert REVIEW.render({"text": text, "title": title}) == "Review: " + text + "\nTitle: " + title + "\nSentiment:"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text.upper}", "'.'"),
        ("{text[0]}", "'['"),
        ("{text!r}", "'!'"),
        ("{text:>9}", "':'"),
        ("{}", "nothing in it"),
        ("{text", "single '{'"),
        ("text}", "single '}'"),
        ("no field", "names no column"),
    ],
)
def test_a_template_that_is_more_than_columns_is_refused(template: str, said: str) -> None:
    with pytest.raises(ValueError, match="template") as caught:
        dataclasses.replace(REVIEW, template=template)
    assert said in str(caught.value)


def test_render_names_the_missing_column_and_the_row() -> None:
    with pytest.raises(ValueError, match=r"row 3 has no column 'title'.*it has text, other"):
        REVIEW.render({"text": "a", "other": "b"}, "row 3")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"words": {"0": "no", "1": "No"}}, "same word"),
        ({"words": {"0": "no"}}, "two or more"),
        ({"words": {"0": "no", "1": ""}}, "give it one"),
        ({"target": "text"}, "both of label and target"),
        ({"label": "", "words": {}}, "neither of label and target"),
        ({"metrics": ("acuracy",)}, "did you mean 'accuracy'"),
        ({"metrics": ("exact_match",)}, "answers with labels"),
        ({"metrics": ("question_match",)}, "`question`"),
        ({"metrics": ("f1",), "words": {"0": "a", "1": "b", "2": "c"}}, "two labels"),
        ({"metrics": ()}, "no metrics"),
        ({"max_tokens": 0}, "at least 1"),
        ({"name": " "}, "name"),
    ],
)
def test_a_task_that_cannot_work_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match="task") as caught:
        dataclasses.replace(REVIEW, **changes)
    assert said in str(caught.value)


def test_answers_are_words_as_the_model_would_write_them() -> None:
    assert REVIEW.answers == (" negative", " positive")
    assert dataclasses.replace(REVIEW, template="{text}\n").answers == ("negative", "positive")
    assert REVIEW.answer({"verdict": 1}) == 1
    assert REVIEW.classify(" Positive\n") == 1
    assert REVIEW.classify("so-so") is None
    boolean = dataclasses.replace(REVIEW, words={"false": "no", "true": "yes"})
    assert boolean.answer({"verdict": True}) == 1


def test_a_generation_accepts_several_answers() -> None:
    task = Task(name="t", template="{text}", target="names", metrics=("token_f1",))
    assert task.golds({"names": ["Ann", "Anna"]}) == ("Ann", "Anna")
    assert task.answer({"names": ["Ann", "Anna"]}) == "Ann"
    with pytest.raises(ValueError, match="row 2 has no answer in column 'names'"):
        task.answer({"names": []}, "row 2")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_survives_json(name: str) -> None:
    task = TASKS[name]
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    with pytest.raises(ValueError, match="did you mean 'template'"):
        Task.from_json({**task.to_json(), "templat": "x"})
    with pytest.raises(ValueError, match="without 'name'"):
        Task.from_json({"template": "{x}"})


def test_another_wording_has_its_own_words() -> None:
    other = Template(text="{text}?", words={"0": "bad", "1": "good"})
    task = dataclasses.replace(REVIEW, templates={"short": other})
    assert task.using("short").answers == (" bad", " good")
    with pytest.raises(ValueError, match="did you mean 'short'"):
        task.using("shrt")
    assert load_task("boolq:dpt").answers == (" 0", " 1")


# Tokens


@settings(deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 1)), max_size=5), limit=st.integers(42, 90))
def test_an_example_fits_and_keeps_the_cue(rows: list[tuple[str, str, int]], limit: int) -> None:
    made = [{"text": text, "title": title, "verdict": verdict} for text, title, verdict in rows]
    examples, shortened = encode(REVIEW, TOKENIZER, made, limit)
    whole = [TOKENIZER(REVIEW.render(row))["input_ids"][:-1] for row in made]
    assert [example.row for example in examples] == list(range(len(rows)))
    assert shortened == sum(len(ids) > limit for ids in whole)
    for example, ids, row in zip(examples, whole, made, strict=True):
        assert len(example.input_ids) <= limit
        assert example.input_ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.eos_token_id not in example.input_ids[1:]
        text = TOKENIZER.decode(example.input_ids[1:])
        assert text.startswith("Review: ")
        assert "\nTitle: " in text
        assert text.endswith("\nSentiment:")
        assert example.label == row["verdict"]
        assert TOKENIZER.decode(example.answer_ids) == REVIEW.answers[row["verdict"]]
        if len(ids) <= limit:
            assert list(example.input_ids) == ids


def test_the_longest_field_is_shortened_and_the_other_stays_whole() -> None:
    row = {"text": "word " * 400, "title": "The Cooks"}
    (example,), shortened = encode(REVIEW, TOKENIZER, [row], 100, answers=False)
    text = TOKENIZER.decode(example.input_ids[1:])
    assert shortened == 1
    assert text.startswith("Review: word word word")
    assert text.endswith("\nTitle: The Cooks\nSentiment:")
    assert 95 <= len(example.input_ids) <= 100
    assert (example.answer_ids, example.label) == ((), None)


def test_two_long_fields_share_the_loss() -> None:
    (example,), _ = encode(REVIEW, TOKENIZER, [{"text": "x y " * 500, "title": "z w " * 500}], 100, answers=False)
    text = TOKENIZER.decode(example.input_ids[1:])
    assert abs(text.count("x") - text.count("z")) <= 4
    assert text.count("x") > 10


def test_a_template_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template of task 'review' alone has \d+ tokens, but the limit is 5"):
        encode(REVIEW, TOKENIZER, [{"text": "a", "title": "b"}], 5, answers=False)


def test_closing_keeps_the_appended_special_token() -> None:
    row = {"text": "a film " * 50, "title": "b"}
    for limit in (60, 1000):
        (closed,), _ = encode(REVIEW, TOKENIZER, [row], limit, closing=True, answers=False)
        assert closed.input_ids[-1] == TOKENIZER.eos_token_id
        assert len(closed.input_ids) <= limit


def test_a_special_token_of_the_template_itself_stays() -> None:
    task = dataclasses.replace(REVIEW, template="{text} is</s>")
    (example,), _ = encode(task, TOKENIZER, [{"text": "a"}], 50, answers=False)
    assert example.input_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER("x</s>")["input_ids"][-2:] == [2, 2]


def test_a_generated_answer_ends() -> None:
    task = Task(name="t", template="{text}\n", target="names", metrics=("token_f1",))
    (example,), _ = encode(task, TOKENIZER, [{"text": "a", "names": "fine film"}], 50)
    assert example.answer_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(example.answer_ids[:-1]) == "fine film"
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(task, endless, [{"text": "a", "names": "b"}], 50)


def test_an_answer_has_the_tokens_that_it_has_behind_text() -> None:
    """A tokenizer that puts a space in front of its own would give ' yes' two of them."""
    tokenizer = prefixing()
    assert (
        tokenizer(" yes", add_special_tokens=False)["input_ids"]
        != tokenizer("yes", add_special_tokens=False)["input_ids"]
    )
    task = dataclasses.replace(REVIEW, words={"0": "no", "1": "yes"})
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in answer_ids(task, tokenizer)] == [["▁no"], ["▁yes"]]


def test_words_that_cannot_be_told_apart_are_refused() -> None:
    blind = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, ":": 2}, unk_token="<unk>"))
    blind.pre_tokenizer = pre_tokenizers.Whitespace()
    blind.normalizer = normalizers.Replace("!", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=blind, unk_token="<unk>")
    with pytest.raises(ValueError, match="' yes' and ' yes!' of task 'review' are the same tokens"):
        answer_ids(dataclasses.replace(REVIEW, words={"0": "yes", "1": "yes!"}), tokenizer)
    with pytest.raises(ValueError, match="' maybe' of task 'review' has no tokens"):
        answer_ids(dataclasses.replace(REVIEW, words={"0": "yes", "1": "maybe"}), tokenizer)
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        answer_ids(REVIEW, object())


# Batches

EXAMPLES = st.lists(
    st.builds(
        Example,
        st.lists(st.integers(1, 99), min_size=1, max_size=9).map(tuple),
        st.lists(st.integers(1, 99), min_size=1, max_size=3).map(tuple),
        st.none() | st.integers(0, 3),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=6,
)


@given(examples=EXAMPLES, side=st.sampled_from(["left", "right"]), with_answers=st.booleans())
def test_a_batch_holds_every_token_at_its_place(examples: list[Example], side: str, with_answers: bool) -> None:
    batch = collate(examples, 0, side, with_answers)  # type: ignore[arg-type]
    for place, example in enumerate(examples):
        ids = list(example.input_ids + (example.answer_ids if with_answers else ()))
        pads = batch.input_ids.shape[1] - len(ids)
        before, behind = ([0] * pads, []) if side == "left" else ([], [0] * pads)
        assert batch.input_ids[place].tolist() == [*before, *ids, *behind]
        assert batch.attention_mask[place].tolist() == [*before, *[1] * len(ids), *behind]
        ignored = [IGNORED] * len(example.input_ids) + (list(example.answer_ids) if with_answers else [])
        assert batch.labels[place].tolist() == [*[IGNORED] * len(before), *ignored, *[IGNORED] * len(behind)]
    assert batch.classes.tolist() == [-1 if example.label is None else example.label for example in examples]
    assert batch.rows.tolist() == [example.row for example in examples]


def test_a_batch_without_what_it_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        collate([], 0, "left", False)
    with pytest.raises(ValueError, match="row 8 has no answer"):
        collate([Example((1,), (), None, 7)], 0, "left", True)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
    window=st.integers(1, 6),
)
def test_an_epoch_has_each_row_once(lengths: list[int], size: int, seed: int, epoch: int, window: int) -> None:
    found = batches(lengths, size, seed, epoch, window)
    assert Counter(itertools.chain.from_iterable(found)) == Counter(range(len(lengths)))
    assert len(found) == -(-len(lengths) // size)
    assert sum(len(batch) < size for batch in found) == (len(lengths) % size > 0)
    assert found == batches(lengths, size, seed, epoch, window)


def test_batches_hold_rows_of_one_length_and_epochs_differ() -> None:
    lengths = [i % 10 for i in range(400)]
    spread = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches(lengths, 4, 0, 0, 100)
    ]
    assert max(spread) == 0
    assert batches(lengths, 4, 0, 0) != batches(lengths, 4, 0, 1)
    assert batches(lengths, 4, 0, 0) != batches(lengths, 4, 1, 0)
    assert batches(lengths, 4, 1, 23) != batches(lengths, 4, 12, 3)


@given(start=st.integers(0, 60))
def test_a_schedule_goes_on_where_it_was_left(start: int) -> None:
    lengths = [7, 3, 9, 1, 4, 4, 8]
    whole = list(itertools.islice(schedule(lengths, 2, seed=5, window=2), 70))
    assert list(itertools.islice(schedule(lengths, 2, seed=5, window=2, start=start), 10)) == whole[start : start + 10]
    assert [epoch for epoch, _ in whole[:9]] == [0] * 4 + [1] * 4 + [2]


def test_an_impossible_order_is_refused() -> None:
    for lengths, size, window in (([], 1, 1), ([1], 0, 1), ([1], 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            batches(lengths, size, 0, 0, window)
    with pytest.raises(ValueError, match="first step is -1"):
        next(schedule([1], 1, 0, start=-1))


# Splits


def texts(whole: Splits) -> list[set[str]]:
    return [set(part["text"]) for part in (whole.train, whole.dev, whole.test)]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(30, 120), seed=st.integers(0, 99))
def test_rows_are_cut_class_by_class_without_loss(n: int, seed: int) -> None:
    READERS["cut-test"] = lambda task, folder: {"rows": table(n)}
    try:
        task = dataclasses.replace(REVIEW, source="cut-test")
        whole = splits(task, seed=seed)
        again = splits(task, seed=seed)
    finally:
        del READERS["cut-test"]
    parts = texts(whole)
    assert sum(map(len, parts)) == n
    assert len(set.union(*parts)) == n
    for part, share in ((whole.dev, 0.1), (whole.test, 0.2)):
        for label in ("0", "1"):
            wanted = share * table(n)["verdict"].count(label)
            assert abs(part["verdict"].count(label) - wanted) <= 1
    assert texts(again) == parts
    assert again.fingerprint == whole.fingerprint
    assert whole.majority == 0


def test_a_group_is_in_one_split(source) -> None:
    task = dataclasses.replace(REVIEW, source=source(rows=table(300, groups=40)), group="film")
    whole = splits(task)
    films = [set(part["film"]) for part in (whole.train, whole.dev, whole.test)]
    assert sum(map(len, films)) == len(set.union(*films)) == 40
    assert 50 <= len(whole.test) <= 80
    assert 25 <= len(whole.dev) <= 45


def test_a_task_may_fix_its_splits(source) -> None:
    free = dataclasses.replace(REVIEW, source=source(rows=table(100)))
    fixed = dataclasses.replace(free, split_seed=3)
    assert splits(free, seed=1).fingerprint != splits(free, seed=2).fingerprint
    assert splits(fixed, seed=1).fingerprint == splits(fixed, seed=2).fingerprint == splits(free, seed=3).fingerprint


def test_an_official_validation_split_is_halved(source) -> None:
    rows = table(200)
    task = dataclasses.replace(
        REVIEW, source=source(train=rows.select(range(100)), validation=rows.select(range(100, 200)))
    )
    whole = splits(task)
    assert set(whole.train["text"]) == set(rows["text"][:100])
    assert set(whole.dev["text"]) | set(whole.test["text"]) == set(rows["text"][100:])
    assert abs(len(whole.dev) - len(whole.test)) <= 2


def test_the_splits_that_there_are_stay_as_they_are(source) -> None:
    rows = table(60)
    given = {"train": rows.select(range(20)), "dev": rows.select(range(20, 30)), "test": rows.select(range(30, 60))}
    whole = splits(dataclasses.replace(REVIEW, source=source(**given)))
    assert texts(whole) == [set(part["text"]) for part in given.values()]


def test_a_fingerprint_follows_the_rows_that_are_read(source) -> None:
    rows = table(60)
    task = dataclasses.replace(REVIEW, source=source(rows=rows))
    first = splits(task).fingerprint
    source(rows=rows.map(lambda row: {"film": row["film"] + "!"}, keep_in_memory=True))
    assert splits(task).fingerprint == first
    source(rows=rows.map(lambda row: {"text": row["text"] + "!"}, keep_in_memory=True))
    assert splits(task).fingerprint != first


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("group", ["", "film"])
def test_shots_are_few_and_disjoint(source, balanced: bool, group: str) -> None:
    task = dataclasses.replace(REVIEW, source=source(rows=table(300, groups=100)), group=group)
    whole = splits(task)
    few = shots(task, whole, 8, seed=1, balanced=balanced)
    train, dev, test = texts(few)
    assert len(train) == len(dev) == (16 if balanced else 8)
    assert not train & dev
    assert test == texts(whole)[2]
    assert train | dev <= texts(whole)[0]
    if balanced:
        assert Counter(few.train["verdict"]) == Counter(few.dev["verdict"]) == {"0": 8, "1": 8}
    if group:
        assert not set(few.train["film"]) & set(few.dev["film"])
    assert texts(shots(task, whole, 8, seed=2, balanced=balanced))[0] != train


def test_too_many_shots_are_refused(source) -> None:
    task = dataclasses.replace(REVIEW, source=source(rows=table(60)))
    with pytest.raises(ValueError, match=r"12 shots of task 'review' need more rows of class '1': \d+ are left for"):
        shots(task, splits(task), 12, seed=0)
    with pytest.raises(ValueError, match="must be at least 1"):
        shots(task, splits(task), 0, seed=0)


def asset(name: str) -> None:
    try:
        assets.fetch(name)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"the asset {name} cannot be had here: {error}")


@pytest.mark.asset
def test_no_film_is_in_two_splits() -> None:
    asset("rotten-tomatoes")
    whole = splits(TASKS["sentiment"], seed=1)
    films = [set(part["movie_name"]) for part in (whole.train, whole.dev, whole.test)]
    assert [len(whole.train), len(whole.dev), len(whole.test)] == [8960, 1282, 2566]
    assert sum(map(len, films)) == len(set.union(*films)) == 508
    assert set(whole.train["category"]) == {"fresh", "rotten"}
    assert whole.fingerprint == splits(TASKS["sentiment"], seed=2).fingerprint


@pytest.mark.asset
def test_boolq_has_the_official_splits() -> None:
    asset("boolq")
    whole = splits(TASKS["boolq"])
    assert [len(whole.train), len(whole.dev), len(whole.test)] == [9427, 1635, 1635]
    assert not set(whole.dev["passage"]) & set(whole.test["passage"])
    # SuperGLUE's own files say: 5,874 of the training rows and 2,033 of the validation rows are answered with yes.
    assert sum(whole.train["label"]) == 5874
    assert sum(whole.dev["label"]) + sum(whole.test["label"]) == 2033
    assert sorted(whole.train["idx"]) == list(range(9427))
    assert sorted([*whole.dev["idx"], *whole.test["idx"]]) == list(range(3270))
    # sha256 of the sorted questions of SuperGLUE's own BoolQ/val.jsonl
    questions = "\n".join(sorted([*whole.dev["question"], *whole.test["question"]]))
    assert hashlib.sha256(questions.encode()).hexdigest() == (
        "a3f4cc6156c67f8249f75138c848ed0663e8750f83f46427d134d279dfc8bd6e"
    )
