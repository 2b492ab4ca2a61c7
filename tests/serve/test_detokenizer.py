"""Stop texts, also those that are control tokens, and the tokens counted up to them."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softprompt.models.sampling import special_ids
from softprompt.serve.engine.detokenizer import IncrementalDetokenizer


def _tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["fine film user good"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=special[3:]
    )


TOKENIZER = _tokenizer()


def _metaspace() -> PreTrainedTokenizerFast:
    """As T5's: a Unigram vocabulary, whose decoder strips a text's first space, with two sentinels."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁Hello", "▁world", "x"]
    made = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=2))
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    extra = ["<extra_id_0>", "<extra_id_1>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=extra
    )


def _stripping() -> PreTrainedTokenizerFast:
    """As Llama 2's: a BPE with bytes, whose decoder strips a text's first space."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁Hello", "▁world", "x", "<0xC3>", "<0xA9>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _full_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _streamed(tokenizer: Any, tokens: Sequence[int], context: Sequence[int] = (), stops: Sequence[str] = ()) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    detokenizer.continue_after(context)
    text = "".join(map(detokenizer.add, tokens)) + detokenizer.end()
    assert detokenizer.count == len(tokens)
    return text


def _ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def _decode(text: str, *stops: str, raw: list[int] | None = None) -> tuple[str, int, bool]:
    detokenizer = IncrementalDetokenizer(TOKENIZER, stops)
    decoded = ""
    for token in raw or _ids(text):
        decoded += detokenizer.add(token)
        if detokenizer.stopped:
            return decoded, detokenizer.count, True
    decoded += detokenizer.end()
    return decoded, detokenizer.count, detokenizer.stopped


@pytest.mark.parametrize("token", ["<|im_start|>", "</s>", "<pad>"])
def test_stop_that_is_a_control_token_ends_the_text(token: str) -> None:
    assert _decode(f"fine{token}user", token) == ("fine", len(_ids("fine")) + 1, True)
    assert _decode(f"fine{token}user", f"{token}user") == ("fine", len(_ids(f"fine{token}user")), True)
    assert _decode(f"fine é{token}user", "x", token) == ("fine é", len(_ids("fine é")) + 1, True)


def test_control_token_that_is_not_a_stop_is_dropped() -> None:
    assert _decode("fine<pad> film<s>", "user")[0] == "fine film"
    assert _decode("fine<pad> film<s>")[0] == "fine film"
    assert _decode("fi<pad>ne film", "fine")[::2] == ("", True)  # the client sees the stop, though a token is within
    assert _decode("fine<pad>user", "<pad>film", "<|im")[::2] == ("fineuser", False)


def test_count_ends_with_the_token_that_completes_a_stop() -> None:
    tokens = _ids("good film é fine user")
    for stop in (" film", "lm é", "é", "f", "user", " fin"):
        least = next(n for n in range(1, 99) if stop in TOKENIZER.decode(tokens[:n]))
        assert _decode("good film é fine user", stop)[1:] == (least, True)


def test_count_with_a_stop_of_incomplete_characters() -> None:
    """A model may generate incomplete characters, and a client may stop at how they are shown."""
    half = TOKENIZER.convert_tokens_to_ids(["f", "Ã", "x", "Ã", "Ã", "f"])
    stop = "\ufffdx\ufffd"
    assert _decode("", stop, raw=half) == ("f", 4, True)
    assert _decode("", stop, raw=half[:4]) == ("f", 4, True)


def test_count_without_a_stop_is_all_tokens() -> None:
    tokens = _ids("good film é")
    assert _decode("good film é", "zzz")[1:] == (len(tokens), False)
    assert _decode("", raw=tokens[:-1])[1] == len(tokens) - 1


@pytest.mark.parametrize("stops", [(), ("zzz",)])
@pytest.mark.parametrize("tokenizer", [_metaspace(), _stripping()])
def test_special_tokens_take_no_space_with_them(tokenizer: Any, stops: tuple[str, ...]) -> None:
    """T5's sentinels, and unknown tokens, stand between words that have their own spaces."""
    draw, words = random.Random(0), tokenizer.convert_tokens_to_ids(["▁Hello", "▁world", "x", "▁"])
    for _ in range(300):
        tokens = draw.choices([*words, *sorted(special_ids(tokenizer))], k=draw.randint(1, 8))
        assert _streamed(tokenizer, tokens, (), stops) == _full_text(tokenizer, tokens)


@pytest.mark.parametrize("tokenizer", [_metaspace(), _stripping(), TOKENIZER])
def test_answer_follows_its_input_with_the_space_between(tokenizer: Any) -> None:
    draw = random.Random(1)
    names = ["▁Hello", "▁world", "x", "▁"]
    words = _ids("fine film é") if tokenizer is TOKENIZER else tokenizer.convert_tokens_to_ids(names)
    pool = [*words, *sorted(special_ids(tokenizer))]
    for _ in range(300):
        context, tokens = (draw.choices(pool, k=draw.randint(1, 6)) for _ in range(2))
        before = _full_text(tokenizer, context)
        if not before.endswith("\ufffd"):  # else a character would be divided between input and answer
            assert before + _streamed(tokenizer, tokens, context) == _full_text(tokenizer, [*context, *tokens])


def test_stop_may_be_a_control_token_that_the_tokenizer_does_not_name() -> None:
    """As Llama 3's `<|start_header_id|>`: marked special, but not one of the tokenizer's own."""
    tokenizer = _tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn not in tokenizer.all_special_ids
    detokenizer = IncrementalDetokenizer(tokenizer, ["<|turn|>"])
    assert "".join(map(detokenizer.add, [*_ids("fine"), turn, *_ids("user")])) == "fine"
    assert (detokenizer.stopped, detokenizer.count) == (True, len(_ids("fine")) + 1)
