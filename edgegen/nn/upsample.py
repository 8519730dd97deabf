"""Work done before enlarging an image instead of after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class EnlargeAfter(nn.Module):
    """What stood here, and then the upsampling that had stood before it: (N, C, H, W) to (N, C', sH, sW).

    Args:
        inner: a module that works on each pixel alone. size, scale_factor: as of `nn.Upsample` (lists, not tuples).
        mode: "nearest" or "bilinear" and so on. align_corners: None where the mode has none.
    """

    WRAPS = True

    def __init__(
        self, inner: nn.Module, size: Any, scale_factor: Any, mode: str, align_corners: bool | None = None
    ) -> None:
        super().__init__()
        self.config = {"size": size, "scale_factor": scale_factor, "mode": mode, "align_corners": align_corners}
        self.inner = inner
        self.enlarge = nn.Upsample(_plain(size), _plain(scale_factor), mode, align_corners)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.enlarge(self.inner(x))
        return out


def _plain(value: Any) -> Any:
    """Tuples where JSON has lists."""
    return tuple(value) if isinstance(value, list) else value
