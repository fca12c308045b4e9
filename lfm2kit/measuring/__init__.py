"""Runs samples, judges their logits, and measures times."""
