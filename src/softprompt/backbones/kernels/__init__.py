"""Attention, variable-length layouts and fused layers: torch and transformers only."""
