"""Weight norm (Salimans and Kingma, 2016, arXiv:1602.07868) becomes the plain weight w = g v / |v| that it computes.

For `torch.nn.utils.parametrizations.weight_norm` and the old hook `torch.nn.utils.weight_norm`. Exact: the folded
weight is the computed one. To be done before export, for every runtime: quantizers look for plain weights. In a model
that is exported already, `fold_constant_weights` does the same.
"""

from __future__ import annotations

from typing import Any

from edgegen.rewrites import _module

KIND = "cure"
RUNTIMES: tuple[str, ...] = ()


def module_fold_weight_norm(module: Any) -> dict[str, str]:
    """Replace weight-normed weights by plain ones, in place; `<layer>.<weight>` -> what was done."""
    return _module.fold(module, parametrization="_WeightNorm", hook="WeightNorm", what="weight norm")
