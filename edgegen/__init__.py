"""edgegen: compress image generators and vision backbones for edge devices, and prove it with measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when first asked for, so that `import edgegen` stays light
    from edgegen.api import compare, compress, evaluate, export, load, profile, train

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "compress", "evaluate", "export", "load", "profile", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("edgegen.api"), name)
    raise AttributeError(f"module 'edgegen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
