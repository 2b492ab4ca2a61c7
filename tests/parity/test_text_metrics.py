"""ROUGE-L, chrF and BLEU equal rouge-score and sacrebleu; SQuAD's exact match and F1 equal its published script."""

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from softprompt.evaluation.evaluate import is_correct
from softprompt.evaluation.significance import drop
from softprompt.tasks import METRICS, Answers, Task, score
from softprompt.tasks.metrics.texts import normalize

PREDICTIONS = [
    "The cat sat on the mat, quietly.",
    "a dog barked at the postman yesterday",
    "",
    "It rains in Spain (mainly) on the plain!",
    "completely different words here now",
    "One film, two cooks, and a great cast of three.",
]
REFERENCES: list[tuple[str, ...]] = [
    ("The cat sat quietly on the mat.", "A cat was sitting on the mat."),
    ("The dog barked at the postman.",),
    ("There is an answer.", "Yes."),
    ("It rains mainly on the plain in Spain.",),
    ("Nothing of that kind was said.",),
    ("A film about two cooks, with a great cast of three.", "One film, two cooks.", "Two cooks"),
]
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ROWS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=4)


def answers(predictions: list[str], golds: list[tuple[str, ...]]) -> Answers:
    return Answers(predictions=predictions, golds=golds)


def transposed(golds: list[tuple[str, ...]]) -> list[list[str | None]]:
    """sacrebleu's form: one list per reference, with None where a row has fewer."""
    count = max(map(len, golds))
    return [[gold[i] if i < len(gold) else None for gold in golds] for i in range(count)]


def sacrebleu_score(name: str, predictions: list[str], golds: list[tuple[str, ...]]) -> float:
    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    return float(metric.corpus_score(predictions, transposed(golds)).score) / 100


def rouge_score(prediction: str, golds: tuple[str, ...]) -> float:
    return float(RougeScorer(["rougeL"]).score_multi(list(golds), prediction)["rougeL"].fmeasure)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_score_equals_sacrebleu(name: str) -> None:
    expected = sacrebleu_score(name, PREDICTIONS, REFERENCES)
    assert METRICS[name](answers(PREDICTIONS, REFERENCES)) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.9


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@settings(deadline=None, max_examples=60)
@given(rows=ROWS)
def test_corpus_score_equals_sacrebleu_for_any_text(name: str, rows: list[tuple[str, tuple[str, ...]]]) -> None:
    predictions, golds = [row[0] for row in rows], [row[1] for row in rows]
    expected = sacrebleu_score(name, predictions, golds)
    assert METRICS[name](answers(predictions, golds)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_interval_is_a_bootstrap_of_sacrebleu(name: str) -> None:
    rng, scores = np.random.default_rng(3), []
    for _ in range(50):
        rows = rng.integers(len(PREDICTIONS), size=len(PREDICTIONS))
        scores.append(sacrebleu_score(name, [PREDICTIONS[i] for i in rows], [REFERENCES[i] for i in rows]))
    interval = METRICS[name].interval(answers(PREDICTIONS, REFERENCES), 50, 3)
    assert interval == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])), abs=1e-12)
    assert interval[0] < METRICS[name](answers(PREDICTIONS, REFERENCES)) < interval[1]


def test_rouge_l_equals_rouge_score() -> None:
    expected = np.mean([rouge_score(text, golds) for text, golds in zip(PREDICTIONS, REFERENCES, strict=True)])
    assert METRICS["rouge_l"](answers(PREDICTIONS, REFERENCES)) == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.7


@settings(deadline=None, max_examples=100)
@given(prediction=ASCII, golds=st.lists(ASCII, min_size=1, max_size=3).map(tuple))
def test_rouge_l_equals_rouge_score_for_ascii(prediction: str, golds: tuple[str, ...]) -> None:
    expected = rouge_score(prediction, golds)
    assert METRICS["rouge_l"](answers([prediction], [golds])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("кошка сидит на ковре", "кошка сидит", 2 * 1 * 0.5 / 1.5),
        ("القطة على السجادة", "القطة على السجادة", 1.0),
        ("猫坐在垫子上", "猫在垫子上", 2 * 5 / 11),
        ("ねこがすわる", "いぬがすわる", 2 * 4 / 12),
        ("바다 는 푸르다", "바다 는 넓다", 2 / 3),
        ("नमस्ते दुनिया", "नमस्ते संसार", 0.5),
        ("café noir", "cafe noir", 0.5),
        ("GPT-4 模型", "gpt 4 模型", 1.0),
        ("猫", "犬", 0.0),
    ],
)
def test_rouge_l_compares_words_of_any_script(prediction: str, gold: str, expected: float) -> None:
    assert METRICS["rouge_l"](answers([prediction], [(gold,)])) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["rouge_l", "chrf"])
@pytest.mark.parametrize(
    "text", ["кошка сидит на ковре", "القطة على السجادة", "猫坐在垫子上", "नमस्ते दुनिया", "ไปโรงเรียน"]
)
def test_equal_texts_of_any_script_score_one(name: str, text: str) -> None:
    assert METRICS[name](answers([text, text], [(text,), ("other", text)])) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.answer_kind == "texts"])
@pytest.mark.parametrize("golds", [("",), ("the",), ("...",), ("", "an answer"), ("an answer",)])
def test_empty_texts_have_a_finite_score(name: str, golds: tuple[str, ...]) -> None:
    task = Task(name="t", template="{a}", target="b", metrics=(name,))
    for predictions in (["", "an answer"], [None, " "], ["...", "\n\t"], ["🙂", "an"]):
        result = score(task, predictions, [golds, golds], majority=golds[0], resamples=20)
        assert all(0 <= value <= 1 for value in (result.value, result.majority))
        assert METRICS[name].interval(answers(["x"], [golds]), 20, 0)[0] >= 0


@pytest.mark.parametrize("name", ["rouge_l", "chrf", "bleu"])
def test_missing_and_empty_answers_score_zero(name: str) -> None:
    task = Task(name="t", template="{a}", target="b", metrics=(name,))
    result = score(task, ["", None], ["a gold answer of some words", "another"], majority=None, resamples=20)
    assert result.value == 0
    assert result.warning is not None
    assert result.warning.startswith("1 of 2 answers are not text")


def test_row_without_accepted_answer_is_refused() -> None:
    task = Task(name="t", template="{a}", target="b", metrics=("rouge_l",))
    with pytest.raises(ValueError, match="row 2 of task 't' has no accepted answer; give it at least one"):
        score(task, ["a", "b"], [("a",), ()], majority=None)


def test_an_equal_short_answer_is_right_although_its_bleu_is_zero() -> None:
    task = Task(name="t", template="{a}", target="b", metrics=("bleu",))
    assert METRICS["bleu"](answers(["two words"], [("two words",)])) == pytest.approx(0)
    assert is_correct(task, "two words", ["other", "two words"])
    assert not is_correct(task, "two word", ["other", "two words"])


@pytest.mark.parametrize("name", ["rouge_l", "chrf", "bleu"])
def test_drop_compares_two_sets_of_texts(name: str) -> None:
    golds = [(f"the long answer number {i} of this list",) for i in range(30)]
    before = answers([gold[0] for gold in golds], golds)
    after = answers([gold[0] if i % 3 else "nothing of that" for i, gold in enumerate(golds)], golds)
    result = drop(METRICS[name], before, after)
    assert result.value == pytest.approx(METRICS[name](before) - METRICS[name](after))
    assert result.p_value < 0.01


def squad_normalize(text: str) -> str:
    """The steps of SQuAD's evaluate-v1.1.py, in its order."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@settings(deadline=None)
@given(text=TEXT | ASCII)
def test_normalized_text_keeps_every_letter_and_digit_but_articles(text: str) -> None:
    normalized = normalize(text)
    assert bool(normalized) == bool(text.split())

    def bare(text: str) -> str:
        return "".join(char for char in text.casefold() if char.isalnum())

    without = " ".join(word for word in text.casefold().split() if bare(word) not in ("a", "an", "the"))
    assert len(bare(without)) <= len(bare(normalized)) <= len(bare(text))


@settings(deadline=None)
@given(prediction=TEXT | ASCII, gold=TEXT | ASCII)
def test_squad_metrics_equal_squads_script(prediction: str, gold: str) -> None:
    ours, theirs = squad_normalize(prediction).split(), squad_normalize(gold).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    f1 = float(ours == theirs)  # SQuAD 2.0: an empty text only equals an empty one
    if common:
        precision, recall = common / len(ours), common / len(theirs)
        f1 = 2 * precision * recall / (precision + recall)
    rows = answers([prediction], [(gold,)])
    assert METRICS["squad_f1"](rows) == pytest.approx(f1)
    assert METRICS["squad_exact_match"](rows) == (squad_normalize(prediction) == squad_normalize(gold))
