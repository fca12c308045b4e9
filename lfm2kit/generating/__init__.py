"""Joins a model, its tokenizer, its template and an engine: prompts in, text out."""
