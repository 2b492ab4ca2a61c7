"""Metrics: one number for predictions and gold answers, with its 95 % interval; `METRICS` has them by name."""

from collections.abc import Mapping

from softprompt.tasks.metrics import labels, numbers, texts
from softprompt.tasks.metrics.base import Answers, Column, Metric, Pooled, RowMean, check_installed, wilson

__all__ = ["METRICS", "Answers", "Column", "Metric", "Pooled", "RowMean", "check_installed", "wilson"]

METRICS: Mapping[str, Metric] = {**labels.METRICS, **numbers.METRICS, **texts.METRICS}
"""Every metric by name."""
