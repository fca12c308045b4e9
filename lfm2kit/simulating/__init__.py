"""Predicts jobs of many ranks, none of which runs: what they send each other, and their time."""
