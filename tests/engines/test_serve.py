"""The service over a real vLLM server: labels, probabilities and texts of mixed prompts equal the live runs'."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from served import ROWS, Served, Start

from softprompt.backbones import load_embeddings
from softprompt.serve import Limits, VllmEngine
from softprompt.serve.engine.request import InvalidParameter

pytestmark = [pytest.mark.engine, pytest.mark.asset]


def test_serve_over_vllm_equals_live_runs(served: Served, vllm: Start, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    served.backbone.model.save_pretrained(folder)
    served.backbone.tokenizer.save_pretrained(folder)
    flags = ["--dtype", "float32", "--enable-prompt-embeds", "--gpu-memory-utilization", "0.15"]
    backbone = load_embeddings(str(folder), dtype="float32")
    assert backbone.hash == served.backbone.hash
    report: dict[str, Any] = {"rows": 0, "equal": 0, "largest_difference": 0.0, "other": []}
    with vllm(folder, *flags) as url, VllmEngine(backbone, url, limits=Limits(timeout=600.0)) as engine:
        for name, run in served.runs.items():
            engine.add(name, run.folder)

        def ask(job: tuple[str, int]) -> tuple[Any, bool, float]:
            name, row = job
            live, values = served.live[name][row], {"text": served.texts[name][row]}
            if not served.runs[name].task.is_classification:
                tokens = engine.generate(name, values).result().tokens
                text = backbone.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                return job, text == live.text, 0.0
            [request] = engine.classify(name, [values])
            probs = torch.tensor(request.result().logprobs).softmax(0).tolist()
            gap = max(abs(prob - share) for prob, share in zip(probs, live.probabilities.values(), strict=True))
            return job, list(live.probabilities)[probs.index(max(probs))] == live.label, gap

        jobs = [(name, row) for row in range(ROWS) for name in served.runs]
        with ThreadPoolExecutor(16) as pool:
            for job, equal, gap in pool.map(ask, jobs):
                report["rows"] += 1
                report["equal"] += equal
                report["largest_difference"] = max(report["largest_difference"], gap)
                report["other"] += [] if equal else [job]
        drawn = engine.generate("base", "The capital of France is", max_new_tokens=8, logit_bias={5000: 100.0})
        assert set(drawn.result().tokens) == {5000}
        with pytest.raises(InvalidParameter, match="logprobs"):
            engine.generate("base", "a", logprobs=1)
    print(json.dumps(report))  # with pytest -s: the numbers of docs/serve.md
    assert report["equal"] == report["rows"]
    assert report["largest_difference"] < 1e-4
