"""Metrics: one number of predictions and gold answers, and its 95 % interval."""

import re
import string
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float, Int, Shaped

Column = Sequence[Any] | Shaped[np.ndarray, "row"]
"""One value for each row."""

Each = Callable[["Answers"], Float[np.ndarray, "unit"]]
"""One value for each row, or for each question."""


@final
@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predictions beside gold answers.

    Labels are class indices, -1 for a prediction that is no label; texts are strings, none for no prediction, beside
    tuples of accepted strings; numbers are floats, NaN for a prediction that is no number.

    Raises:
        ValueError: unequal lengths, or nothing to score.
    """

    predictions: Column
    golds: Column
    questions: Column | None = None
    """Which rows are one question; none: each row is."""

    def __post_init__(self) -> None:
        sizes = {len(part) for part in (self.predictions, self.golds, self.questions) if part is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"{len(self.predictions)} predictions, {len(self.golds)} gold answers and "
                f"{len(self.golds if self.questions is None else self.questions)} questions; give each row one"
            )
        if sizes == {0}:
            raise ValueError("there are no predictions to score; give at least one row")

    @property
    def units(self) -> Int[np.ndarray, "row"]:
        """Each row's question, counted from 0."""
        if self.questions is None:
            return np.arange(len(self.golds))
        return np.unique(np.array([str(question) for question in self.questions]), return_inverse=True)[1]

    def take(self, rows: Int[np.ndarray, "drawn"]) -> "Answers":
        """These rows of labels or numbers, in this order, each as its own question."""
        return Answers(predictions=np.asarray(self.predictions)[rows], golds=np.asarray(self.golds)[rows])


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """One number with an interval; higher is better, unless it says otherwise."""

    of: Literal["labels", "texts", "numbers"]
    """What it compares."""
    binary: bool = False
    """Whether it wants exactly two labels; the second is the positive one."""
    grouped: bool = False
    """Whether its unit is a question of several rows."""
    falls: bool = False
    """Whether lower is better: then it is told beside another metric, and selects nothing."""

    @abstractmethod
    def __call__(self, answers: Answers) -> float:
        """The score, as a fraction."""

    @abstractmethod
    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """The 95 % interval, low and high."""


@final
@dataclass(frozen=True, kw_only=True)
class Mean(Metric):
    """The mean of a value for each row or question; Wilson's interval where it is 0 or 1, else a bootstrap."""

    each: Each
    yes_or_no: bool = True
    """Whether each value is 0 or 1."""

    def __call__(self, answers: Answers) -> float:
        """The mean."""
        return float(self.each(answers).mean())

    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """Wilson's, or the percentiles of resampled means."""
        values = self.each(answers)
        if self.yes_or_no:
            return wilson(round(float(values.sum())), len(values))
        random = np.random.default_rng(seed)
        return _middle([values[random.integers(len(values), size=len(values))].mean() for _ in range(resamples)])


@final
@dataclass(frozen=True, kw_only=True)
class Whole(Metric):
    """One number of all rows together; its interval is a bootstrap over rows, or over questions if it is grouped."""

    all: Callable[[Answers], float]

    def __call__(self, answers: Answers) -> float:
        """The number."""
        return self.all(answers)

    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """The percentiles of the number over resampled rows or questions."""
        units = answers.units if self.grouped else np.arange(len(answers.golds))
        members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])
        random = np.random.default_rng(seed)
        draws = (random.integers(len(members), size=len(members)) for _ in range(resamples))
        return _middle([self.all(answers.take(np.concatenate([members[unit] for unit in draw]))) for draw in draws])


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of `successes` among `n`.

    Reference: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", by scipy.

    >>> tuple(round(end, 3) for end in wilson(8, 10))
    (0.49, 0.943)
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space: what SQuAD compares.

    Reference: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1.

    >>> normalise("The  Cat's hat.")
    'cats hat'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_overlap(prediction: str, gold: str) -> float:
    """F1 of the normalised words in common; two texts without any word are equal."""
    ours, theirs = normalise(prediction).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _right(answers: Answers) -> Float[np.ndarray, "row"]:
    return (np.asarray(answers.predictions) == np.asarray(answers.golds)).astype(float)


def _right_questions(answers: Answers) -> Float[np.ndarray, "unit"]:
    units = answers.units
    wrong = np.bincount(units, weights=1 - _right(answers))
    return (wrong == 0).astype(float)


def _same_in_question(answers: Answers) -> Float[np.ndarray, "unit"]:
    """Whether all rows of a question are answered alike, right or wrong."""
    units, given = answers.units, np.asarray(answers.predictions)
    _, first = np.unique(units, return_index=True)
    return (np.bincount(units, weights=given != given[first][units]) == 0).astype(float)


_DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "some", "each", "every", "many", "much", "few"}
_DETERMINERS |= {"my", "your", "his", "her", "our", "their", "whose", "which"}


def referent_match(prediction: str, gold: str) -> float:
    """1 where the words of one are all among the other's, but for determiners; a possessive matches a possessive alone.

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    section 3.1.2 and its code for WSC, which lets "bunny" stand for "the fuzzy bunny".

    >>> referent_match("fuzzy bunny", "The bunny"), referent_match("Bob", "Bob's hat")
    (1.0, 0.0)
    """
    ours, theirs = ({*text.lower().split()} - _DETERMINERS for text in (prediction, gold))
    if not ours or ("'" in prediction) != ("'" in gold):
        return 0.0
    return float(ours <= theirs or theirs <= ours)


def _best(compare: Callable[[str, str], float]) -> Each:
    """Against the accepted answer that fits best; no prediction is wrong."""

    def each(answers: Answers) -> Float[np.ndarray, "row"]:
        pairs = zip(answers.predictions, answers.golds, strict=True)
        return np.array([0.0 if ours is None else max(compare(ours, gold) for gold in golds) for ours, golds in pairs])

    return each


def _macro_f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    # Without the -1 of a prediction that is no label: it costs the row's own class, and is no class itself.
    classes = np.setdiff1d(np.union1d(answers.golds, answers.predictions), [-1])
    return float(f1_score(answers.golds, answers.predictions, labels=classes, average="macro", zero_division=0))


def _f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(answers.golds, answers.predictions, labels=[1], average="macro", zero_division=0))


def _matthews(answers: Answers) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        # One label on both sides, as in some resamples: scikit-learn warns, and scores it 0 as we want it.
        warnings.simplefilter("ignore", UserWarning)
        return float(matthews_corrcoef(answers.golds, answers.predictions))


def _as_numbers(answers: Answers) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
    """Predictions and golds. What is no number becomes the golds' end that is farther off: wrong on any scale."""
    golds = np.asarray(answers.golds, dtype=float)
    ours = np.asarray(answers.predictions, dtype=float)
    far = np.where(golds > (golds.min() + golds.max()) / 2, golds.min(), golds.max())
    return np.where(np.isfinite(ours), ours, far), golds


def _distance(answers: Answers) -> Float[np.ndarray, "row"]:
    ours, golds = _as_numbers(answers)
    return np.abs(ours - golds)


def _correlation(name: Literal["pearsonr", "spearmanr"]) -> Callable[[Answers], float]:
    """0 where one side is constant, so that no correlation is defined: it tells no row from another."""

    def correlation(answers: Answers) -> float:
        from scipy import stats

        ours, golds = _as_numbers(answers)
        if len(golds) < 2 or np.ptp(golds) == 0 or np.ptp(ours) == 0:
            return 0.0
        with warnings.catch_warnings():
            # Nearly constant predictions: scipy warns that the number is inexact, which the interval shows.
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            return float(getattr(stats, name)(ours, golds).statistic)

    return correlation


def _middle(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


METRICS: Mapping[str, Metric] = {
    "accuracy": Mean(of="labels", each=_right),
    "macro_f1": Whole(of="labels", all=_macro_f1),
    "f1": Whole(of="labels", all=_f1, binary=True),
    "matthews": Whole(of="labels", all=_matthews),
    "pearson": Whole(of="numbers", all=_correlation("pearsonr")),
    "spearman": Whole(of="numbers", all=_correlation("spearmanr")),
    "mae": Mean(of="numbers", each=_distance, yes_or_no=False, falls=True),
    "exact_match": Mean(of="texts", each=_best(lambda ours, gold: float(normalise(ours) == normalise(gold)))),
    "token_f1": Mean(of="texts", each=_best(token_overlap), yes_or_no=False),
    "f1a": Whole(of="labels", all=_f1, binary=True, grouped=True),
    "question_match": Mean(of="labels", each=_right_questions, grouped=True),
    "gender_parity": Mean(of="labels", each=_same_in_question, grouped=True),
    "referent_match": Mean(of="texts", each=_best(referent_match)),
}
"""Every metric by name. `f1a` is F1 over all questions' answers, `question_match` asks for all of a question's, and
`mae` is the mean absolute error."""
