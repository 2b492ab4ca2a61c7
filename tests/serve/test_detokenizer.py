"""Stop texts, also those that are control tokens, and the tokens counted up to them."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
