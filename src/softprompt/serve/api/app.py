"""The ASGI application: OpenAI's routes, classification, prompt management, health and metrics."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from softprompt import __version__
from softprompt.serve.api import errors
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.api.middleware import RequestMiddleware
from softprompt.serve.api.openai import openai_routes
from softprompt.serve.api.schemas import ClassifyRequest
from softprompt.serve.api.streaming import gather_results, record_of, wait_or_cancel
from softprompt.serve.engine.base import BaseEngine
from softprompt.serve.engine.request import ClassifyOutput, EngineRequest
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.entry import PromptEntry, check_prompt_name, display_name
from softprompt.serve.prompts.store import PromptStore, read_upload

PAGE = Path(__file__).with_name("page") / "index.html"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_Name = Annotated[str, Query(max_length=128)]


def make_app(
    engine: BaseEngine,
    auth: AuthConfig | None = None,
    *,
    metrics: Metrics | None = None,
    store: PromptStore | None = None,
    log_texts: bool = False,
    grace: float = 30.0,
) -> FastAPI:
    """The ASGI application over an engine, which it closes at shutdown.

    Args:
        auth: who may send which requests; None: anyone may ask, and prompts cannot be changed.
        metrics: those that the engine's `on_batch` reports to.
        store: keeps uploaded prompts; None: they are lost with the process.
        log_texts: log the texts that users send.
        grace: seconds in which running requests may finish at shutdown.
    """
    metrics = metrics or Metrics()
    metrics.bind(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, grace)

    app = FastAPI(title="softprompt", version=__version__, lifespan=lifespan, redoc_url=None, docs_url=None)
    app.state.engine = engine
    for router in (
        _status_routes(engine, metrics),
        openai_routes(engine),
        _classify_routes(engine),
        _prompt_routes(engine, store, metrics),
    ):
        app.include_router(router)
    handled: tuple[Any, ...] = (RequestValidationError, HTTPException, *errors.EXPECTED, Exception)
    for kind in handled:
        app.add_exception_handler(kind, errors.handle_error)
    app.add_middleware(RequestMiddleware, auth=auth or AuthConfig(), metrics=metrics, log_texts=log_texts)
    return app


def _status_routes(engine: BaseEngine, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    page = PAGE.read_text(encoding="utf-8")

    @router.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @router.get("/healthz", summary="Whether the engine runs")
    async def healthz() -> JSONResponse:
        return JSONResponse({"alive": engine.alive}, 200 if engine.alive else 503)

    @router.get("/readyz", summary="Whether requests are accepted")
    async def readyz() -> JSONResponse:
        ready = engine.status().ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @router.get("/metrics", summary="Metrics for Prometheus")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/status", summary="The queue and the running generations")
    async def status() -> dict[str, Any]:
        backbone = engine.backbone
        return {**asdict(engine.status()), "backbone": display_name(backbone), "kind": backbone.architecture}

    return router


def _classify_routes(engine: BaseEngine) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", summary="The prompts and the model without one, as OpenAI's clients list models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(entry) for entry in engine.models]}

    @router.get("/v1/models/{name}", summary="One prompt")
    async def model(name: str) -> dict[str, Any]:
        return _model(engine.get(name))

    @router.post("/v1/classify", summary="Choose a label for each row")
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        record, rows = record_of(request), body.rows()
        name = engine.get(body.model).name
        record.prompt, record.rows, record.texts = name, len(rows), list(rows)
        record.requests = requests = await asyncio.to_thread(
            engine.classify, name, rows, body.labels, arrived=record.arrived
        )
        outputs = await wait_or_cancel(request, engine, gather_results(requests))
        task = requests[0].entry.task  # the prompt may have been replaced since it was looked up
        labels = body.labels or (list(task.label_words) if task is not None else [])
        return {
            "object": "classification",
            "model": body.model,
            "results": [
                _classification(labels, index, engine_request, output)
                for index, (engine_request, output) in enumerate(zip(requests, outputs, strict=True))
            ],
            "usage": {"prompt_tokens": record.input_tokens, "total_tokens": record.input_tokens},
        }

    return router


def _classification(labels: list[str], index: int, request: EngineRequest, output: ClassifyOutput) -> dict[str, Any]:
    probs = torch.tensor(output.logprobs, dtype=torch.float32).softmax(0).tolist()
    best = max(range(len(probs)), key=probs.__getitem__)
    return {
        "index": index,
        "label": labels[best],
        "probabilities": dict(zip(labels, probs, strict=True)),
        "tokens": len(request.ids),
    }


def _prompt_routes(engine: BaseEngine, store: PromptStore | None, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    change_lock = asyncio.Lock()
    body = {"requestBody": {"content": _FILE, "required": True}}

    def add_or_replace(name: str, content: bytes, replace: bool) -> dict[str, Any]:
        prompt = read_upload(content, engine.backbone)
        if store is None:
            return engine.add(name, prompt, replace=replace).describe()
        with store.saving(name, content, replace=replace):  # saved only if it can be served
            entry = engine.make_entry(name, prompt, replace=replace)
        engine.register(entry)  # served only if it was saved
        return entry.describe()

    async def upload(name: str, request: Request, replace: bool) -> dict[str, Any]:
        content = await request.body()
        async with change_lock:
            return await asyncio.to_thread(add_or_replace, check_prompt_name(name), content, replace)

    @router.get("/v1/prompts", summary="The prompts, with task and labels")
    async def prompts() -> dict[str, Any]:
        return {"object": "list", "data": [entry.describe() for entry in engine.prompts]}

    @router.get("/v1/prompts/{name}", summary="One prompt, with task and labels")
    async def prompt(name: str) -> dict[str, Any]:
        return engine.get(name).describe()

    @router.post("/v1/prompts", status_code=201, summary="Add a prompt", openapi_extra=body)
    async def add(name: _Name, request: Request) -> dict[str, Any]:
        return await upload(name, request, replace=False)

    @router.put("/v1/prompts/{name}", summary="Add or replace a prompt", openapi_extra=body)
    async def replace(name: str, request: Request) -> dict[str, Any]:
        return await upload(name, request, replace=True)

    @router.delete("/v1/prompts/{name}", summary="Remove a prompt")
    async def remove(name: str) -> dict[str, Any]:
        async with change_lock:
            engine.check_not_base(name)
            engine.get(name)
            if store is not None:
                await asyncio.to_thread(store.delete, name)
            engine.remove(name)
            metrics.remove_prompt(name)
        return {"name": name, "deleted": True}

    return router


def _model(entry: PromptEntry) -> dict[str, Any]:
    return {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "softprompt"}
