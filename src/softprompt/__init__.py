"""Decomposed prompt tuning and its relatives: a task as a few thousand numbers in front of a frozen model."""

__version__ = "0.1.0"
