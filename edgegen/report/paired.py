"""Two figures judged on the same samples: their difference sample by sample, which is known far better than either."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgegen import stats

Figure = dict[str, Any]


def differences(before: Figure, after: Figure) -> np.ndarray | None:
    """after - before by sample; None where a figure is not the mean of its n samples, as FID is not.

    The samples of KID are subsets drawn from the images, which are not independent: it is not one either.

    Both must have been judged on the same samples in the same order, which is for the caller to know.
    """
    old, new = np.asarray(before["samples"]), np.asarray(after["samples"])
    if len(old) < 2 or len(old) != len(new):
        return None
    for samples, figure in ((old, before), (new, after)):
        if figure["conditions"].get("n", len(samples)) != len(samples):
            return None
        if not math.isclose(float(samples.mean()), figure["value"], rel_tol=1e-6, abs_tol=1e-9):
            return None
    return new - old


def interval(before: Figure, after: Figure) -> tuple[float, float] | None:
    """95% of after - before, in the unit of the figures; None where `differences` gives none."""
    found = differences(before, after)
    return None if found is None else stats.mean_interval(found)
