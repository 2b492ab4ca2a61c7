"""Scores in lm-evaluation-harness: without a prompt those of its own `hf` model, with one those of `predict`."""

import contextlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from local_lm_eval import write_local_task

from softprompt import Experiment, Plain, Run, attach, load_backbone, load_task, predict, runs
from softprompt.cli import main
from softprompt.types import PromptPosition

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

ROWS = [
    {"text": " ".join(text), "answer": number % 3} for number, text in enumerate(("aab", "c", "bbbacca", "cbac") * 3)
]


@pytest.fixture
def task_folder(tmp_path: Path, ticket_task: Path) -> Path:
    label_words = load_task(str(ticket_task)).label_words.values()
    return write_local_task(tmp_path / "tasks", list(label_words), ROWS)


def evaluate(model: Any, folder: Path, **settings: Any) -> tuple[float, list[list[float]]]:
    """The accuracy, and each row's log-likelihoods of the choices."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder))
    results = lm_eval.simple_evaluate(
        model=model, tasks=["local_tickets"], task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    samples = sorted(results["samples"]["local_tickets"], key=lambda sample: sample["doc_id"])
    scores = [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
    return results["results"]["local_tickets"]["acc,none"], scores


def test_zero_shot_equals_lm_evals_hf_model(llama_folder: Path, task_folder: Path) -> None:
    import softprompt.evaluation.lm_eval  # noqa: F401  (registers the model type)

    ours = {"model_args": {"backbone": str(llama_folder), "dtype": "float32"}, "batch_size": 4}
    theirs = {"model_args": {"pretrained": str(llama_folder), "dtype": "float32"}, "batch_size": 4, "device": "cpu"}
    assert evaluate("softprompt", task_folder, **ours) == evaluate("hf", task_folder, **theirs)


@pytest.fixture
def run_at(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> Callable[[PromptPosition], Run]:
    return partial(_run, llama_folder, ticket_task, tmp_path)


@pytest.fixture
def run(run_at: Callable[[PromptPosition], Run]) -> Run:
    return run_at("prefix")


def _run(llama_folder: Path, ticket_task: Path, tmp_path: Path, position: PromptPosition) -> Run:
    backbone = load_backbone(str(llama_folder), dtype="float32")
    config = Plain(length=5)
    experiment = Experiment(
        backbone=str(llama_folder), task=str(ticket_task), prompt=config, dtype="float32", prompt_position=position
    )
    created = runs.create(
        experiment,
        load_task(str(ticket_task)),
        backbone,
        tmp_path,
        "run",
        dict.fromkeys(("splits", "full", "test"), ""),
    )
    prompt = config.build(backbone.host(), torch.Generator().manual_seed(0))
    return created.finish(attach(backbone, prompt, prompt_position=position), {"test": 0.5})


def test_run_scores_equal_predict(run: Run, task_folder: Path, llama_folder: Path) -> None:
    """The harness's own loop over a run: each row's scores, normalized, are predict's probabilities."""
    from softprompt.evaluation.lm_eval import SoftPromptLM

    _, scores = evaluate(SoftPromptLM(run=str(run.folder), batch_size=4), task_folder)
    backbone = load_backbone(str(llama_folder), dtype="float32")
    answers = predict(run, [{"text": row["text"]} for row in ROWS], backbone=backbone)
    for row, answer in zip(scores, answers, strict=True):
        probabilities = torch.tensor(list(answer.probabilities.values()))
        torch.testing.assert_close(torch.tensor(row).softmax(-1), probabilities, rtol=1e-4, atol=1e-5)
    assert evaluate(SoftPromptLM(backbone=str(llama_folder), dtype="float32"), task_folder)[1] != scores


@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_prompt_after_the_text_is_refused(
    run_at: Callable[[PromptPosition], Run], task_folder: Path, llama_folder: Path, position: PromptPosition
) -> None:
    """The harness sends a text and its continuation as one row, so a prompt behind both changes no score."""
    from softprompt.evaluation.lm_eval import SoftPromptLM

    run = run_at(position)
    if position == "suffix":
        with pytest.raises(ValueError, match="is after the text, and lm-eval scores texts that end with the answer"):
            SoftPromptLM(run=str(run.folder))
        return
    _, scores = evaluate(SoftPromptLM(run=str(run.folder)), task_folder)
    assert scores != evaluate(SoftPromptLM(backbone=str(llama_folder), dtype="float32"), task_folder)[1]


def test_generation_equals_the_run(run: Run, llama_folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from softprompt.evaluation.lm_eval import SoftPromptLM

    texts = ["Ticket: a a b\nQueue:", "Ticket: c\nQueue:", "Ticket: b b b a\nQueue:"]
    settings = {"until": ["</s>"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (text, settings), number) for number, text in enumerate(texts)]
    written = SoftPromptLM(run=str(run.folder), batch_size=2).generate_until(requests, disable_tqdm=True)
    backbone = load_backbone(str(llama_folder), dtype="float32")
    live = run.prompted(backbone)
    for text, answer in zip(texts, written, strict=True):
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
        tokens = torch.stack(list(live.generate(ids, max_new_tokens=6)), 1)[0]
        assert answer == backbone.tokenizer.decode(tokens, skip_special_tokens=True).split("</s>")[0]


def test_generated_text_ends_before_an_ordinary_end_token(run: Run) -> None:
    """A generation config may name one, and a row that is done repeats it until its batch is."""
    from softprompt.evaluation.lm_eval import SoftPromptLM

    model = SoftPromptLM(run=str(run.folder))
    assert model.prompted is not None
    ids = torch.tensor([[0, 70, 71], [0, 80, 81]])
    rows = torch.stack(list(model.prompted.generate(ids, max_new_tokens=8, stop=[])), 1).tolist()
    model.prompted.backbone.model.generation_config.eos_token_id = [1, end := rows[0][2]]
    tokens = model._model_generate(ids, 11, stop=["</s>"])[:, 3:].tolist()
    pad = model.tokenizer.pad_token_id
    for row, expected in zip(tokens, rows, strict=True):
        until = expected[: expected.index(end)] if end in expected else expected
        assert row == [*until, *[pad] * (len(row) - len(until))]


def test_command_prints_the_scores(run: Run, task_folder: Path) -> None:
    out, arguments = io.StringIO(), ["--tasks", "local_tickets", "--include-path", str(task_folder), "--limit", "6"]
    with contextlib.redirect_stdout(out):
        assert main(["lm-eval", str(run.folder), *arguments]) == 0
    said = json.loads(out.getvalue().splitlines()[-1])
    assert said["command"] == "lm-eval"
    assert 0 <= said["results"]["local_tickets"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no task is given"),
        (["--tasks", "arc_easy"], "give lm-eval's model a run=FOLDER"),
        (["--tasks", "arc_easy", "arc_eazy"], "lm-evaluation-harness has no task 'arc_eazy'"),
        (["--tasks", "mine", "--include-path", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_missing_or_unknown_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lm-eval", *arguments]) == 1
    assert message in capsys.readouterr().err
