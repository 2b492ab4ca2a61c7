"""Metrics of labels."""

import warnings
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from softprompt.tasks.metrics.base import Answers, Joint, Metric, RowMean


def _correct(answers: Answers) -> Float[np.ndarray, "row"]:
    return (np.asarray(answers.predictions) == np.asarray(answers.golds)).astype(float)


def _question_correct(answers: Answers) -> Float[np.ndarray, "unit"]:
    units = answers.units
    errors = np.bincount(units, weights=1 - _correct(answers))
    return (errors == 0).astype(float)


def _question_consistent(answers: Answers) -> Float[np.ndarray, "unit"]:
    """Whether all rows of a question have the same prediction, right or wrong."""
    units, predictions = answers.units, np.asarray(answers.predictions)
    _, first = np.unique(units, return_index=True)
    return (np.bincount(units, weights=predictions != predictions[first][units]) == 0).astype(float)


def _macro_f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    # A resample has the classes of its sample: without those it happens to lack, it would be scored on easier ones.
    sample = answers.sample or answers
    # Without -1, a prediction that is not a label: it lowers the recall of the gold class and is not a class itself.
    classes = np.setdiff1d(np.union1d(sample.golds, sample.predictions), [-1])
    return float(f1_score(answers.golds, answers.predictions, labels=classes, average="macro", zero_division=0))


def _f1(answers: Answers) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(answers.golds, answers.predictions, labels=[1], average="macro", zero_division=0))


def _matthews(answers: Answers) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        # Predictions and golds of a single label, as in some resamples: scikit-learn warns and returns 0, as we want.
        warnings.simplefilter("ignore", UserWarning)
        return float(matthews_corrcoef(answers.golds, answers.predictions))


METRICS: Mapping[str, Metric] = {
    "accuracy": RowMean(answer_kind="labels", scores=_correct),
    "macro_f1": Joint(answer_kind="labels", score=_macro_f1),
    "f1": Joint(answer_kind="labels", score=_f1, binary=True),
    "matthews": Joint(answer_kind="labels", score=_matthews),
    "f1a": Joint(answer_kind="labels", score=_f1, binary=True, grouped=True),
    "question_match": RowMean(answer_kind="labels", scores=_question_correct, grouped=True),
    "gender_parity": RowMean(answer_kind="labels", scores=_question_consistent, grouped=True),
}
"""`f1a` is F1 over the answers of all questions; `question_match` requires every answer of a question to be right."""
