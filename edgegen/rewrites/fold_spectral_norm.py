"""Spectral norm (Miyato et al., 2018, arXiv:1802.05957) becomes the plain weight w / sigma that it computes.

For `torch.nn.utils.parametrizations.spectral_norm` and the old hook `torch.nn.utils.spectral_norm`. Exact in eval
mode, where sigma comes from the stored vectors and no power iteration runs. To be done before export, for every
runtime: the products that make sigma are refused by some (apple/coremltools#778; 9.0 has no vdot). In a model that is
exported already, `fold_constant_weights` does the same.
"""

from __future__ import annotations

from typing import Any

from edgegen.rewrites import _module

KIND = "cure"
RUNTIMES: tuple[str, ...] = ("coreml",)


def module_fold_spectral_norm(module: Any) -> dict[str, str]:
    """Replace spectrally normed weights by plain ones, in place; `<layer>.<weight>` -> what was done."""
    return _module.fold(module, parametrization="_SpectralNorm", hook="SpectralNorm", what="spectral norm")
