"""Measures where the time of a forward goes: block by block, in each memory, captured or not.

`marks` notes when blocks begin and end; `forwards` runs a model with and without them, so that what
they cost is known; `figures` makes medians, shares and rooflines of it.
"""
