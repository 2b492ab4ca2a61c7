"""The service: OpenAI's routes, classification, prompts that come and go, health and numbers."""

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
from softprompt.serve.api import errors, openai
from softprompt.serve.api.middleware import AuthConfig, RequestMiddleware
from softprompt.serve.api.schemas import ClassifyRequest
from softprompt.serve.api.streaming import record_of, results, wait_or_cancel
from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.request import ClassifyOutput, EngineRequest
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.entry import PromptEntry, called, checked_name
from softprompt.serve.prompts.store import PromptStore, read_prompt_bytes

PAGE = Path(__file__).with_name("page") / "index.html"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_Name = Annotated[str, Query(max_length=128)]


def make_app(
    engine: Engine,
    access: AuthConfig | None = None,
    *,
    metrics: Metrics | None = None,
    store: PromptStore | None = None,
    log_texts: bool = False,
    grace: float = 30.0,
) -> FastAPI:
    """The ASGI application over an engine, which it closes when it ends.

    Args:
        access: who may ask and how much; none: anyone, and prompts cannot be changed.
        metrics: the same that watches the engine.
        shelf: keeps prompts that are sent; none: they are gone with the process.
        log_texts: write what users send into the log.
        grace: seconds for what is being answered when it ends.
    """
    numbers = metrics or Metrics()
    numbers.follow(engine)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, grace)

    app = FastAPI(title="softprompt", version=__version__, lifespan=life, redoc_url=None, docs_url=None)
    app.state.engine = engine
    for router in (
        _health(engine, numbers),
        openai.routes(engine),
        _asking(engine),
        _prompts(engine, store, numbers),
    ):
        app.include_router(router)
    handled: tuple[Any, ...] = (RequestValidationError, HTTPException, *errors.EXPECTED, Exception)
    for kind in handled:
        app.add_exception_handler(kind, _explained)
    app.add_middleware(RequestMiddleware, access=access or AuthConfig(), metrics=numbers, log_texts=log_texts)
    return app


async def _explained(_: Request, error: Exception) -> Response:
    return errors.response(error)


def _health(engine: Engine, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    page = PAGE.read_text(encoding="utf-8")

    @router.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @router.get("/healthz", summary="Whether the process works")
    async def healthz() -> JSONResponse:
        return JSONResponse({"alive": engine.alive}, 200 if engine.alive else 503)

    @router.get("/readyz", summary="Whether it takes requests")
    async def readyz() -> JSONResponse:
        ready = engine.status().ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @router.get("/metrics", summary="Numbers for Prometheus")
    async def numbers() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/status", summary="The line, and what is being written")
    async def status() -> dict[str, Any]:
        backbone = engine.backbone
        return {**asdict(engine.status()), "backbone": called(backbone), "kind": backbone.architecture}

    return router


def _asking(engine: Engine) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", summary="Every prompt and the model without one, as OpenAI's clients list models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served) for served in engine.models]}

    @router.get("/v1/models/{name}", summary="One prompt")
    async def model(name: str) -> dict[str, Any]:
        return _model(engine.get(name))

    @router.post("/v1/classify", summary="Choose a label for each row")
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        record, rows = record_of(request), body.rows()
        served = engine.get(body.model)
        record.prompt, record.rows, record.texts = served.name, len(rows), list(rows)
        record.requests = requests = await asyncio.to_thread(engine.classify, served.name, rows, body.labels)
        chosen = await wait_or_cancel(request, engine, results(requests))
        task = requests[0].served.task  # the prompt may have been replaced since it was looked up
        labels = body.labels or (list(task.label_words) if task is not None else [])
        return {
            "object": "classification",
            "model": body.model,
            "results": [_result(labels, *one) for one in enumerate(zip(requests, chosen, strict=True))],
            "usage": {"prompt_tokens": record.read, "total_tokens": record.read},
        }

    return router


def _result(labels: list[str], index: int, one: tuple[EngineRequest, ClassifyOutput]) -> dict[str, Any]:
    logp = torch.tensor(one[1].scores, dtype=torch.float32)
    probs = logp.softmax(0).tolist()
    best = max(range(len(probs)), key=probs.__getitem__)
    return {
        "index": index,
        "label": labels[best],
        "scores": dict(zip(labels, probs, strict=True)),
        "tokens": len(one[0].ids),
    }


def _prompts(engine: Engine, store: PromptStore | None, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    changing = asyncio.Lock()
    body = {"requestBody": {"content": _FILE, "required": True}}

    def put(name: str, content: bytes, replace: bool) -> dict[str, Any]:
        prompt = read_prompt_bytes(content, engine.backbone)
        if store is None:
            return engine.add(name, prompt, replace=replace).describe()
        with store.keeping(
            name, content, replace=replace
        ):  # kept only if it can be served, and served only if it was kept
            ready = engine.ready(name, prompt, replace=replace)
        engine.serve(ready)
        return ready.describe()

    async def change(name: str, request: Request, replace: bool) -> dict[str, Any]:
        content = await request.body()
        async with changing:
            return await asyncio.to_thread(put, checked_name(name), content, replace)

    @router.get("/v1/prompts", summary="Every prompt, with its task and labels")
    async def prompts() -> dict[str, Any]:
        return {"object": "list", "data": [served.describe() for served in engine.prompts]}

    @router.get("/v1/prompts/{name}", summary="One prompt, with its task and labels")
    async def prompt(name: str) -> dict[str, Any]:
        return engine.get(name).describe()

    @router.post("/v1/prompts", status_code=201, summary="Add a prompt", openapi_extra=body)
    async def add(name: _Name, request: Request) -> dict[str, Any]:
        return await change(name, request, replace=False)

    @router.put("/v1/prompts/{name}", summary="Add or replace a prompt", openapi_extra=body)
    async def replace(name: str, request: Request) -> dict[str, Any]:
        return await change(name, request, replace=True)

    @router.delete("/v1/prompts/{name}", summary="Remove a prompt")
    async def remove(name: str) -> dict[str, Any]:
        async with changing:
            engine.refuse_base(name)
            engine.get(name)
            if store is not None:
                await asyncio.to_thread(store.drop, name)
            engine.remove(name)
            metrics.forget(name)
        return {"name": name, "deleted": True}

    return router


def _model(served: PromptEntry) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "softprompt"}
