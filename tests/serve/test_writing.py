"""Rows that are being written: halves go on where a step broke off, in the memory that is there."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from softprompt.models import Sampling
from softprompt.models.sampling import Chooser
from softprompt.serve import Engine
from softprompt.serve.engine import kv_cache
from softprompt.serve.engine.generation import CausalGenerationBatch
from softprompt.serve.engine.request import EngineRequest, GenerateParams
from softprompt.serve.engine.runner import Worker

ROWS = ((11, 12, 13, 14, 15, 16, 17), (21,), (31, 32), (41, 42, 43), (51,), (61, 62), (71, 72, 73))
real_blank = kv_cache._blank


def tickets_of(engine: Engine, temperature: float = 0.0) -> list[EngineRequest]:
    return [
        EngineRequest(
            engine.get(f"p{row % 3}"),
            ids,
            GenerateParams(max_new_tokens=8, sampling=Sampling(temperature=temperature, seed=row)),
        )
        for row, ids in enumerate(ROWS)
    ]


def memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("memory")


@torch.no_grad()
def test_a_row_draws_once_a_step_though_the_step_is_tried_again(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(prompts=3, shifting=False)
    assert engine._worker.decoder is not None
    calm = CausalGenerationBatch(engine._worker.decoder, tickets_of(engine, 1.5))
    expected = [calm.step() for _ in range(4)]
    real, calls = Chooser.__call__, [0]

    def choose(self: Chooser, logits: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2 * len(ROWS) + 6:  # in the third step, behind five rows that have drawn
            raise memory()
        return real(self, logits)

    monkeypatch.setattr(Chooser, "__call__", choose)
    writer = CausalGenerationBatch(engine._worker.decoder, tickets_of(engine, 1.5))
    assert [writer.step() for _ in range(2)] == expected[:2]
    with pytest.raises(torch.OutOfMemoryError):
        writer.step()
    halves = writer.halves()
    for tokens in expected[2:]:
        assert [token for half in halves for token in half.step()] == tokens


@torch.no_grad()
def test_halves_need_no_memory_and_give_theirs_back(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(prompts=3, shifting=False)
    assert engine._worker.decoder is not None
    calm = CausalGenerationBatch(engine._worker.decoder, tickets_of(engine))
    expected = [calm.step() for _ in range(5)]
    writer = CausalGenerationBatch(engine._worker.decoder, tickets_of(engine))
    assert [writer.step() for _ in range(2)] == expected[:2]  # now the buffers are full
    held = StorageWeakRef(writer._batch.layers[0].keys.untyped_storage())
    with monkeypatch.context() as short:
        short.setattr(kv_cache, "_blank", lambda *_: pytest.fail("a copy"))
        halves = writer.halves()
    for tokens in expected[2:]:
        assert [token for half in halves for token in half.step()] == tokens
    gc.collect()
    assert held.expired()  # though `writer` is still there


@torch.no_grad()
def test_buffers_grow_a_layer_at_a_time(engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=3, shifting=False)
    assert engine._worker.decoder is not None
    made: list[tuple[StorageWeakRef, int]] = []
    most: list[int] = []

    def live() -> int:
        gc.collect()
        return sum(size for storage, size in made if not storage.expired())

    def blank(*of: Any) -> torch.Tensor:
        tensor = real_blank(*of)
        if most and live() + tensor.nbytes > most[0]:
            raise memory()
        made.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
        return tensor

    monkeypatch.setattr(kv_cache, "_blank", blank)
    writer = CausalGenerationBatch(engine._worker.decoder, tickets_of(engine))
    expected = [writer.step() for _ in range(3)]
    wide = live()
    del writer
    assert live() == 0
    writer = CausalGenerationBatch(engine._worker.decoder, tickets_of(engine))
    most.append(wide + live() // 2)  # the model has two layers: the new buffers, and one of the old ones
    assert [writer.step() for _ in range(3)] == expected
    assert live() == wide


@torch.no_grad()
def test_memory_that_runs_out_while_buffers_grow_changes_no_text(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has grown with all rows when the second cannot, and its rows are then halved twice."""
    engine = engine_of(prompts=3, shifting=False)

    def written(fails: bool) -> list[Any]:
        worker, requests, calls = Worker(engine.backbone, 8, lambda _: None), tickets_of(engine), []

        def blank(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
            calls.append(rows)
            if rows > 2 and len(calls) > 2:
                raise memory()
            return real_blank(like, rows, columns)

        worker.begin(requests)
        with monkeypatch.context() as short:
            if fails:
                short.setattr(kv_cache, "_blank", blank)
            while worker.writers:
                worker.step()
        assert calls[:4] == [7, 7, 7, 3] if fails else not calls
        return [request.result(0.0).tokens for request in requests]

    assert written(fails=True) == written(fails=False)
