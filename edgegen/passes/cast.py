"""Plan an unquantized build in another floating-point precision.

The pass writes `model.plan` only; the runtimes convert by it and keep in FP32 what would overflow.
"""

from __future__ import annotations

import dataclasses

from edgegen.passes import _plans
from edgegen.types import Job, Model, PassResult, PrecisionPlan


def cast(model: Model, job: Job, *, precision: str = "fp16") -> PassResult:
    """Write a PrecisionPlan for `precision`: fp16, bf16 or fp32.

    Returns:
        PassResult; `changed` has every convolution and linear layer whose precision the plan changes.
    Raises:
        RecipeError: another precision, or one that the target does not list.
    """
    _plans.check_precision("precision", precision, ("fp16", "bf16", "fp32"), job)
    plan = PrecisionPlan(precision)
    layers = list(_plans.layer_types(model.stage.module)) or ["graph"]
    same = plan == model.plan
    return PassResult(
        dataclasses.replace(model, plan=plan),
        {} if same else dict.fromkeys(layers, precision),
        dict.fromkeys(layers, f"is {precision} already") if same else {},
    )
