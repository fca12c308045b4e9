"""Decides who builds which block, where, and whether it fits; then builds the model."""
