"""Changes of logits by what a sequence holds already: penalties, and the bias of a request."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.sampling import Sampling

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


def penalise(logits: Floats, sampling: Sampling, prompt: Int32, generated: Int32) -> None:
    """Change `logits`, float32 [vocab_size], in place.

    The repetition penalty is transformers': it comes first, and counts the prompt.  The others are
    OpenAI's: they are subtracted, and count only what was generated.
    """
    if sampling.repetition_penalty != 1:
        _penalise_repetition(logits, np.float32(sampling.repetition_penalty), prompt, generated)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = np.bincount(generated)
        frequency = np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        presence = np.float32(sampling.presence_penalty) * (counts > 0)
        logits[: len(counts)] -= frequency + presence
    if sampling.logit_bias:
        ids = np.fromiter(sampling.logit_bias.keys(), np.int64)
        logits[ids] += np.fromiter(sampling.logit_bias.values(), np.float32)


def changes(sampling: Sampling) -> bool:
    """Return whether `penalise` changes anything."""
    penalties = sampling.presence_penalty or sampling.frequency_penalty
    return bool(sampling.repetition_penalty != 1 or penalties or sampling.logit_bias)


def _penalise_repetition(
    logits: Floats, penalty: np.float32, prompt: Int32, generated: Int32
) -> None:
    """Change each logit once, however often its token was seen."""
    seen = np.concatenate([prompt, generated])
    of_seen = logits[seen]
    logits[seen] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
