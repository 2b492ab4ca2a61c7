"""The engine: requests, their queue and schedule, and the passes that answer them.

`engine.py` takes requests from any thread; `scheduler.py` picks the next batch; `runner.py` runs it through the model,
by `scoring.py` for labels and `generation.py` for texts, with each prompt's keys and values from `kv_cache.py`.
"""
