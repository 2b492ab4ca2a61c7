"""A small HTTP server that answers as vLLM 0.32 does, with a transformers model that runs the vectors it is sent."""

import asyncio
import base64
import copy
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

GENERATION_CONFIG = {
    "temperature": 1.0,
    "top_k": 3,
    "top_p": 0.5,
    "repetition_penalty": 9.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""The model's own settings, which apply to what a request leaves out."""


class FakeVllm:
    """`with FakeVllm(model) as url:`. Set `fault` to have requests fail, and call `stop` and `start` for outages.

    Args:
        model: a decoder of transformers.
        max_model_len: positions of a row.
        takes_embeds: whether `--enable-prompt-embeds` was given.
        key: the API key that requests need; empty: none.
    """

    def __init__(self, model: Any, max_model_len: int = 200, takes_embeds: bool = True, key: str = "") -> None:
        self.model, self.max_model_len, self.takes_embeds, self.key = model, max_model_len, takes_embeds, key
        self.fault = ""
        """`error`: status 500; `cut`: streams end after a token; `hang`: no answer; `empty`: no log-probabilities;
        `nan`: null for each, as JSON has it; `dead`: not healthy, and requests hang."""
        self.disconnected = 0
        """Requests whose client went away while they hung."""
        self.requests: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.add_api_route("/health", lambda: Response(status_code=500 if self.fault == "dead" else 200))
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/completions", self._complete, methods=["POST"])
        self.port = 0

    def __enter__(self) -> str:
        self.start()
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        config = uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=1)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        card = {"id": "served", "owned_by": "vllm", "root": "/models/x", "parent": None}
        adapter = {"id": "adapter", "parent": "served"}
        return JSONResponse({"object": "list", "data": [adapter, {**card, "max_model_len": self.max_model_len}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.fault == "error":
            return JSONResponse({"error": {"message": "the engine is dead", "code": 500}}, 500)
        while self.fault in ("hang", "dead"):
            if await request.is_disconnected():
                self.disconnected += 1
                return Response()
            await asyncio.sleep(0.02)
        try:
            rows = self._rows(body)
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
        if body.get("stream"):
            [row] = rows
            return StreamingResponse(self._events(row, body), media_type="text/event-stream")
        choices = [{"index": index, "logprobs": self._logprobs(row, body)} for index, row in enumerate(rows)]
        return JSONResponse({"choices": choices[::-1]})  # the order is the index's

    def _rows(self, body: dict[str, Any]) -> list[torch.Tensor]:
        table = self.model.get_input_embeddings().weight
        if body["model"] != "served":
            raise ValueError(f"the model {body['model']} does not exist")
        if any(not 0 <= token < len(table) for token in body.get("logprob_token_ids", ())):
            raise ValueError("token_id is out of vocab")
        if len(body.get("logprob_token_ids", ())) > 128:
            raise ValueError("too many logprob_token_ids")
        if body["prompt"] is not None:
            return [table[torch.tensor(ids)] for ids in body["prompt"]]
        if not self.takes_embeds:
            raise ValueError("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        rows = []
        for content in body["prompt_embeds"]:
            row = torch.load(io.BytesIO(base64.b64decode(content)), weights_only=True)
            if row.shape[1] != table.shape[1]:
                raise ValueError(f"`prompt_embeds` hidden_size {row.shape[1]} does not match {table.shape[1]}")
            if len(row) + 1 > self.max_model_len:
                raise ValueError("the prompt is too long")
            rows.append(row.to(table.dtype))
        return rows

    @torch.no_grad()
    def _logits(self, row: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs_embeds=row[None]).logits[0, -1].float()
        return logits

    def _logprobs(self, row: torch.Tensor, body: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logits(row).log_softmax(-1)
        drawn = int(logprobs.argmax())  # listed too
        tokens = [] if self.fault == "empty" else dict.fromkeys([drawn, *body["logprob_token_ids"]])
        top = {f"token_id:{token}": None if self.fault == "nan" else float(logprobs[token]) for token in tokens}
        return {"top_logprobs": [top]}

    def _events(self, row: torch.Tensor, body: dict[str, Any]) -> Iterator[str]:
        settings = {**GENERATION_CONFIG, **body}
        generator = torch.Generator().manual_seed(settings.get("seed", 0))
        stops = {*settings["stop_token_ids"], *([] if settings["ignore_eos"] else [1])}
        tokens: list[int] = []
        while len(tokens) < min(settings["max_tokens"], self.max_model_len - len(row) + len(tokens)):
            if self.fault == "cut" and tokens:
                return
            logits = self._logits(row)
            for token, count in Counter(tokens).items():
                logits[token] -= settings["presence_penalty"] + settings["frequency_penalty"] * count
                logits[token] /= settings["repetition_penalty"]
            for token, bias in (settings["logit_bias"] or {}).items():
                logits[int(token)] += bias
            if settings["temperature"]:
                probs = (logits / settings["temperature"]).softmax(-1)
                tokens.append(int(torch.multinomial(probs, 1, generator=generator)))
            else:
                tokens.append(int(logits.argmax()))
            row = torch.cat([row, self.model.get_input_embeddings().weight[tokens[-1:]].detach()])
            yield f"data: {json.dumps({'choices': [{'index': 0, 'token_ids': tokens[-1:], 'text': '?'}]})}\n\n"
            if tokens[-1] in stops:
                break
        yield "data: [DONE]\n\n"


@torch.no_grad()
def other_weights(model: Any) -> Any:
    """The same model with a slightly different embedding table."""
    other = copy.deepcopy(model)
    table = other.get_input_embeddings().weight
    table += 0.1 * table.std() * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    return other
