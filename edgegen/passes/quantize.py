"""Plan a static post-training INT8 build: which layers become INT8, in which format, and what the rest stays in.

Jacob et al., 2018, arXiv:1712.05877. The pass writes `model.plan` only; runtimes calibrate and build by it, and what
they really made is read back from the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx

from edgegen.errors import RecipeError
from edgegen.passes import _plans
from edgegen.types import Job, Model, PassResult, PrecisionPlan

FORMATS = ("u8s8", "s8s8")


def quantize(
    model: Model,
    job: Job,
    *,
    precision: str = "int8",
    formats: Sequence[str] = ("u8s8", "s8s8"),
    float_layers: Sequence[str] = (),
    float_types: Sequence[str] = (),
    rest: str = "fp32",
) -> PassResult:
    """Write a PrecisionPlan for INT8.

    Args:
        formats: Q/DQ formats to try where a runtime has several: u8s8 (unsigned activations), s8s8 (symmetric). The
            plan names one only if it is the only one; `notes` has them all.
        float_layers: layers (or graph nodes, `path/Type`) left in `rest`; float_types: ONNX types left in it.
        rest: precision of what is not quantized: fp32, or fp16 or bf16 where the target has it.
    Returns:
        PassResult; `changed` has the convolution and linear layers that become INT8, `skipped` the others.
    Raises:
        RecipeError: a value that is not allowed, a precision that the target lacks, a name that does not exist.
    """
    _plans.check_precision("precision", precision, ("int8",), job)
    _plans.check_precision("rest", rest, ("fp32", "fp16", "bf16"), job)
    if not formats or any(name not in FORMATS for name in formats):
        raise RecipeError(f"formats must name at least one of {', '.join(FORMATS)}, got {list(formats)}")
    for kind in float_types:
        if not onnx.defs.has(kind):
            raise RecipeError(f"float_types: {kind!r} is no ONNX operation; name one such as Conv, Gemm, MatMul")
    names = _plans.node_names(float_layers, model)
    plan = PrecisionPlan(
        "int8", formats[0] if len(formats) == 1 else "", rest, float_layers=names, float_types=tuple(float_types)
    )
    changed, skipped = {}, {}
    for path, types in _plans.layer_types(model.stage.module).items():
        if any(f"{path}/{kind}" in names for kind in types):
            skipped[path] = "named in float_layers"
        elif set(types) <= set(float_types):
            skipped[path] = f"{types[0]} is in float_types"
        else:
            changed[path] = "int8"
    if model.stage.module is None:
        changed["graph"] = "int8"
    return PassResult(dataclasses.replace(model, plan=plan), changed, skipped, {"formats": list(formats)})
