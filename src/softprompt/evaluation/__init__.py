"""Answers and scores: prediction, prefix sharing, and whether a difference is significant."""
