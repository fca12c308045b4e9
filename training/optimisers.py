"""What a step changes: Muon for matrices, AdamW for the rest, and the routers' biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.network import Experts, Network, SparseMoe
from training.recipe import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic that Muon iterates
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are made orthogonal (Jordan et al., 2024).

    Parameters are matrices, or stacks of them along the first dimension.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": 0.95, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all parameters from their gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the nearly orthogonal matrices that are closest to [..., rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x


def optimisers(network: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the products' matrices, and AdamW for all other parameters."""
    matrices = list(_matrices(network))
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in network.parameters() if id(p) not in taken]
    betas = (0.9, 0.95)
    return [
        Muon(matrices, recipe.muon_rate, recipe.weight_decay),
        torch.optim.AdamW(others, recipe.adam_rate, betas, weight_decay=0.0),
    ]


def _matrices(network: Network) -> Iterable[nn.Parameter]:
    gates = {id(router.gate) for router in network.routers().values()}
    for module in network.modules():
        if isinstance(module, Experts):
            yield from module.parameters()
        elif isinstance(module, nn.Linear) and id(module) not in gates:
            yield module.weight


def set_rates(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set each learning rate to its peak times `factor`."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group.get("peak", group["lr"])
            group["lr"] = group["peak"] * factor


@torch.no_grad()
def balance(routers: Iterable[SparseMoe], rate: float) -> None:
    """Move each expert's bias towards an equal load, and begin to count anew.

    There is no auxiliary loss: the bias chooses experts, and never enters the mixture's weights.
    """
    for router in routers:
        router.expert_bias += rate * torch.sign(router.load.mean() - router.load)
        router.load.zero_()
