"""Trains the small model that lfm2kit can embed, from two packages of texts (see README.md)."""
