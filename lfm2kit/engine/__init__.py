"""Generates text: requests in, tokens out."""
