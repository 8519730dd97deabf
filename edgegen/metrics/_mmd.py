"""Squared maximum mean discrepancy (Gretton et al., 2012): its unbiased estimate, and the error of that estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgegen.metrics._rows import Rows
from edgegen.nn.mmd import Kernel, weighted

_WHOLE_KERNEL_IMAGES = 2500  # up to here all subsets share one kernel (150 MB), which is much faster
_INTERVAL_IMAGES = 1024  # kernels of this many images a side bound the interval's time and memory


def subset_values(a: Any, b: Any, kernel: Kernel, *, seed: int, subsets: int, size: int) -> list[float]:
    """Unbiased squared MMD of `subsets` random subsets of `size` rows of a (n, D) and b (m, D): arrays or `Rows`."""
    rng = np.random.RandomState(seed)  # the legacy generator: it makes subsets equal to torch-fidelity's
    draws = [[rng.choice(len(side), size, replace=False) for side in (a, b)] for _ in range(subsets)]
    if max(len(a), len(b)) <= _WHOLE_KERNEL_IMAGES:
        in_a, in_b = (_weights([pair[side] for pair in draws], len(rows)) for side, rows in enumerate((a, b)))
        return [float(v) for v in weighted(_all(a), _all(b), in_a, in_b, kernel)]
    one, found = np.ones((1, size)), []
    for i, j in draws:
        found += [float(v) for v in weighted(_take(a, i), _take(b, j), one, one, kernel)]
    return found


def standard_error(a: Any, b: Any, kernel: Kernel, *, seed: int, subsets: int = 1, size: int = 0) -> float:
    """Standard error of the squared MMD of a (n, D) and b (m, D) over new draws of both; see `Parts`.

    With more than 1,024 rows a side, the parts are estimated on 1,024 of them. subsets, size: the figure is the mean
    over so many random subsets of so many rows (0: all rows), which scatters a little more than the whole does.
    """
    rng = np.random.default_rng(seed)
    x, y = (_take(side, _some(rng, len(side))) for side in (a, b))
    parts = Parts.of(kernel(x, x), kernel(y, y), kernel(x, y))
    whole = parts.variance(len(a), len(b))
    if not 0 < size < max(len(a), len(b)):
        return float(np.sqrt(whole))
    one = parts.variance(min(size, len(a)), min(size, len(b)))
    return float(np.sqrt(whole + max(0.0, one - whole) / subsets))


def change_error(
    a: Any, before: Any, after: Any, kernel: Kernel, *, seed: int, subsets: int = 1, size: int = 0
) -> float:
    """Standard error of MMD2(a, after) - MMD2(a, before), where before[i] and after[i] are of one input.

    The two share their inputs and `a`, so most of what scatters in each is not in their difference.
    """
    rng = np.random.default_rng(seed)
    x, places = _take(a, _some(rng, len(a))), _some(rng, len(before))
    y, z = (_take(side, places) for side in (before, after))
    parts = Parts.of(None, kernel(z, z) - kernel(y, y), kernel(x, z) - kernel(x, y))
    whole = parts.variance(len(a), len(before))
    if not 0 < size < max(len(a), len(before)):
        return float(np.sqrt(whole))
    one = parts.variance(min(size, len(a)), min(size, len(before)))
    return float(np.sqrt(whole + max(0.0, one - whole) / subsets))


@dataclass(frozen=True)
class Parts:
    """What the variance of an unbiased squared MMD consists of (Hoeffding, 1948; Serfling, 1980, section 5.2).

    Var = 4 x / n + 4 y / m + 2 xx / n^2 + 2 yy / m^2 + 4 xy / (n m) up to higher orders: `x`, `y` are the variances of
    the projections (the mean of the statistic's kernel given one row), `xx`, `yy`, `xy` those of the doubly centred
    kernels. The projections are estimated, and their own scatter is left in: that states up to sqrt(3) times the true
    error for equal distributions (as a bootstrap of rows does) and nearly the true one for distant ones. Taken out, the
    error is right on average but small just when the figure is small: of the 95 % intervals of two distributions that
    lie near each other, only 74 % covered the truth (benchmarks/metrics_bias.py).
    """

    x: float
    y: float
    xx: float
    yy: float
    xy: float

    @classmethod
    def of(cls, kernel_xx: np.ndarray | None, kernel_yy: np.ndarray, kernel_xy: np.ndarray) -> Parts:
        """From the kernels of n rows and m rows; None: the statistic has no such part. Clears the diagonals."""
        n, m = kernel_xy.shape
        rows, columns = kernel_xy.mean(axis=1), kernel_xy.mean(axis=0)
        centred = kernel_xy - rows[:, None] - columns + rows.mean()
        xy = float(np.square(centred).sum()) / max(1, (n - 1) * (m - 1))
        of_x, xx = (np.zeros(n), 0.0) if kernel_xx is None else _centred(kernel_xx)
        of_y, yy = _centred(kernel_yy)
        x, y = (float(np.var(side, ddof=1)) for side in (of_x - rows, of_y - columns))
        return cls(x, y, xx, yy, xy)

    def variance(self, n: int, m: int) -> float:
        """Of the statistic on n and m rows."""
        return 4 * self.x / n + 4 * self.y / m + 2 * self.xx / n**2 + 2 * self.yy / m**2 + 4 * self.xy / (n * m)


def _centred(kernel: np.ndarray) -> tuple[np.ndarray, float]:
    """Row means over the other rows, and the variance of the doubly centred kernel. Clears the diagonal."""
    n = len(kernel)
    np.fill_diagonal(kernel, 0.0)
    rows = kernel.sum(axis=1) / (n - 1)
    centred = kernel - rows[:, None] - rows + rows.mean()
    np.fill_diagonal(centred, 0.0)
    return rows, float(np.square(centred).sum()) / max(1, n * (n - 3))


def _some(rng: np.random.Generator, count: int) -> np.ndarray:
    """At most `_INTERVAL_IMAGES` row numbers."""
    return rng.choice(count, min(count, _INTERVAL_IMAGES), replace=False)


def _weights(draws: list[np.ndarray], rows: int) -> np.ndarray:
    """Drawn row numbers -> (draws, rows) with 1 where a row was drawn."""
    found = np.zeros((len(draws), rows))
    for weights, drawn in zip(found, draws, strict=True):
        weights[drawn] = 1.0
    return found


def _take(rows: Any, numbers: np.ndarray) -> np.ndarray:
    return (rows.take(numbers) if isinstance(rows, Rows) else rows[numbers]).astype(np.float64)


def _all(rows: Any) -> np.ndarray:
    return _take(rows, np.arange(len(rows)))
