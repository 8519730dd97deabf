"""A stage as a torch program (`torch.export`, .pt2): what Core ML, ExecuTorch and LiteRT convert from.

A program is code-free data: `load` needs neither the class of the network nor the file it came from.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from edgegen import errors, files
from edgegen.onnx_parity import evaluating, first_line
from edgegen.types import Stage


def save(stage: Stage, out: Path) -> Path:
    """Write a stage's module as a .pt2 program, eval mode, float32, static shapes, whole or not at all.

    Raises:
        errors.ModelError: the module cannot be exported.
    """
    import torch

    arguments = tuple(
        torch.full(tuple(int(d) for d in spec.shape), 0.5, dtype=getattr(torch, spec.dtype)) for spec in stage.inputs
    )
    with evaluating(stage.module), torch.no_grad(), warnings.catch_warnings():
        # torch's own deprecations inside its exporter; nothing that a caller could mend
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            program = torch.export.export(stage.module, arguments, strict=False)
            with files.whole(out) as temporary:
                torch.export.save(program, temporary)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise errors.ModelError(f"{stage.name}: torch.export refuses it: {first_line(error)}") from error
    return out


def load(file: Path) -> Any:
    """The `torch.export.ExportedProgram` of a .pt2 file; `.module()` gives a callable network.

    Raises:
        errors.ModelError: the file is not a torch program.
    """
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            return torch.export.load(file)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise errors.ModelError(f"{file}: not a torch program ({first_line(error)})") from error
