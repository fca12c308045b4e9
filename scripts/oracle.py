"""transformers' LFM2 and LFM2-MoE in float64: what the fixtures' expected values come from.

transformers rounds to float32 inside RMSNorm and RoPE even in a float64 model.  The norm is
replaced by its formula in float64; RoPE's angles stay float32, as every implementation has them;
the router's scores are rounded to float32, which is how the `Router` spec defines them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.lfm2_moe import modeling_lfm2_moe as lfm2_moe

from lfm2kit.checkpoint import open_checkpoint


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


lfm2.Lfm2RMSNorm.forward = _norm
lfm2_moe.Lfm2MoeRMSNorm.forward = _norm


class Oracle:
    """The model of a checkpoint folder, and what its routers chose."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = "sdpa"  # eager rounds its softmax to float32
        config._experts_implementation = "eager"
        self.model = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
        self._fill({name: t.float32() for name, t in checkpoint.weights.items()})
        self.routings: list[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = []
        self.least_gap = float("inf")  # of the last run
        self._watch_routers()

    def logits(self, token_ids: npt.NDArray[np.int32], **kwargs: Any) -> npt.NDArray[np.float64]:
        """Return the logits of all positions, float64 [tokens, vocab_size].

        Adds the choices of each MoE layer to `routings`.
        """
        self.routings.append([])
        self.least_gap = float("inf")
        ids = torch.tensor(np.asarray(token_ids, dtype=np.int64)[None])
        with torch.no_grad():
            output = self.model(input_ids=ids, use_cache=False, **kwargs)
        logits: npt.NDArray[np.float64] = output.logits[0].numpy()
        return logits

    def loads(self) -> list[int]:
        """Return how many rows each expert got in all."""
        ids = np.concatenate([ids.reshape(-1) for run in self.routings for ids, _ in run])
        counts: list[int] = np.bincount(ids).tolist()
        return counts

    def _fill(self, weights: dict[str, npt.NDArray[np.float32]]) -> None:
        """Copy canonical weights into the packed parameters of transformers 5."""
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        left = set(weights)
        with torch.no_grad():
            for name, parameter in state.items():
                if name.endswith("inv_freq"):
                    continue
                name = name.removeprefix("model.")
                if name.endswith("experts.gate_up_proj"):
                    used = [
                        [name.replace("gate_up_proj", f"{e}.{w}.weight") for w in ("w1", "w3")]
                        for e in range(len(parameter))
                    ]
                    value = np.stack([np.concatenate([weights[n] for n in u]) for u in used])
                elif name.endswith("experts.down_proj"):
                    used = [
                        [name.replace("down_proj", f"{e}.w2.weight")] for e in range(len(parameter))
                    ]
                    value = np.stack([weights[u[0]] for u in used])
                else:
                    used, value = [[name]], weights[name]
                left -= {n for names in used for n in names}
                parameter.data = torch.tensor(value.astype(np.float64)).reshape(parameter.shape)
        assert not left, f"transformers has no place for {sorted(left)[:3]}"

    def _watch_routers(self) -> None:
        for layer in self.model.model.layers:
            if hasattr(layer.feed_forward, "gate"):
                gate = layer.feed_forward.gate
                gate.forward = self._watched(gate)

    def _watched(self, gate: Any) -> Any:
        """Return a forward of the router `gate` with float32 scores that remembers its choices."""

        def forward(x: torch.Tensor, expert_bias: torch.Tensor | None = None) -> Any:
            logits = torch.nn.functional.linear(x, gate.weight).to(torch.float32)
            scores = logits.sigmoid()
            biased = scores if expert_bias is None else scores + expert_bias.to(torch.float32)
            # Stable: of equal scores the lower id comes first, where torch.topk promises nothing.
            ranked, order = torch.sort(biased, dim=-1, descending=True, stable=True)
            ids = order[..., : gate.top_k]
            weights = scores.gather(-1, ids)
            if gate.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
            weights = weights * gate.routed_scaling_factor
            self._remember(ids, weights, ranked[..., gate.top_k - 1 : gate.top_k + 1])
            return logits, weights.to(torch.float64), ids

        return forward

    def _remember(self, ids: torch.Tensor, weights: torch.Tensor, edge: torch.Tensor) -> None:
        if edge.shape[-1] == 2:  # the last score that was taken, and the first that was not
            self.least_gap = min(self.least_gap, float((edge[..., 0] - edge[..., 1]).min()))
        self.routings[-1].append((ids.numpy().astype(np.int32), weights.numpy()))
