"""Each row of a mixed batch gets the answer that it gets alone."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import open_run, predict
from softprompt.backbones import load
from softprompt.models import Sampling, attach
from softprompt.prompts import SoftPrompt
from softprompt.prompts.dept import DePT
from softprompt.serve import Cancelled, Engine, Limits, QueueFull
from softprompt.serve.engine import encode as serve_encode
from softprompt.serve.engine.queue import RequestQueue
from softprompt.serve.engine.request import ClassifyParams, EngineRequest, GenerateParams
from softprompt.tasks.data.tokenize import answer_ids, encode
from softprompt.tasks.task import Task

EngineOf = Callable[..., Engine]
PromptOf = Callable[..., SoftPrompt]
TEXTS = ("a", "b b", "Ticket: a a c", "c b a a b c\nQueue:", "some words that were never seen", "x" * 30)
LABELS = ("yes", "no", "maybe so")
DECODERS = ("llama", "gpt2", "qwen3", "bloom", "opt", "gemma2", "mistral")


def score_alone(engine: Engine, name: str, text: str) -> list[float]:
    """The scores of `PromptedModel` for one row."""
    backbone = engine.backbone
    prompted = attach(backbone, engine.get(name).prompt)
    task = Task(name="t", template="{text}", label="y", label_words={label: label for label in LABELS})
    ids = encode(task, backbone.tokenizer, [{"text": text}], 500, appends_eos=prompted.appends_eos, answers=False)[0][0]
    with torch.no_grad():
        return prompted.score(torch.tensor([ids.input_ids]), None, answer_ids(task, backbone.tokenizer))[0].tolist()


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
def test_classifications_equal_rows_alone(engine_of: EngineOf, name: str) -> None:
    engine = engine_of(name, max_wait=200.0)
    asked = [(f"p{index % 5}", text) for index, text in enumerate(TEXTS * 2)]
    requests = [engine.classify(prompt, [text], LABELS)[0] for prompt, text in asked]
    for (prompt, text), request in zip(asked, requests, strict=True):
        ours, expected = request.result(30.0).logprobs, score_alone(engine, prompt, text)
        # The same sums in another order: a few units in the last place of a float32.
        assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert max(range(3), key=ours.__getitem__) == max(range(3), key=expected.__getitem__)


def generate_alone(engine: Engine, name: str, text: str, tokens: int) -> list[int]:
    backbone = engine.backbone
    prompted = attach(backbone, engine.get(name).prompt)
    task = Task(name="t", template="{text}", target="y", metrics=("exact_match",))
    ids = encode(task, backbone.tokenizer, [{"text": text}], 500, appends_eos=prompted.appends_eos, answers=False)[0][0]
    stop = prompted.end_of_sequence()
    generated = []
    for token in prompted.generate(torch.tensor([ids.input_ids]), max_new_tokens=tokens):
        if int(token) in stop:
            break
        generated.append(int(token))
    return generated


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart_forced"])
def test_generations_equal_texts_alone(engine_of: EngineOf, name: str) -> None:
    engine = engine_of(name, max_batch=4)
    asked = [(f"p{index % 5}", text, 3 + 5 * (index % 4)) for index, text in enumerate(TEXTS * 2)]
    requests = []
    for prompt, text, tokens in asked:  # some are running when others arrive
        requests.append(engine.generate(prompt, text, max_new_tokens=tokens))
        time.sleep(0.003)
    for (prompt, text, tokens), request in zip(asked, requests, strict=True):
        assert list(request.result(60.0).tokens) == generate_alone(engine, prompt, text, tokens)


def test_sampled_text_does_not_depend_on_other_rows(engine_of: EngineOf) -> None:
    engine = engine_of(max_batch=8)
    draws = [Sampling(temperature=1.5, seed=seed, top_k=20) for seed in range(3)]
    first = [engine.generate("p1", "a b", max_new_tokens=12, sampling=draw).result(30.0).tokens for draw in draws]
    crowd = [engine.generate(f"p{index % 5}", "c", max_new_tokens=9 + index) for index in range(4)]
    again = [engine.generate("p1", "a b", max_new_tokens=12, sampling=draw) for draw in draws]
    assert [request.result(30.0).tokens for request in again] == first
    assert len(set(first)) == 3
    assert all(request.result(30.0) for request in crowd)


@pytest.mark.parametrize("name", ["bert_mlm", "distilbert_mlm"])
def test_masked_lm_classifies_with_words(engine_of: EngineOf, name: str) -> None:
    engine = engine_of(name, shifting=False, max_wait=200.0)
    words = ["a", "b", "c"]
    asked = [(f"p{index % 5}", text) for index, text in enumerate(TEXTS)]
    requests = [engine.classify(prompt, [text], words)[0] for prompt, text in asked]
    single = [engine.classify(prompt, [text], words)[0].result(30.0).logprobs for prompt, text in asked]
    for request, expected in zip(requests, single, strict=True):
        assert request.result(30.0).logprobs == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="writes no text"):
        engine.generate("p0", "a")


@pytest.mark.parametrize("min_prefix", [16, 1])
def test_runs_answer_as_predict_does(run_folders: list[Path], min_prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the template's first tokens were cached when the prompt was added."""
    monkeypatch.setattr(serve_encode, "_MIN_TEMPLATE_PREFIX", min_prefix)
    runs = [open_run(folder) for folder in run_folders]
    backbone = load(runs[0].experiment.backbone, dtype="float32")
    rows = [{"text": " ".join("abcdef"[i % 6] * (1 + i % 4))} for i in range(14)]
    with Engine(backbone, Limits(max_wait=100.0)) as engine:
        for run in runs:
            entry = engine.add(run.name, run.folder)
            assert (entry.template_prefix is not None) == (min_prefix == 1)
            assert entry.describe()["bytes"] == sum(prefix.nbytes for prefix in entry.kv_prefixes)
        requests = [(run, engine.classify(run.name, rows)) for run in runs]
        for run, asked in requests:
            for request, answer in zip(asked, predict(run, rows, backbone=backbone), strict=True):
                probs = torch.tensor(request.result(30.0).logprobs).softmax(0).tolist()
                assert probs == pytest.approx(list(answer.probabilities.values()), abs=1e-5)
                assert max(range(len(probs)), key=probs.__getitem__) == answer.index
        other = engine.classify(runs[0].name, ["no words of the template"], LABELS)[0].result(30.0).logprobs
        assert other == pytest.approx(score_alone(engine, runs[0].name, "no words of the template"), abs=1e-5)


def test_row_without_text_is_refused_as_predict_does(run_folders: list[Path]) -> None:
    run = open_run(run_folders[0])
    backbone = load(run.experiment.backbone, dtype="float32")
    with Engine(backbone) as engine:
        engine.add("p", run.folder)
        for rows in (["a", " "], [{"text": "a"}, {"text": ""}]):
            for refuse in (lambda rows: engine.classify("p", rows), lambda rows: predict(run, rows, backbone=backbone)):
                with pytest.raises(ValueError, match="row 2 has no text in any column of the template; give it some"):
                    refuse(rows)


def test_peft_folder_answers_as_its_run(run_folders: list[Path], tmp_path: Path) -> None:
    run = open_run(run_folders[0])
    backbone = load(run.experiment.backbone, dtype="float32")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((run.folder / file).read_bytes())
    with Engine(backbone) as engine:
        engine.add("run", run.folder)
        engine.add("peft", tmp_path)
        text = "Ticket: a a a\nQueue:"
        labels = list(run.task.label_words.values())
        ours = engine.classify("run", [{"text": "a a a"}])[0].result(30.0).logprobs
        theirs = engine.classify("peft", [text], labels)[0].result(30.0).logprobs
        assert theirs == pytest.approx(ours, abs=1e-5)


def test_another_prompt_costs_only_its_keys_and_values(engine_of: EngineOf, prompt_of: PromptOf) -> None:
    engine = engine_of(prompts=0)
    engine.add("long", prompt_of(engine.backbone, 0, length=40))
    before = engine.get("long").kv_prefix
    short = engine.add("short", prompt_of(engine.backbone, 1, length=4)).kv_prefix
    assert engine.get("long").kv_prefix is before
    config = engine.backbone.model.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert short is not None
    assert short.nbytes == 2 * config.num_hidden_layers * heads * 4 * width * 4
    stored = {id(t.untyped_storage()): t.untyped_storage().nbytes() for pair in short.layers for t in pair}
    assert sum(stored.values()) == short.nbytes  # no view into something larger


def test_prompts_change_while_others_answer(engine_of: EngineOf, prompt_of: PromptOf) -> None:
    engine = engine_of(prompts=2, max_queued=4000)
    expected = {name: engine.classify(name, ["a b"], LABELS)[0].result(30.0).logprobs for name in ("p0", "p1")}
    stop, wrong = threading.Event(), []

    def ask(name: str) -> None:
        while not stop.is_set():
            scores = engine.classify(name, ["a b"], LABELS)[0].result(30.0).logprobs
            if scores != pytest.approx(expected[name], abs=1e-5):
                wrong.append(scores)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("p0", "p1", "p0")]
    for thread in threads:
        thread.start()
    for turn in range(10):
        engine.add("guest", prompt_of(engine.backbone, 50 + turn), replace=True)
        engine.classify("guest", ["a"], LABELS)[0].result(30.0)
        engine.remove("guest")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(LookupError, match="guest"):
        engine.classify("guest", ["a"], LABELS)


def test_queued_row_keeps_its_prompt_when_replaced(engine_of: EngineOf, prompt_of: PromptOf) -> None:
    engine = engine_of(prompts=0, max_wait=300.0)
    engine.add("p", prompt_of(engine.backbone, 1))
    expected = score_alone(engine, "p", "a b")
    request = engine.classify("p", ["a b"], LABELS)[0]
    engine.add("p", prompt_of(engine.backbone, 2), replace=True)
    assert request.result(30.0).logprobs == pytest.approx(expected, abs=1e-5)
    assert engine.classify("p", ["a b"], LABELS)[0].result(30.0).logprobs != pytest.approx(expected, abs=1e-3)


def test_prompts_take_turns(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=2, max_batch=2, max_wait=0.0, max_queued=1000)
    many = engine.classify("p0", ["a b c"] * 200, LABELS)
    few = engine.classify("p1", ["a b c"] * 2, LABELS)
    for request in few:
        request.result(30.0)
    assert sum(request.done for request in many) < 100


def test_full_queue_refuses_at_once_and_recovers(engine_of: EngineOf) -> None:
    engine = engine_of(
        prompts=1, max_queued=6, max_wait=2000.0
    )  # fewer than a full batch on a CPU, so they wait for others
    requests = engine.classify("p0", ["a"] * 6, LABELS)
    start = time.monotonic()
    with pytest.raises(QueueFull) as refused:
        engine.classify("p0", ["a"] * 3, LABELS)
    assert time.monotonic() - start < 1
    assert refused.value.retry_after >= 1
    for request in requests:
        request.result(30.0)
    assert engine.classify("p0", ["a"], LABELS)[0].result(30.0)


def test_more_rows_than_the_queue_holds_are_refused_for_good(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=1, max_queued=2)
    with pytest.raises(ValueError, match="3 rows were sent, and the queue holds 2; send fewer at once"):
        engine.classify("p0", ["a"] * 3, LABELS)


def test_retry_after_counts_queued_texts_with_their_own_time(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=1)
    generate = [EngineRequest(engine.get("p0"), (5,), GenerateParams(max_new_tokens=9)) for _ in range(3)]
    classify = [EngineRequest(engine.get("p0"), (5,), ClassifyParams(candidates=((5,), (6,)))) for _ in range(2)]
    queue, seconds = RequestQueue(5), {ClassifyParams: 1.0, GenerateParams: 9.0}
    queue.put([*generate, *classify], seconds)
    with pytest.raises(QueueFull) as refused:
        queue.put(classify, seconds)
    assert refused.value.retry_after == 3 * 9 + 2 * 1
    assert engine.generate("p0", "a", max_new_tokens=3).result(30.0)
    assert engine._runner.seconds_per_row[GenerateParams] != engine._runner.seconds_per_row[ClassifyParams]


def test_cancelled_generation_leaves_the_batch(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=2)
    began = threading.Event()
    long = engine.generate("p0", "a", max_new_tokens=150, on_token=lambda token: began.set())
    other = engine.generate("p1", "b", max_new_tokens=20)
    assert began.wait(20)
    long.cancel()
    assert list(other.result(30.0).tokens) == generate_alone(engine, "p1", "b", 20)
    with pytest.raises(Cancelled):
        long.result(0.0)
    assert engine.status().generating == 0


def test_deadline_ends_queued_and_running_requests(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=1, timeout=0.05, max_wait=400.0)
    with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
        engine.classify("p0", ["a"], LABELS)[0].result(10.0)
    request = engine.generate("p0", "a", max_new_tokens=200, on_token=lambda token: time.sleep(0.01))
    with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
        request.result(10.0)


def test_close_finishes_requests_and_refuses_new_ones(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=1, max_wait=10_000.0)
    classification = engine.classify("p0", ["a"], LABELS)[0]
    text = engine.generate("p0", "a", max_new_tokens=30)
    engine.close(grace=30.0)
    assert classification.result(0.0)
    assert text.result(0.0)
    with pytest.raises(RuntimeError, match="shutting down"):
        engine.classify("p0", ["a"], LABELS)
    assert not engine.alive


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], LABELS, "no rows"),
        (["a"], None, "no labels of its own"),
        (["a" * 2000], LABELS, "exceed the 256"),
        (["a"], ["yes"], "two or more"),
        ([{"other": "a"}], LABELS, "send each row as a text"),
    ],
)
def test_invalid_rows_or_labels_are_rejected(engine_of: EngineOf, rows: Any, labels: Any, message: str) -> None:
    engine = engine_of(prompts=1)
    with pytest.raises(ValueError, match=message):
        engine.classify("p0", rows, labels)


def test_prompt_of_another_width_is_rejected(engine_of: EngineOf, prompt_of: PromptOf) -> None:
    engine, other = engine_of("llama", prompts=0), engine_of("opt", prompts=0)
    with pytest.raises(ValueError, match="another backbone"):
        engine.add("strange", prompt_of(other.backbone, 0))
    with pytest.raises(ValueError, match="prompt name"):
        engine.add("../strange", prompt_of(engine.backbone, 0))
    assert engine.prompts == []


def test_encoder_decoder_echoes_an_input_alone(engine_of: EngineOf) -> None:
    engine = engine_of("t5", prompts=1, max_wait=200.0)
    requests = [engine.generate("p0", "a b", max_new_tokens=tokens) for tokens in (0, 3, 0)]
    assert [len(request.result(30.0).tokens) for request in requests] == [0, 3, 0]


def test_default_length_stays_within_the_limit(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=1, max_new_tokens=5)
    assert 1 <= len(engine.generate("p0", "a b").result(30.0).tokens) <= 5
    with pytest.raises(ValueError, match="max_tokens is 6; it must be from 0 to 5"):
        engine.generate("p0", "a b", max_new_tokens=6)


def test_input_as_wide_as_the_window_is_scored(engine_of: EngineOf) -> None:
    engine = engine_of("mistral", prompts=0)
    request = engine.generate("base", [5 + n % 9 for n in range(128)], max_new_tokens=0, logprobs=0, score_input=True)
    assert request.result(30.0).tokens == ()
    assert len(request.input_logprobs or ()) == 127


def test_answer_beyond_the_prompts_offsets_is_refused_at_once(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=0)
    config = DePT(length=3, rank=2, positions=16)
    engine.add("offsets", config.build(engine.backbone.host(), torch.Generator().manual_seed(0)))
    ids = list(range(5, 15))
    with pytest.raises(ValueError, match="its answer have 17 tokens, but prompt 'offsets' has offsets for 16; shorten"):
        engine.generate("offsets", ids, max_new_tokens=8)
    assert engine.generate("offsets", ids, max_new_tokens=7).result(30.0)


def test_idle_engine_keeps_no_removed_prompt(engine_of: EngineOf, prompt_of: PromptOf) -> None:
    engine = engine_of(prompts=0)
    engine.add("short-lived", prompt_of(engine.backbone, 0))
    entry = weakref.ref(engine.get("short-lived"))
    engine.classify("short-lived", ["a"], LABELS)[0].result(30.0)
    engine.remove("short-lived")
    deadline = time.monotonic() + 10
    while entry() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert entry() is None
