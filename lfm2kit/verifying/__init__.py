"""Finds the first block whose results differ from another backend's, or from a stored trace.

`forced` gives every block the other side's arguments, so that a difference is the block's own;
`drift` lets the model run by itself; `narrowing` looks into the block that differs first.
"""

REFERENCE = "reference"  # the backend that others are compared with
