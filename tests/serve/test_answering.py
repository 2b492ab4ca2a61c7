"""What a reader gets who comes late."""

import asyncio
from collections.abc import Callable

import pytest

from softprompt.serve import Engine
from softprompt.serve.api.streaming import Answer
from softprompt.serve.engine.request import EngineRequest, GenerateParams


@pytest.mark.parametrize("done", [True, False])
def test_what_was_written_in_time_reaches_a_slow_reader(engine_of: Callable[..., Engine], done: bool) -> None:
    engine = engine_of(prompts=1)
    ids = engine.backbone.tokenizer("a b c", add_special_tokens=False)["input_ids"]

    async def read() -> str:
        answer = Answer(engine.backbone.tokenizer, ())
        work = GenerateParams(max_new_tokens=len(ids) if done else len(ids) + 1)
        request = answer.begin(lambda put: EngineRequest(engine.get("p0"), (1,), work, timeout=-60.0, on_token=put))
        for token in ids:
            request.write(token)
        await asyncio.sleep(0.01)
        return await answer.whole()

    if done:
        assert asyncio.run(read()) == "a b c"
    else:  # the engine is stuck
        with pytest.raises(TimeoutError, match="no answer within its time"):
            asyncio.run(read())
