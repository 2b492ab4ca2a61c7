"""Exports in the engines themselves: labels, probabilities and texts equal the live run's, the prompts mixed."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from served import ROWS, Served, Start

from softprompt import Backbone, predict
from softprompt.export import FORMATS, export_runs
from softprompt.export.client import open_client
from softprompt.export.gguf import Gguf

pytestmark = [pytest.mark.engine, pytest.mark.asset]


def compare(served: Served, folder: Path, url: str) -> dict[str, Any]:
    """Every row of every prompt, mixed, eight at a time: how many answers are the live run's, and how far off."""
    client = open_client(folder, url, "model")

    def ask(job: tuple[str, int]) -> Any:
        name, row = job
        run = served.runs[name]
        text = run.task.render({"text": served.texts[name][row]})
        return client.classify(name, text) if run.task.is_classification else client.write(name, text)

    jobs = [(name, row) for row in range(ROWS) for name in served.runs]
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(jobs, pool.map(ask, jobs), strict=True))
    report: dict[str, Any] = {"rows": len(jobs), "equal": 0, "largest_difference": 0.0, "other": []}
    for (name, row), answer in answers.items():
        live = served.live[name][row]
        if served.runs[name].task.is_classification:
            gap = max(abs(answer.probabilities[label] - share) for label, share in live.probabilities.items())
            report["largest_difference"] = max(report["largest_difference"], gap)
            ranked = sorted(live.probabilities.values())
            equal, margin = answer.label == live.label, ranked[-1] - ranked[-2]
        else:
            equal, margin = answer.strip() == live.text, None
        report["equal"] += equal
        if not equal:
            report["other"].append({"prompt": name, "row": row, "margin": margin})
    print(json.dumps(report))  # with pytest -s: the numbers of docs/export.md
    return report


def export(served: Served, form: Any, folder: Path) -> Path:
    export_runs(list(served.runs.values()), form, folder, backbone=served.backbone)
    return folder


def test_vllm_embeddings_equal_live_runs(served: Served, vllm: Start, tmp_path: Path) -> None:
    folder = export(served, FORMATS["vllm"], tmp_path / "vllm")
    served.backbone.model.save_pretrained(tmp_path / "model")
    served.backbone.tokenizer.save_pretrained(tmp_path / "model")
    with vllm(tmp_path / "model", "--dtype", "float32", "--enable-prompt-embeds") as url:
        report = compare(served, folder, url)
    assert report["equal"] == report["rows"]
    assert report["largest_difference"] < 1e-4


def test_vllm_token_ids_equal_live_runs(served: Served, vllm: Start, tmp_path: Path) -> None:
    folder = export(served, FORMATS["vocab"], tmp_path / "vocab")
    with vllm(folder, "--dtype", "float32") as url:
        report = compare(served, folder, url)
    assert report["equal"] == report["rows"]
    assert report["largest_difference"] < 1e-4


def test_llama_cpp_equals_live_runs(served: Served, llama_cpp: Start, tmp_path: Path) -> None:
    folder = export(served, Gguf("f32"), tmp_path / "gguf")
    with llama_cpp(folder / "model.gguf") as url:
        report = compare(served, folder, url)
    assert report["equal"] == report["rows"]
    assert report["largest_difference"] < 1e-3


@pytest.mark.parametrize(("kind", "difference"), [("f16", 0.05), ("q8_0", 0.2)])
def test_llama_cpp_of_smaller_types_is_near(
    kind: Any, difference: float, served: Served, llama_cpp: Start, tmp_path: Path
) -> None:
    """With llama.cpp's own settings; a label that differs was a close call."""
    folder = export(served, Gguf(kind), tmp_path / "gguf")
    with llama_cpp(folder / "model.gguf", exact=False) as url:
        report = compare(served, folder, url)
    assert report["largest_difference"] < difference
    assert all(other["margin"] is None or other["margin"] < 2 * difference for other in report["other"])


ROPES: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "llama3"])
def test_llama_cpp_runs_every_architecture(
    kind: str, tiny_run: Any, tiny_backbone: Any, llama_cpp: Start, tmp_path: Path
) -> None:
    """A tiny random model: the probabilities of the labels, and the token ids that llama.cpp gives a text."""
    backbone = tiny_backbone("llama" if kind == "llama3" else kind)
    if kind == "llama3":
        config = type(backbone.model.config)(**{**backbone.model.config.to_dict(), "rope_parameters": dict(ROPES)})
        model = transformers.AutoModelForCausalLM.from_config(config)
        backbone = Backbone(model, backbone.tokenizer, "llama3", "llama3", "causal")
    run = tiny_run(backbone)
    export_runs([run], Gguf("f32"), tmp_path / "gguf", backbone=backbone)
    client = open_client(tmp_path / "gguf", "")
    text = run.task.render({"text": "a b c " * 12})
    with llama_cpp(tmp_path / "gguf" / "model.gguf") as url:
        client.url = url
        answer = client.classify("tiny", text)
        before = client.settings["prompts"]["tiny"]["text"]
        tokens = client._post("/tokenize", content=before + text, parse_special=True)["tokens"]

    [expected] = predict(run, [{"text": "a b c " * 12}], backbone=backbone)
    assert answer.label == expected.label
    assert answer.probabilities == pytest.approx(dict(expected.probabilities), abs=1e-3)
    assert tokens == [*client.settings["prompts"]["tiny"]["ids"], *client.ids(text)]
