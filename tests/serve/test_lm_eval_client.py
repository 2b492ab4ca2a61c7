"""lm-evaluation-harness's `local-completions` on a real service scores as `hf` and `softprompt lm-eval` do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_lm_eval import write_local_task

from softprompt import load_task

pytest.importorskip("tenacity", reason="lm-eval's API models are not installed: pip install 'lm-eval[api]'")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

TEXTS = ("a a b", "c", "b b b a c c a", "c b a c", "a", "f f", "e d e d e d e d e d e d")


@pytest.fixture
def task_folder(tmp_path: Path, ticket_task: Path) -> Path:
    label_words = load_task(str(ticket_task)).label_words.values()
    return write_local_task(
        tmp_path / "tasks",
        list(label_words),
        [{"text": text, "answer": number % 3} for number, text in enumerate(TEXTS)],
    )


@pytest.fixture
def arguments(
    service_of: Callable[..., Any],
    run_folders: list[Path],
    llama_folder: Path,
    task_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Arguments of `local-completions` for a service of the tickets run."""
    service = service_of(prompts=0)
    service.engine.add("run", run_folders[1])
    monkeypatch.setenv("OPENAI_API_KEY", service.token)
    return {
        "base_url": f"{service.address}/v1/completions",
        "tokenizer": str(llama_folder),
        "tokenizer_backend": "huggingface",
        "add_bos_token": True,  # as `hf` does for this tokenizer
        "num_concurrent": 2,
        "max_retries": 1,
    }


def evaluate(model: Any, folder: Path, **settings: Any) -> list[tuple[float, bool]]:
    """Log-likelihood of each choice of each row, and whether greedy decoding gives it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=["local_tickets"], task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    samples = sorted(results["samples"]["local_tickets"], key=lambda sample: sample["doc_id"])
    return [(float(score), bool(greedy)) for sample in samples for score, greedy in sample["filtered_resps"]]


def test_zero_shot_equals_lm_evals_hf_model(arguments: dict[str, Any], task_folder: Path, llama_folder: Path) -> None:
    ours = evaluate("local-completions", task_folder, model_args={**arguments, "model": "base"}, batch_size=4)
    theirs = evaluate(
        "hf", task_folder, model_args={"pretrained": str(llama_folder), "dtype": "float32"}, batch_size=4, device="cpu"
    )
    assert len(ours) == len(TEXTS) * 6
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_run_equals_the_lm_eval_command(arguments: dict[str, Any], task_folder: Path, run_folders: list[Path]) -> None:
    from softprompt.evaluation.lm_eval import SoftPromptLM

    ours = evaluate("local-completions", task_folder, model_args={**arguments, "model": "run"}, batch_size=4)
    theirs = evaluate(SoftPromptLM(run=str(run_folders[1]), batch_size=4), task_folder)
    base = evaluate("local-completions", task_folder, model_args={**arguments, "model": "base"}, batch_size=4)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    assert [score for score, _ in ours] != pytest.approx([score for score, _ in base], abs=1e-2)


def test_generation_equals_the_lm_eval_command(arguments: dict[str, Any], run_folders: list[Path]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from softprompt.evaluation.lm_eval import SoftPromptLM

    settings = {"until": ["</s>", "zzz"], "max_gen_toks": 6}
    rows = [Instance("generate_until", {}, (f"Ticket: {text}\nQueue:", settings), 0) for text in TEXTS]
    ours = LocalCompletionsAPI(**arguments, model="run", batch_size=3).generate_until(rows, disable_tqdm=True)
    theirs = SoftPromptLM(run=str(run_folders[1]), batch_size=3).generate_until(rows, disable_tqdm=True)
    assert ours == theirs
