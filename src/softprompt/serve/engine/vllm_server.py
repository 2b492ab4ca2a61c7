"""A vLLM server's HTTP API over prompt embeddings: its model, log-probabilities of tokens, and streams of tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, final

import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, by its version
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.export.client import GREEDY, encode_embeds, vllm_logprobs, vllm_logprobs_requests
from softprompt.serve.engine.request import EngineUnavailable, GenerateParams

_CONNECT_TIMEOUT = 5.0
"""Seconds to open a connection, and for an answer without a model's work."""
_CHECK_TIMEOUT = 120.0
"""Seconds for the first answers, in which vLLM may still compile."""
_KEEP_ALIVE = 2.0
"""Seconds that an idle connection is kept: fewer than the 5 after which vLLM closes it."""
_MAX_ROWS = 64
"""Rows per request."""
_PROBE = "A prompt that is sent as vectors must be read just like its tokens."
_PROBE_TOKENS = 64
"""Tokens that the probe's answers are compared in."""
_TOLERANCE = 0.1
"""Largest difference of log-probabilities that counts as rounding: in bfloat16, of a server with other work."""
_OLD = "use vLLM 0.32 or later"

Row = Float[Tensor, "token dim"]
"""The vectors of a prompt and of the text after it."""


class ConnectionLost(EngineUnavailable):
    """There is no connection to the server."""


class _Refused(EngineUnavailable):
    """The server answered with another status than 200."""


@final
class VllmServer:
    """The server at a URL; all calls belong to one event loop.

    Args:
        url: its root, such as `http://localhost:8000`.
        key: API key; empty: none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        self.max_row = 0
        """Positions of a row with prompt and answer, once checked."""
        self._model = ""
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT),  # requests have deadlines of their own
        )

    async def check(self, backbone: Backbone) -> None:
        """Check that the server runs `backbone` and takes its embeddings.

        A text is sent as token ids and as rows of the backbone's table, and the answers must be equal.

        Raises:
            EngineUnavailable: no server answers, or not as vLLM does.
            ValueError: it takes no embeddings, or runs another model.
        """
        models = await self._get_models()
        try:
            card = next(card for card in models["data"] if not card.get("parent"))  # LoRA adapters have one
            self._model, self.max_row = str(card["id"]), int(card["max_model_len"])
        except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as error:
            raise EngineUnavailable(
                f"the server at {self.url} does not list its model as vLLM does; give a vLLM server as --engine-url"
            ) from error
        ids = list(backbone.tokenizer(_PROBE)["input_ids"])[: self.max_row - 1]
        # From the whole vocabulary, so that a server with a smaller one refuses the request.
        tokens = sorted({*torch.linspace(0, backbone.vocab_size - 1, _PROBE_TOKENS).long().tolist()})
        rows = backbone.model.get_input_embeddings()(torch.tensor(ids)).detach()
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                [by_rows] = await self.logprobs([rows], tokens)
                [request] = vllm_logprobs_requests(tokens)
                response = await self._post({"prompt": [ids], **request})
        except TimeoutError as error:
            raise EngineUnavailable(
                f"the vLLM server at {self.url} does not answer within {_CHECK_TIMEOUT:g} seconds; see its log"
            ) from error
        except _Refused as error:
            if "enable-prompt-embeds" in str(error):
                raise ValueError(
                    f"the vLLM server at {self.url} takes no prompt embeddings; start it with --enable-prompt-embeds"
                ) from error
            raise ValueError(
                f"the vLLM server at {self.url} does not take {backbone.source}'s vectors of {backbone.dim} values or "
                f"its {backbone.vocab_size} tokens ({error}); start it with the same model"
            ) from error
        [by_ids] = self._read_logprobs(response, tokens, 1)
        gap = max(abs(by_rows[token] - by_ids[token]) for token in tokens)
        if not gap <= _TOLERANCE:
            raise ValueError(
                f"the vLLM server at {self.url} (model {self._model}) answers {backbone.source}'s vectors of a text "
                f"unlike the text itself (log-probabilities differ by {gap:.2g}); start it with the same weights"
            )

    async def is_healthy(self) -> bool:
        """Whether the server says that it can answer."""
        try:
            response = await self._client.get("/health", timeout=_CONNECT_TIMEOUT)
        except httpx.RequestError:
            return False
        return bool(response.status_code == 200)

    async def logprobs(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[dict[int, float]]:
        """For each row, the log-probability of each of `tokens` as the next one.

        Raises:
            EngineUnavailable: the server fails; as `ConnectionLost` where it cannot be reached.
        """
        results: list[dict[int, float]] = [{} for _ in rows]
        embeds = await asyncio.to_thread(lambda: [encode_embeds(row) for row in rows])
        for first in range(0, len(rows), _MAX_ROWS):
            part = slice(first, first + _MAX_ROWS)
            for request in vllm_logprobs_requests(tokens):
                response = await self._post({"prompt": None, "prompt_embeds": embeds[part], **request})
                answers = self._read_logprobs(response, request["logprob_token_ids"], len(embeds[part]))
                for result, answer in zip(results[part], answers, strict=True):
                    result.update(answer)
        return results

    async def stream(self, row: Row, params: GenerateParams) -> AsyncIterator[int]:
        """The tokens that continue a row; the last one may be a stop token.

        Raises:
            EngineUnavailable: the server fails, or ends before `max_new_tokens` without a stop token.
        """
        embeds = await asyncio.to_thread(encode_embeds, row)
        sent, ended = 0, False
        async with self._request({"prompt": None, "prompt_embeds": [embeds], **_generation(params)}) as response:
            async for line in response.aiter_lines():
                for token in self._read_event(line):
                    yield token
                    sent += 1
                    ended = token in params.stop or sent == params.max_new_tokens
        if not ended:
            raise EngineUnavailable(f"the vLLM server ended a text after {sent} tokens; try again")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _get_models(self) -> Any:
        try:
            response = await self._client.get("/v1/models", timeout=_CONNECT_TIMEOUT)
        except httpx.RequestError as error:
            raise EngineUnavailable(
                f"no vLLM server answers at {self.url} ({str(error) or type(error).__name__}); start one there (vllm "
                "serve MODEL --enable-prompt-embeds), or correct --engine-url"
            ) from error
        if response.status_code == 401:
            raise EngineUnavailable(f"the vLLM server at {self.url} asks for an API key; set VLLM_API_KEY to it")
        try:
            return response.json()
        except ValueError as error:
            raise EngineUnavailable(
                f"{self.url}/v1/models answers {response.status_code} without JSON; give a vLLM server as --engine-url"
            ) from error

    @asynccontextmanager
    async def _request(self, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """The response to a completion request, with the status 200."""
        try:
            async with self._client.stream("POST", "/v1/completions", json={"model": self._model, **body}) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise _Refused(f"the vLLM server answers {response.status_code}: {text[:300]}")
                yield response
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise ConnectionLost(f"the connection to the vLLM server broke ({reason}); try again later") from error

    async def _post(self, body: Mapping[str, Any]) -> Any:
        async with self._request(body) as response:
            content = await response.aread()
        try:
            return json.loads(content)
        except ValueError as error:
            raise EngineUnavailable(f"the vLLM server sends no JSON; {_OLD}") from error

    def _read_logprobs(self, response: Any, tokens: Sequence[int], rows: int) -> list[dict[int, float]]:
        try:
            answers = [{token: row[token] for token in tokens} for row in vllm_logprobs(response)]
            if len(answers) != rows:
                raise ValueError(f"{len(answers)} rows")
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise EngineUnavailable(f"the vLLM server does not send the log-probabilities asked for; {_OLD}") from error
        return answers

    def _read_event(self, line: str) -> list[int]:
        """The tokens in a line of a stream of server-sent events."""
        data = line.removeprefix("data: ")
        if data in (line, "[DONE]"):
            return []
        try:
            event = json.loads(data)
            if "error" in event:
                raise EngineUnavailable(f"the vLLM server fails ({str(event['error'])[:300]}); try again later")
            return [int(token) for choice in event["choices"] for token in choice["token_ids"] or ()]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineUnavailable(f"the vLLM server sends no token ids; {_OLD}") from error


def _generation(params: GenerateParams) -> dict[str, Any]:
    """The fields of a generation. The server's defaults, of the model's generation config, apply to none."""
    sampling = params.sampling
    return {
        **GREEDY,
        "stream": True,
        "return_token_ids": True,
        "max_tokens": params.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "seed": sampling.seed % 2**63,  # -1 would mean none
        "logit_bias": {str(token): bias for token, bias in params.logit_bias.items()} or None,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "ignore_eos": True,  # ours, which are the model's and the tokenizer's, are among the stop tokens
        "stop_token_ids": list(params.stop),
    }
