"""The text of a generation as it reaches a client."""

import asyncio
from collections.abc import Callable

import pytest

from softprompt.serve import Engine
from softprompt.serve.api.streaming import TextStream
from softprompt.serve.engine.request import EngineRequest, GenerateParams


@pytest.mark.parametrize("done", [True, False])
def test_tokens_before_the_deadline_reach_a_slow_reader(engine_of: Callable[..., Engine], done: bool) -> None:
    engine = engine_of(prompts=1)
    ids = engine.backbone.tokenizer("a b c", add_special_tokens=False)["input_ids"]

    async def read() -> str:
        stream = TextStream(engine.backbone.tokenizer, ())
        params = GenerateParams(max_new_tokens=len(ids) if done else len(ids) + 1)
        request = EngineRequest(engine.get("p0"), (1,), params, timeout=-60.0, on_token=stream.put)
        stream.attach(request)
        for token in ids:
            request.append_token(token)
        await asyncio.sleep(0.01)
        return "".join([piece async for piece in stream.pieces()])

    if done:
        assert asyncio.run(read()) == "a b c"
    else:  # the engine is stuck
        with pytest.raises(TimeoutError, match="no answer within its time"):
            asyncio.run(read())
