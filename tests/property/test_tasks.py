"""Tasks render any cell unchanged, and encoded rows fit, keep the cue and have the answer's tokens."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softprompt.tasks import TASKS, Task, Template
from softprompt.tasks.data.tokenize import answer_ids, encode
from softprompt.tasks.template import parse
from softprompt.tasks.user import load_task

SENTENCES = ["A fine film about two cooks.", "Review: dull\nSentiment: negative", "positive, and a great cast!"] * 3
REVIEW = Task(
    name="review",
    template="Review: {text}\nTitle: {title}\nSentiment:",
    label="verdict",
    label_words={"0": "negative", "1": "positive"},
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def byte_level(special: bool = True) -> PreTrainedTokenizerFast:
    """GPT-like, with <s> in front and </s> behind where `special`."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(SENTENCES, trainer)
    if special:
        built.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )


def prefixing() -> PreTrainedTokenizerFast:
    """Llama-2-like: a space of its own in front of every text."""
    pieces = ["<unk>", "</s>", "▁", ":", "▁:", "▁yes", "▁no", *"yesno"]
    built = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))], unk_id=0))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", eos_token="</s>")


TOKENIZER = byte_level()


# Templates and rendering


@given(parts=st.lists(st.tuples(st.booleans(), st.text(min_size=1)), min_size=1, max_size=6))
def test_parse_inverts_a_written_template(parts: list[tuple[bool, str]]) -> None:
    parts = [(is_field, "".join(c for c in text if c not in "{}") if is_field else text) for is_field, text in parts]
    parts = [(is_field, text) for is_field, text in parts if text.strip() or not is_field]
    template = "".join(
        "{" + text + "}" if is_field else text.replace("{", "{{").replace("}", "}}") for is_field, text in parts
    )
    merged: list[tuple[bool, str]] = []
    for is_field, text in parts:
        if merged and not is_field and not merged[-1][0]:
            merged[-1] = (False, merged[-1][1] + text)
        else:
            merged.append((is_field, text))
    assert parse(template) == tuple(merged)


@given(text=TEXT, title=TEXT)
def test_render_inserts_cells_unchanged(text: str, title: str) -> None:
    """Braces in a cell are text, never fields."""
    assert REVIEW.render({"text": text, "title": title}) == "Review: " + text + "\nTitle: " + title + "\nSentiment:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{}", "nothing in it"),
        ("{text", "single '{'"),
        ("text}", "single '}'"),
        ("no field", "names no column"),
    ],
)
def test_invalid_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match="template") as caught:
        dataclasses.replace(REVIEW, template=template)
    assert message in str(caught.value)


def test_render_names_the_missing_column_and_the_row() -> None:
    with pytest.raises(ValueError, match=r"row 3 has no column 'title'.*it has text, other"):
        REVIEW.render({"text": "a", "other": "b"}, "row 3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_words": {"0": "no", "1": "No"}}, "same word"),
        ({"label_words": {"0": "no"}}, "two or more"),
        ({"label_words": {"0": "no", "1": ""}}, "give it one"),
        ({"target": "text"}, "both of label and target"),
        ({"label": "", "label_words": {}}, "neither of label and target"),
        ({"metrics": ("acuracy",)}, "did you mean 'accuracy'"),
        ({"metrics": ("exact_match",)}, "answers with labels"),
        ({"metrics": ("question_match",)}, "`question`"),
        ({"metrics": ("f1",), "label_words": {"0": "a", "1": "b", "2": "c"}}, "two labels"),
        ({"metrics": ()}, "no metrics"),
        ({"max_input_tokens": 0}, "at least 1"),
        ({"name": " "}, "name"),
    ],
)
def test_invalid_task_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="task") as caught:
        dataclasses.replace(REVIEW, **changes)
    assert message in str(caught.value)


def test_answers_have_the_space_that_the_model_writes() -> None:
    assert REVIEW.answers == (" negative", " positive")
    assert dataclasses.replace(REVIEW, template="{text}\n").answers == ("negative", "positive")
    assert REVIEW.answer({"verdict": 1}) == 1
    assert REVIEW.classify(" Positive\n") == 1
    assert REVIEW.classify("so-so") is None
    boolean = dataclasses.replace(REVIEW, label_words={"false": "no", "true": "yes"})
    assert boolean.answer({"verdict": True}) == 1


def test_generation_accepts_several_answers() -> None:
    task = Task(name="t", template="{text}", target="names", metrics=("token_f1",))
    assert task.golds({"names": ["Ann", "Anna"]}) == ("Ann", "Anna")
    assert task.answer({"names": ["Ann", "Anna"]}) == "Ann"
    with pytest.raises(ValueError, match="row 2 has no answer in column 'names'"):
        task.answer({"names": []}, "row 2")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_survives_json(name: str) -> None:
    task = TASKS[name]
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    with pytest.raises(ValueError, match="did you mean 'template'"):
        Task.from_json({**task.to_json(), "templat": "x"})
    with pytest.raises(ValueError, match="without 'name'"):
        Task.from_json({"template": "{x}"})


def test_template_replaces_text_and_label_words() -> None:
    other = Template(text="{text}?", label_words={"0": "bad", "1": "good"})
    task = dataclasses.replace(REVIEW, templates={"short": other})
    assert task.using("short").answers == (" bad", " good")
    with pytest.raises(ValueError, match="did you mean 'short'"):
        task.using("shrt")
    assert load_task("boolq:dpt").answers == (" 0", " 1")


# Tokens


@settings(deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 1)), max_size=5), limit=st.integers(42, 90))
def test_encoded_example_fits_and_keeps_the_cue(rows: list[tuple[str, str, int]], limit: int) -> None:
    built = [{"text": text, "title": title, "verdict": verdict} for text, title, verdict in rows]
    examples, shortened = encode(REVIEW, TOKENIZER, built, limit)
    full = [TOKENIZER(REVIEW.render(row))["input_ids"][:-1] for row in built]
    assert [example.row for example in examples] == list(range(len(rows)))
    assert shortened == sum(len(ids) > limit for ids in full)
    for example, ids, row in zip(examples, full, built, strict=True):
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


def test_only_the_longest_field_is_truncated() -> None:
    row = {"text": "word " * 400, "title": "The Cooks"}
    (example,), shortened = encode(REVIEW, TOKENIZER, [row], 100, answers=False)
    text = TOKENIZER.decode(example.input_ids[1:])
    assert shortened == 1
    assert text.startswith("Review: word word word")
    assert text.endswith("\nTitle: The Cooks\nSentiment:")
    assert 95 <= len(example.input_ids) <= 100
    assert (example.answer_ids, example.label) == ((), None)


def test_two_long_fields_are_truncated_equally() -> None:
    (example,), _ = encode(REVIEW, TOKENIZER, [{"text": "x y " * 500, "title": "z w " * 500}], 100, answers=False)
    text = TOKENIZER.decode(example.input_ids[1:])
    assert abs(text.count("x") - text.count("z")) <= 4
    assert text.count("x") > 10


def test_template_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template of task 'review' alone has \d+ tokens, but the limit is 5"):
        encode(REVIEW, TOKENIZER, [{"text": "a", "title": "b"}], 5, answers=False)


def test_closing_keeps_the_appended_special_token() -> None:
    row = {"text": "a film " * 50, "title": "b"}
    for limit in (60, 1000):
        (closed,), _ = encode(REVIEW, TOKENIZER, [row], limit, appends_eos=True, answers=False)
        assert closed.input_ids[-1] == TOKENIZER.eos_token_id
        assert len(closed.input_ids) <= limit


def test_special_token_of_the_template_stays() -> None:
    task = dataclasses.replace(REVIEW, template="{text} is</s>")
    (example,), _ = encode(task, TOKENIZER, [{"text": "a"}], 50, answers=False)
    assert example.input_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER("x</s>")["input_ids"][-2:] == [2, 2]


def test_generated_answer_ends_with_eos() -> None:
    task = Task(name="t", template="{text}\n", target="names", metrics=("token_f1",))
    (example,), _ = encode(task, TOKENIZER, [{"text": "a", "names": "fine film"}], 50)
    assert example.answer_ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(example.answer_ids[:-1]) == "fine film"
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(task, endless, [{"text": "a", "names": "b"}], 50)


def test_answer_has_its_tokens_after_text() -> None:
    """A tokenizer that puts a space in front of its own would give ' yes' two of them."""
    tokenizer = prefixing()
    assert (
        tokenizer(" yes", add_special_tokens=False)["input_ids"]
        != tokenizer("yes", add_special_tokens=False)["input_ids"]
    )
    task = dataclasses.replace(REVIEW, label_words={"0": "no", "1": "yes"})
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in answer_ids(task, tokenizer)] == [["▁no"], ["▁yes"]]


def test_ambiguous_label_words_are_refused() -> None:
    blind = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, ":": 2}, unk_token="<unk>"))
    blind.pre_tokenizer = pre_tokenizers.Whitespace()
    blind.normalizer = normalizers.Replace("!", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=blind, unk_token="<unk>")
    with pytest.raises(ValueError, match="' yes' and ' yes!' of task 'review' are the same tokens"):
        answer_ids(dataclasses.replace(REVIEW, label_words={"0": "yes", "1": "yes!"}), tokenizer)
    with pytest.raises(ValueError, match="' maybe' of task 'review' has no tokens"):
        answer_ids(dataclasses.replace(REVIEW, label_words={"0": "yes", "1": "maybe"}), tokenizer)
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        answer_ids(REVIEW, object())
