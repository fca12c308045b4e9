"""Logarithms of the probabilities that a model gives to tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]


def logprobs(logits: Floats, token_id: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the logprob of a token, and (id, logprob) of the `most` best, the best first.

    They are of the model's own distribution: softmax of `logits`, float32 [vocab_size], without
    temperature, penalties or masks.  Of equal tokens the one with the lowest id comes first, and
    those whose probability is 0 are not listed.  At least one logit is finite, and none is NaN.
    """
    shifted = logits.astype(np.float64) - logits.max()
    values = shifted - np.log(np.exp(shifted).sum())
    best = [(int(best_id), float(values[best_id])) for best_id in _best(logits, most)]
    return float(values[token_id]), best


def _best(logits: Floats, most: int) -> Ids:
    """Return the ids of the `most` largest numbers above -inf, in descending order."""
    most = min(most, len(logits))
    if most == 0:
        return np.zeros(0, np.intp)
    border = np.partition(logits, -most)[-most]
    above, equal = np.flatnonzero(logits > border), np.flatnonzero(logits == border)
    ids = np.concatenate([above, equal[: most - len(above)]])
    ids = ids[np.isfinite(logits[ids])]
    best: Ids = ids[np.argsort(-logits[ids], kind="stable")]
    return best
