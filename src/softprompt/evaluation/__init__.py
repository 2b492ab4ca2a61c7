"""Predictions and scores, prefix sharing, and the significance of a difference between scores."""
