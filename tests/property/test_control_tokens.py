"""Control tokens are text in a row and tokens in the template; ordinary text has the tokenizer's ids."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softprompt.tasks import Task
from softprompt.tasks.data.control_tokens import control_tokens
from softprompt.tasks.data.tokenize import answer_ids, encode, strip_end

SPECIAL = ["<s>", "</s>", "<unk>", "<mask>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["Review: a fine film\nVerdict: good", "Title: old price, bad <b>deal</b> | user obey", "en_XX 1 2 3"] * 9


def _wrapped(backend: Tokenizer, front: str = "<s> $A </s>") -> Any:
    backend.post_processor = processors.TemplateProcessing(
        single=front, special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def _byte_level() -> Any:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return _wrapped(built)


def _unigram() -> Any:
    """Whose pieces include the special tokens, so that without its added tokens it still finds them in a text."""
    built = Tokenizer(models.Unigram())
    built.normalizer = normalizers.NFKC()
    built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list("<>|/_[]{}")
    )
    built.train_from_iterator(TEXTS, trainer)
    return _wrapped(built)


def _word_piece() -> Any:
    built = Tokenizer(models.WordPiece(unk_token="<unk>"))
    built.normalizer, built.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    built.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return _wrapped(built)


def _word_level() -> Any:
    built = Tokenizer(models.WordLevel(unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return _wrapped(built)


KINDS = {"byte-level": _byte_level(), "unigram": _unigram(), "wordpiece": _word_piece(), "wordlevel": _word_level()}
TASK = Task(name="t", template="Review: {text}\nTitle: {title}\nVerdict:", target="answer", metrics=("exact_match",))
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FORGED = st.lists(st.one_of(st.sampled_from(SPECIAL), ANY_TEXT), max_size=5).map("".join)


def _ids(tokenizer: Any, task: Task = TASK, closing: bool = True, limit: int = 500, **row: str) -> list[int]:
    return list(
        encode(task, tokenizer, [{"title": "b", **row}], limit, appends_eos=closing, answers=False)[0][0].input_ids
    )


def _control(tokenizer: Any, ids: list[int]) -> list[str]:
    telling = set(control_tokens(tokenizer).names) - {tokenizer.unk_token_id}
    return [tokenizer.convert_ids_to_tokens(index) for index in ids if index in telling]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [name for name in SPECIAL if name != "<unk>"])
def test_row_text_gives_no_control_token(kind: str, token: str) -> None:
    tokenizer = KINDS[kind]
    for text in (token, f"a {token} film", f"{token}old price{token}", f"{token}\nuser"):
        assert _control(tokenizer, _ids(tokenizer, text=text)) == ["<s>", "</s>"]
        assert _control(tokenizer, _ids(tokenizer, text="a", title=text)) == ["<s>", "</s>"]
    assert _ids(tokenizer, text=f"a {token} b") != _ids(tokenizer, text="a  b")


def test_byte_level_text_is_complete() -> None:
    tokenizer = KINDS["byte-level"]
    ids = _ids(tokenizer, text="a <|im_end|>\n<s>é</s>")
    assert tokenizer.decode(ids[1:-1]) == "Review: a <|im_end|>\n<s>é</s>\nTitle: b\nVerdict:"


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(KINDS)), text=ANY_TEXT, title=ANY_TEXT)
def test_ordinary_text_has_the_tokenizers_ids(kind: str, text: str, title: str) -> None:
    tokenizer, row = KINDS[kind], {"text": text, "title": title}
    assert _ids(tokenizer, **row) == tokenizer(TASK.render(row))["input_ids"]


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(KINDS)), text=FORGED, title=FORGED, limit=st.integers(60, 90))
def test_forged_text_keeps_the_templates_tokens(kind: str, text: str, title: str, limit: int) -> None:
    task = dataclasses.replace(TASK, template="<|im_start|>user {text}<|im_end|> {title} <mask>")
    ids = _ids(KINDS[kind], task, limit=limit, text=text, title=title)
    assert _control(KINDS[kind], ids) == ["<s>", "<|im_start|>", "<|im_end|>", "<mask>", "</s>"]
    assert len(ids) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_template_tokens_have_the_tokenizers_ids(kind: str) -> None:
    task = dataclasses.replace(TASK, template="<|im_start|>user\n{text}<|im_end|> <mask> {title}")
    row = {"text": "a fine film", "title": "old price"}
    assert _ids(KINDS[kind], task, **row) == KINDS[kind](task.render(row))["input_ids"]


def test_token_across_a_field_border_is_text() -> None:
    task = dataclasses.replace(TASK, template="<{text}> {title}{text}")
    for text, title in (("mask", "b"), ("_end|>", "<|im"), ("/s", "<")):
        assert _control(KINDS["byte-level"], _ids(KINDS["byte-level"], task, text=text, title=title)) == ["<s>", "</s>"]


def test_only_bracketed_added_tokens_are_control_tokens() -> None:
    tokenizer = _byte_level()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("[INST]"), AddedToken("EGFR"), AddedToken("    ")])
    think, inst, word, spaces = tokenizer.convert_tokens_to_ids(["<think>", "[INST]", "EGFR", "    "])
    ids = _ids(tokenizer, text="<think> [INST] EGFR    x <s>")
    assert {think, inst}.isdisjoint(ids)
    assert {word, spaces} <= set(ids)
    task = dataclasses.replace(TASK, template="<think>{text}{title}")
    assert think in _ids(tokenizer, task, text="a <think> b")


def test_stripping_and_normalized_tokens_are_text() -> None:
    tokenizer = _word_piece()
    tokenizer.add_tokens([AddedToken("[Sep]", special=True, normalized=True, lstrip=True, rstrip=True)])
    sep = tokenizer.convert_tokens_to_ids("[Sep]")
    assert sep in tokenizer("a [sEP] b")["input_ids"]
    assert sep not in _ids(tokenizer, text="a [sEP] b")
    task = dataclasses.replace(TASK, template="{text} [sep] {title}")
    assert _ids(tokenizer, task, text="a [SEP] <mask>").count(sep) == 1


def test_answers_and_label_words_are_text() -> None:
    tokenizer = KINDS["byte-level"]
    rows = [{"text": "a", "title": "b", "answer": answer} for answer in ("go <mask>", "<|im_end|>ok", "fine")]
    examples = encode(TASK, tokenizer, rows, 100)[0]
    assert [tokenizer.decode(item.answer_ids[:-1]) for item in examples] == [" go <mask>", " <|im_end|>ok", " fine"]
    assert all(_control(tokenizer, list(item.answer_ids)) == ["</s>"] for item in examples)
    labels = Task(name="t", template="{text}", label="y", label_words={"0": "<mask>", "1": "<|im_end|>"})
    assert all(not _control(tokenizer, list(ids)) for ids in answer_ids(labels, tokenizer))


def test_answer_ends_once() -> None:
    tokenizer = KINDS["byte-level"]
    answers = ("good", "good</s>", "good</s></s>", "good </s>\n", "a</s>b")
    examples = encode(TASK, tokenizer, [{"text": "a", "title": "b", "answer": item} for item in answers], 100)[0]
    texts = [tokenizer.decode(item.answer_ids[:-1]) for item in examples]
    assert texts == [" good", " good", " good", " good ", " a</s>b"]
    assert [list(item.answer_ids).count(tokenizer.eos_token_id) for item in examples] == [1] * 5
    assert examples.answers_ended == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"row 1 has the answer '</s>' in column 'answer', which is an end of seq"):
        encode(TASK, tokenizer, [{"text": "a", "title": "b", "answer": "</s>"}], 100)
    assert strip_end("a</s> b", tokenizer) == "a</s> b"
    words = Task(name="t", template="{text}", label="y", label_words={"0": "good</s>", "1": "bad</s>"})
    plain = Task(name="t", template="{text}", label="y", label_words={"0": "good", "1": "bad"})
    assert answer_ids(words, tokenizer) == answer_ids(plain, tokenizer)


def test_tokenizer_that_cannot_escape_tokens_is_refused() -> None:
    """Where the names of its copy say nothing, as those of a tokenizer that is not known here might."""
    tokenizer = _word_level()
    control = control_tokens(tokenizer)
    control._secrets = {index: f"{name}" for index, name in control.names.items()}
    with pytest.raises(ValueError, match=re.escape("row 1 holds '<mask>', a control token")):
        _ids(tokenizer, text="a <mask> b")


@pytest.mark.parametrize("text", ["a \ud800 b", "\udfff"])
def test_lone_surrogate_is_named_by_its_row(text: str) -> None:
    rows = [{"text": "a", "title": "b"}] * 2 + [{"text": text, "title": "b"}]
    with pytest.raises(ValueError, match=r"row 3 has half a character"):
        encode(TASK, KINDS["byte-level"], rows, 100, answers=False)


def test_examples_equal_single_rows_in_few_bytes() -> None:
    tokenizer = KINDS["byte-level"]
    rows = [{"text": f"film {n} " * (n % 40), "title": "<s>" * (n % 3), "answer": f"a{n}"} for n in range(2100)]
    examples, shortened = encode(TASK, tokenizer, rows, 60)
    assert shortened > 100
    for n in (0, 1, 41, 999, 1000, 1001, 2099):
        alone = encode(TASK, tokenizer, rows[n : n + 1], 60)[0][0]
        assert examples[n] == dataclasses.replace(alone, row=n, where=f"row {n + 1}")
    assert [item.row for item in examples[5:2000:700]] == [5, 705, 1405]
    assert examples[-1] == examples[2099]
    tokens = sum(len(item.input_ids) + len(item.answer_ids) for item in examples)
    size = sum(part.itemsize * len(part) for part in vars(examples).values() if hasattr(part, "itemsize"))
    assert size < 5 * tokens
