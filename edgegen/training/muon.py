"""Muon: momentum whose matrices are orthogonalised before the step; what is no matrix is trained by AdamW.

Jordan et al., 2024, Muon (kellerjordan.github.io/posts/muon); step size as in Liu et al., 2025, arXiv:2502.16982, so
that a learning rate for AdamW serves. torch.optim.Muon takes matrices only; here a kernel counts as the matrix
(outputs, inputs * kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """lr and weight decay as in AdamW; momentum: of matrices; betas, eps: of all else."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.betas, self.eps = momentum, betas, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._matrix if parameter.ndim >= 2 else self._vector
                parameter.add_(update(parameter, parameter.grad), alpha=-group["lr"])

    def _matrix(self, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - self.momentum)
        matrix = gradient.lerp(buffer, self.momentum).contiguous().flatten(1)
        return (orthogonalised(matrix) * (0.2 * math.sqrt(max(matrix.shape)))).view(parameter.shape)

    def _vector(self, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = self.betas
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        count = float(state["step"])
        mean, square = state["exp_avg"] / (1 - first**count), state["exp_avg_sq"] / (1 - second**count)
        return mean / (square.sqrt() + self.eps)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of matrix = U S V^T, (rows, columns), float32: singular values come to lie between 0.7 and 1.2."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).float()
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
