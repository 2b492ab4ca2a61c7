"""The exported client asks for all label tokens, and gives no label where the server has no numbers."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from softprompt.export.client import Client, LlamaCpp, Vllm

ANSWERS = [f"label {number}" for number in range(300)]


def client_of(kind: type[Client], answers: dict[str, list[int]]) -> Any:
    client = object.__new__(kind)
    client.url, client.model = "http://localhost", "m"
    client.settings = {"prompts": {"p": {"ids": [1], "answers": answers, "max_input_tokens": 9}}}
    client.ids = lambda text, control=False: [2, 3]
    return client


def vllm_answer(rows: int, log_probs: dict[int, float | None]) -> dict[str, Any]:
    top = {f"token_id:{token}": value for token, value in log_probs.items()}
    return {"choices": [{"index": row, "logprobs": {"top_logprobs": [top]}} for row in range(rows)]}


def test_more_label_tokens_than_vllm_takes_in_a_request() -> None:
    sizes = []

    def post(path: str, prompt: Sequence[Any], logprob_token_ids: Sequence[int], **_: Any) -> Any:
        sizes.append(len(logprob_token_ids))
        return vllm_answer(len(prompt), {token: -token / 100 for token in (10, *logprob_token_ids)})

    client = client_of(Vllm, {label: [10 + number] for number, label in enumerate(ANSWERS)})
    client._post = post
    answer = client.classify("p", "a text")
    assert (answer.label, list(answer.probabilities)) == (ANSWERS[0], ANSWERS)
    weights = [math.exp(-number / 100) for number in range(300)]
    assert list(answer.probabilities.values()) == pytest.approx([weight / sum(weights) for weight in weights])
    assert sizes == [128, 128, 44]


@pytest.mark.parametrize("log_probs", [{10: None, 11: None}, {10: -1.0, 11: None}, {}])
def test_no_label_where_vllm_overflows(log_probs: dict[int, float | None]) -> None:
    """JSON has null for NaN."""
    client = client_of(Vllm, {"yes": [10], "no": [11]})
    client._post = lambda path, **body: vllm_answer(1, log_probs)
    with pytest.raises(ValueError, match="has no probability for the labels of prompt 'p' on this text"):
        client.classify("p", "a text")


def llama_cpp_answer(probabilities: dict[int, float | None]) -> list[dict[str, Any]]:
    top = [{"id": token, "prob": value} for token, value in probabilities.items()]
    return [{"index": 0, "completion_probabilities": [{"top_probs": top}]}]


def test_label_whose_probability_underflows_in_llama_cpp() -> None:
    client = client_of(LlamaCpp, {"yes": [10], "no": [11]})
    client._post = lambda path, **body: llama_cpp_answer({10: 0.0, 11: 1.0})
    assert client.classify("p", "a text") == ("no", {"yes": 0.0, "no": 1.0})
    client._post = lambda path, **body: llama_cpp_answer({10: None, 11: None})
    with pytest.raises(ValueError, match="has no probability for the labels of prompt 'p' on this text"):
        client.classify("p", "a text")
