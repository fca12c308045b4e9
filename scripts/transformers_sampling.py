"""The processors of transformers that change logits: what fixtures of sampling come from.

They are those that `generate` makes of a generation_config, in its order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, Lfm2MoeConfig, Lfm2MoeForCausalLM

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Floats = npt.NDArray[np.float32]


class Case(NamedTuple):
    """A row of logits, the ids before it, and the settings, by transformers' names."""

    logits: Floats
    ids: npt.NDArray[np.int32]
    settings: dict[str, Any]


class Processors:
    """What `generate` does to logits between the model and the draw."""

    def __init__(self) -> None:
        sizes = {
            "vocab_size": 8,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        config = Lfm2MoeConfig(**sizes, num_key_value_heads=1, layer_types=["conv"])
        with torch.device("meta"):
            self._model = Lfm2MoeForCausalLM(config)

    def scores(self, case: Case) -> Floats:
        """Return what `generate` draws from, float32 [vocab_size]; -inf: not kept."""
        config = GenerationConfig(do_sample=True, **case.settings)
        length = max(len(case.ids), 1)
        processors = self._model._get_logits_processor(config, input_ids_seq_length=length)
        ids = torch.tensor(case.ids.astype(np.int64))[None]
        scores: Floats = processors(ids, torch.tensor(case.logits)[None])[0].numpy()
        return scores


def probabilities(scores: Floats) -> npt.NDArray[np.float64]:
    """Return the probability of each token, float64 [vocab_size].

    torch's softmax in float32 is wrong by more than 1e-6 where a sum has many small parts.
    """
    softmax: npt.NDArray[np.float64] = torch.tensor(scores).double().softmax(dim=-1).numpy()
    return softmax
