"""Generation batches: halves continue where a step failed, without further memory."""

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
from softprompt.serve.engine.runner import ModelRunner

ROWS = ((11, 12, 13, 14, 15, 16, 17), (21,), (31, 32), (41, 42, 43), (51,), (61, 62), (71, 72, 73))
real_blank = kv_cache._blank


def requests_of(engine: Engine, temperature: float = 0.0) -> list[EngineRequest]:
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
def test_retried_step_samples_each_row_once(engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=3, shifting=False)
    assert engine._runner.decoder is not None
    unbroken = CausalGenerationBatch(engine._runner.decoder, requests_of(engine, 1.5))
    expected = [unbroken.step() for _ in range(4)]
    real, calls = Chooser.__call__, [0]

    def choose(self: Chooser, logits: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2 * len(ROWS) + 6:  # in the third step, after five rows were sampled
            raise memory()
        return real(self, logits)

    monkeypatch.setattr(Chooser, "__call__", choose)
    batch = CausalGenerationBatch(engine._runner.decoder, requests_of(engine, 1.5))
    assert [batch.step() for _ in range(2)] == expected[:2]
    with pytest.raises(torch.OutOfMemoryError):
        batch.step()
    halves = batch.split()
    for tokens in expected[2:]:
        assert [token for half in halves for token in half.step()] == tokens


@torch.no_grad()
def test_split_needs_no_memory_and_frees_its_own(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(prompts=3, shifting=False)
    assert engine._runner.decoder is not None
    unbroken = CausalGenerationBatch(engine._runner.decoder, requests_of(engine))
    expected = [unbroken.step() for _ in range(5)]
    batch = CausalGenerationBatch(engine._runner.decoder, requests_of(engine))
    assert [batch.step() for _ in range(2)] == expected[:2]  # now the buffers are full
    storage = StorageWeakRef(batch._batch.layers[0].keys.untyped_storage())
    with monkeypatch.context() as short:
        short.setattr(kv_cache, "_blank", lambda *_: pytest.fail("a copy"))
        halves = batch.split()
    for tokens in expected[2:]:
        assert [token for half in halves for token in half.step()] == tokens
    gc.collect()
    assert storage.expired()  # although `batch` still exists


@torch.no_grad()
def test_buffers_grow_one_layer_at_a_time(engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=3, shifting=False)
    assert engine._runner.decoder is not None
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
    batch = CausalGenerationBatch(engine._runner.decoder, requests_of(engine))
    expected = [batch.step() for _ in range(3)]
    wide = live()
    del batch
    assert live() == 0
    batch = CausalGenerationBatch(engine._runner.decoder, requests_of(engine))
    most.append(wide + live() // 2)  # the model has two layers: the new buffers, and one of the old ones
    assert [batch.step() for _ in range(3)] == expected
    assert live() == wide


@torch.no_grad()
def test_out_of_memory_in_growing_buffers_keeps_texts(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer grows with all rows, the second cannot, and the rows are then halved twice."""
    engine = engine_of(prompts=3, shifting=False)

    def generated(fails: bool) -> list[Any]:
        runner, requests, calls = ModelRunner(engine.backbone, 8, lambda _: None), requests_of(engine), []

        def blank(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
            calls.append(rows)
            if rows > 2 and len(calls) > 2:
                raise memory()
            return real_blank(like, rows, columns)

        runner.prefill(requests)
        with monkeypatch.context() as short:
            if fails:
                short.setattr(kv_cache, "_blank", blank)
            while runner.batches:
                runner.decode()
        assert calls[:4] == [7, 7, 7, 3] if fails else not calls
        return [request.result(0.0).tokens for request in requests]

    assert generated(fails=True) == generated(fails=False)
