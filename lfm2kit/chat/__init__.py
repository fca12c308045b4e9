"""Text and chats for a model of token ids: tokenizer, templates, streams, thoughts, tool calls.

Tokenizer and templates need the extra `lfm2kit[chat]`; the other modules need only Python.
"""
