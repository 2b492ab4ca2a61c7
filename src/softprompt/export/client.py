r"""Labels, probabilities and texts of exported prompts, from a vLLM or llama.cpp server.

Copied into an export, where it needs transformers (and for `vllm` exports torch and safetensors), not softprompt:

    python client.py http://localhost:8000 sentiment $'Review: A film that earns its tears.\nSentiment:'

Every request is greedy or asks for log-probabilities alone, so answers do not depend on the server's sampling settings.
"""

import base64
import io
import json
import math
import sys
import unicodedata
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from transformers import AutoTokenizer

GREEDY: dict[str, Any] = {
    "temperature": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent with each request to vLLM: what a request leaves out, the server takes from the model's generation config."""
_BIAS = 200.0
"""Added to the label tokens' logits in llama.cpp so that they come first in its list; their ratios stay the same."""


_MAX_LOGPROBS = 128
"""Tokens whose log-probabilities a request to vLLM can ask for."""


class Answer(NamedTuple):
    """A label and every label's probability among the labels."""

    label: str
    probabilities: dict[str, float]


def label_prefixes(candidates: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """What labels of these token ids begin with, each once: where their next tokens' log-probabilities are needed.

    >>> label_prefixes([(5,), (7, 8)])
    [(), (7,)]
    """
    return sorted({tuple(ids[:length]) for ids in candidates for length in range(len(ids))})


def label_scores(
    candidates: Sequence[Sequence[int]], log_probs: Mapping[tuple[int, ...], Mapping[int, float]]
) -> list[float]:
    """The log-probability of each label: the sum over its tokens.

    Args:
        candidates: the labels' token ids.
        log_probs: after each of `label_prefixes`, the log-probabilities of tokens; minus infinity where one is missing.

    >>> label_scores([(5,), (7, 8)], {(): {5: -1.0, 7: -0.5}, (7,): {8: -0.25}})
    [-1.0, -0.75]
    """
    return [
        sum(log_probs[tuple(ids[:length])].get(token, -math.inf) for length, token in enumerate(ids))
        for ids in candidates
    ]


def vllm_logprobs_requests(tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Fields of vLLM's `/v1/completions` (0.32) that ask for the next token's log-probability among `tokens`.

    Several requests where there are more tokens than one may ask for.

    Args:
        tokens: different ids.
    """
    parts = [list(tokens[start : start + _MAX_LOGPROBS]) for start in range(0, len(tokens), _MAX_LOGPROBS)]
    return [
        {
            **GREEDY,
            "max_tokens": 1,
            "logprobs": len(part),
            "logprob_token_ids": part,
            "return_tokens_as_token_ids": True,
        }
        for part in parts
    ]


def vllm_logprobs(response: Mapping[str, Any]) -> list[dict[int, float]]:
    """The log-probabilities in vLLM's answer to one of `vllm_logprobs_requests`, one dictionary for each input."""
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    top = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
    return [{int(key.removeprefix("token_id:")): _number(value) for key, value in row.items()} for row in top]


def _number(value: float | None) -> float:
    """A number of a server's answer: JSON has no NaN, so servers write null where the model overflows."""
    return math.nan if value is None else float(value)


def _log(probability: float | None) -> float:
    return -math.inf if probability == 0 else math.log(_number(probability))


def is_control(token: Any) -> bool:
    """Whether an added token is a control token: special, or in brackets; never a single character."""
    name = token.content.strip()
    if len(name) < 2:
        return False
    opens = name[0] == "<" or unicodedata.category(name[0]) in ("Ps", "Pi")
    closes = name[-1] == ">" or unicodedata.category(name[-1]) in ("Pe", "Pf")
    return bool(token.special or (opens and closes))


def encode_embeds(embeds: Any) -> str:
    """A `[tokens, hidden]` tensor as `prompt_embeds` of `/v1/completions`; vLLM reads it with `weights_only=True`."""
    import torch

    stream = io.BytesIO()
    torch.save(embeds, stream)
    return base64.b64encode(stream.getvalue()).decode()


class Client(ABC):
    """The prompts in one export folder, and the server that holds their model.

    Args:
        folder: the export.
        url: the server's root, such as `http://localhost:8000`.
        model: the name under which vLLM serves the model; llama.cpp ignores it.
        key: API key, if the server asks for one.
    """

    def __init__(self, folder: str | Path, url: str = "", model: str = "", key: str = "") -> None:
        self.folder, self.url, self.model, self.key = Path(folder), url.rstrip("/"), model, key
        self.settings = json.loads((self.folder / "prompts.json").read_text(encoding="utf-8"))
        tokenizer = self.folder / "tokenizer"
        self.tokenizer = AutoTokenizer.from_pretrained(
            tokenizer if tokenizer.is_dir() else self.folder, trust_remote_code=False
        )

    @abstractmethod
    def _log_probs(
        self, name: str, rows: Sequence[Sequence[int]], ids: Sequence[int], *, absolute: bool
    ) -> list[dict[int, float]]:
        """For each row of text ids: the log-probability of each of `ids` as the next token.

        `absolute`: over the vocabulary; else up to a constant of the row.
        """

    @abstractmethod
    def _write(self, name: str, row: Sequence[int], max_new_tokens: int) -> str:
        """The text that the model writes after the text ids `row`, greedily."""

    def write(self, name: str, text: str, *, max_new_tokens: int | None = None, control: bool = False) -> str:
        """The text that the model writes after `text`, greedily.

        Args:
            name: of the prompt.
            text: the rendered template.
            max_new_tokens: most tokens that are written; None: the run's.
            control: as of `ids`.

        Raises:
            ValueError: as `ids` and for a text that is too long for the run.
        """
        return self._write(name, self._row(name, text, control), max_new_tokens or self._prompt(name)["max_new_tokens"])

    def classify(self, name: str, text: str, *, control: bool = False) -> Answer:
        """The label of `text` and the probabilities of all labels, as `softprompt predict` gives them.

        A label of several tokens has the product of their probabilities. One request: in vLLM for each 128 label
        tokens, in llama.cpp two where a label has several tokens.

        Args:
            name: of the prompt.
            text: the rendered template.
            control: as of `ids`.

        Raises:
            ValueError: the prompt's task is not a classification, the model overflows, or as `write`.
        """
        answers: dict[str, list[int]] = self._prompt(name)["answers"]
        if not answers:
            raise ValueError(f"the task of prompt {name!r} is not a classification; use write")
        row = self._row(name, text, control)
        prefixes = label_prefixes(answers.values())
        tokens = sorted({token for ids in answers.values() for token in ids})
        log_probs = self._log_probs(name, [[*row, *prefix] for prefix in prefixes], tokens, absolute=len(prefixes) > 1)
        sums = label_scores(list(answers.values()), dict(zip(prefixes, log_probs, strict=True)))
        scores = dict(zip(answers, sums, strict=True))
        most = max(sums)
        if any(map(math.isnan, sums)) or not math.isfinite(most):
            raise ValueError(
                f"the server at {self.url} has no probability for the labels of prompt {name!r} on this text, because "
                "the model overflows or their tokens are left out; serve the model in another dtype, or train the "
                "prompt again"
            )
        weights = {label: math.exp(score - most) for label, score in scores.items()}
        total = sum(weights.values())
        return Answer(max(scores, key=scores.__getitem__), {label: weight / total for label, weight in weights.items()})

    def ids(self, text: str, *, control: bool = False) -> list[int]:
        """The text's tokens as in training: special tokens before it stay, those after it go.

        Args:
            text: the rendered template.
            control: accept control tokens (`<|im_end|>`) in the text, for a template that has them; never with text
                that a user wrote.

        Raises:
            ValueError: the text holds a control token.
        """
        encoded = self.tokenizer(text, return_special_tokens_mask=True)
        ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        added = self.tokenizer.added_tokens_decoder.items()
        known = {index: token.content for index, token in added if is_control(token)}
        for token, is_special in zip(ids, special, strict=True):
            if not control and not is_special and token in known and known[token] in text:
                raise ValueError(
                    f"the text holds the control token {known[token]!r}; remove it, or give control=True if it comes "
                    "from the template and not from a user"
                )
        while ids and special[len(ids) - 1] and 0 in special[: len(ids)]:
            ids.pop()
        return ids

    def _row(self, name: str, text: str, control: bool) -> list[int]:
        ids, limit = self.ids(text, control=control), self._prompt(name)["max_input_tokens"]
        if len(ids) > limit:
            raise ValueError(
                f"the text has {len(ids)} tokens, but the run of prompt {name!r} reads at most {limit}; shorten it"
            )
        return ids

    def _prompt(self, name: str) -> dict[str, Any]:
        prompts: dict[str, dict[str, Any]] = self.settings["prompts"]
        if name not in prompts:
            raise ValueError(f"no prompt is called {name!r}; the export has {', '.join(prompts)}")
        return prompts[name]

    def _without_prompt_tokens(self, log_probs: dict[int, float]) -> dict[int, float]:
        """Log-probabilities over the backbone's vocabulary: each prompt token is as likely as the stand-in token."""
        stand_in = self.settings.get("stand_in_id")
        if stand_in is None:
            return log_probs
        rest = math.log1p(-len(self.settings["suppressed_ids"]) * math.exp(log_probs[stand_in]))
        return {token: value - rest for token, value in log_probs.items()}

    def _post(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ValueError(f"{self.url}{path} answered {error.code}: {text[:500]}") from error


class _Vllm(Client):
    """What both ways into vLLM share: `/v1/completions` with `logprob_token_ids` (vLLM 0.32)."""

    @abstractmethod
    def _inputs(self, name: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The request's input: the prompt, then each row."""

    def _log_probs(
        self, name: str, rows: Sequence[Sequence[int]], ids: Sequence[int], *, absolute: bool
    ) -> list[dict[int, float]]:
        stand_in = self.settings.get("stand_in_id")
        tokens = sorted({*ids, *([] if stand_in is None else [stand_in])})
        inputs, log_probs = self._inputs(name, rows), [dict[int, float]() for _ in rows]
        for request in vllm_logprobs_requests(tokens):
            response = self._post("/v1/completions", model=self.model, **inputs, **request)
            for row, part in zip(log_probs, vllm_logprobs(response), strict=True):
                row.update(part)
        return [self._without_prompt_tokens(row) for row in log_probs]

    def _write(self, name: str, row: Sequence[int], max_new_tokens: int) -> str:
        inputs = self._inputs(name, [row])
        body = {"model": self.model, "max_tokens": max_new_tokens, **GREEDY}
        return str(self._post("/v1/completions", **inputs, **body)["choices"][0]["text"])


@final
class VllmEmbeds(_Vllm):
    """A `vllm` export: each request carries the prompt's and the text's embeddings (`--enable-prompt-embeds`)."""

    def __init__(self, folder: str | Path, url: str = "", model: str = "", key: str = "") -> None:
        from safetensors.torch import load_file

        super().__init__(folder, url, model, key)
        self.prompts = load_file(self.folder / "prompts.safetensors")
        self.embedding = load_file(self.folder / "embedding.safetensors")["embedding"]

    def embeds(self, name: str, text: str, *, control: bool = False) -> Any:
        """The tensor for `LLM.generate({"prompt_embeds": ...})`: `[tokens, hidden]` in the model's dtype."""
        return self._embeds(name, self.ids(text, control=control))

    def encoded(self, name: str, text: str, *, control: bool = False) -> str:
        """The `prompt_embeds` field of `/v1/completions`; vLLM reads it with `weights_only=True`."""
        return encode_embeds(self.embeds(name, text, control=control))

    def _inputs(self, name: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"prompt": None, "prompt_embeds": [encode_embeds(self._embeds(name, row)) for row in rows]}

    def _embeds(self, name: str, ids: Sequence[int]) -> Any:
        import torch

        table = self.embedding
        return torch.cat([self.prompts[name].to(table.dtype), table[torch.tensor(ids)]])


@final
class Vllm(_Vllm):
    """A `vocab` export that vLLM serves: each request carries token ids."""

    def _inputs(self, name: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"prompt": [[*self._prompt(name)["ids"], *row] for row in rows]}


@final
class LlamaCpp(Client):
    """A `gguf` export that `llama-server` serves: each request carries token ids."""

    def _log_probs(
        self, name: str, rows: Sequence[Sequence[int]], ids: Sequence[int], *, absolute: bool
    ) -> list[dict[int, float]]:
        stand_in = self.settings.get("stand_in_id")
        tokens = sorted({*ids, *([] if stand_in is None else [stand_in])})
        prompts = [[*self._prompt(name)["ids"], *row] for row in rows]
        # After the bias, the probabilities of `tokens` alone are left, in their right ratios.
        biased = self._first_tokens(prompts, tokens, n_probs=len(tokens), post_sampling_probs=True)
        ratios = [
            {entry["id"]: _log(entry["prob"]) for entry in row["top_probs"] if entry["id"] in tokens} for row in biased
        ]
        if not absolute:
            return ratios
        # The unbiased log-probability of the token that is drawn: a bias on one token alone decides which.
        likely = max(tokens, key=lambda token: min(row.get(token, -math.inf) for row in ratios))
        forced = [_number(first["logprob"]) for first in self._first_tokens(prompts, [likely], n_probs=1)]
        return [
            self._without_prompt_tokens({token: value - row[likely] + drawn for token, value in row.items()})
            for row, drawn in zip(ratios, forced, strict=True)
        ]

    def _first_tokens(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int], **body: Any) -> list[Any]:
        """The probabilities of each prompt's next token, `tokens` put first."""
        response = self._post(
            "/completion",
            prompt=prompts,
            n_predict=1,
            samplers=["temperature"],
            temperature=1.0,
            logit_bias=[[token, _BIAS] for token in tokens],
            **body,
        )
        results = sorted(response if isinstance(response, list) else [response], key=lambda result: result["index"])
        return [result["completion_probabilities"][0] for result in results]

    def _write(self, name: str, row: Sequence[int], max_new_tokens: int) -> str:
        prompt = [*self._prompt(name)["ids"], *row]
        body = {"n_predict": max_new_tokens, "samplers": ["temperature"], "temperature": 0}
        return str(self._post("/completion", prompt=prompt, **body)["content"])


CLIENTS: dict[str, type[Client]] = {"vllm": VllmEmbeds, "vocab": Vllm, "gguf": LlamaCpp}
"""By the export's format."""


def open_client(folder: str | Path, url: str, model: str = "", key: str = "") -> Client:
    """The client of the export in `folder`; arguments as of `Client`."""
    settings = json.loads((Path(folder) / "prompts.json").read_text(encoding="utf-8"))
    return CLIENTS[settings["format"]](folder, url, model, key)


if __name__ == "__main__":
    url, name, text, *model = sys.argv[1:]
    client = open_client(Path(__file__).parent, url, *model)
    answer = client.classify(name, text) if client.settings["prompts"][name]["answers"] else client.write(name, text)
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
