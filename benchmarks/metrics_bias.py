"""How few images mislead: FID's bias by the number of images, and how often KID's interval covers the truth.

    python benchmarks/metrics_bias.py [--data mnist-test.npz] [--draws 100]

Draws of N rows, with replacement, from two populations of features of which everything is known, so the truth is exact:
FID of the populations' own moments, KID as the mean of the kernel over all pairs. Populations: made-up features (equal,
near, far), and the shipped MNIST encoder's features of real digits (--data) and of images of the built-in dcgan.
KID's interval is shown as it is, and with the scatter of the estimated projections taken out (see `_mmd.Parts`), which
is narrower and does not cover. Three minutes of one core; results/metrics-bias.json and .md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgegen import files
from edgegen.metrics import _mmd, fid, kid

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIGITS = ROOT.parent / "shared" / "assets" / "mnist-test.npz"
POPULATION, SEED = 8000, 0
FID_SIZES, KID_SIZES = (1000, 2000, 3000, 5000, 10000), (200, 500, 1000, 2000)
FID_DRAWS = 10


def made_up(seed: int, shift: float, width: int = 64) -> np.ndarray:
    """Rectified mixtures of 16 normal numbers, as pooled features of a ReLU network are: (POPULATION, width)."""
    rng = np.random.default_rng([SEED, seed])
    mix = np.random.default_rng([SEED, 99]).normal(size=(16, width)) / 4
    rows = rng.normal(size=(POPULATION, 16)) @ mix + 0.3 * rng.normal(size=(POPULATION, width)) + shift
    return np.maximum(rows, 0.0)


def digits(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features of real digits padded to 32 x 32, and of as many images of the built-in dcgan."""
    import torch

    from edgegen import loading
    from edgegen.nn.features import load_features

    features = load_features("mnist")
    with np.load(data, allow_pickle=False) as stored:
        x = stored["x"][:POPULATION]
    real = np.pad(x.reshape(len(x), 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2))).astype(np.float32) / 255
    generator = loading.load_model("dcgan").stage.module.eval()
    latents = np.random.default_rng(SEED).standard_normal((POPULATION, 64), dtype=np.float32)
    made = []
    with torch.inference_mode():
        for start in range(0, POPULATION, 200):
            images = generator(torch.from_numpy(latents[start : start + 200])).numpy()
            made.append(features((images + 1) / 2)[1])
    found = [features(real[i : i + 200])[1] for i in range(0, len(real), 200)]
    return np.concatenate(found).astype(np.float64), np.concatenate(made).astype(np.float64)


def true_kid(p: np.ndarray, q: np.ndarray) -> float:
    """Squared MMD of the populations: draws with replacement are independent, so equal rows count."""

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([kid.kernel(x[i : i + 500], y).mean() for i in range(0, len(x), 500)]))

    return mean(p, p) + mean(q, q) - 2 * mean(p, q)


def true_fid(p: np.ndarray, q: np.ndarray) -> float:
    """Frechet distance of the populations' own moments."""
    sides = [(x.mean(axis=0), np.cov(x, rowvar=False, ddof=0)) for x in (p, q)]
    return fid.frechet(*sides[0], *sides[1])


def drawn(p: np.ndarray, q: np.ndarray, n: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([SEED, n, number])
    return p[rng.integers(0, len(p), n)], q[rng.integers(0, len(q), n)]


def taken_out(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """The error with the scatter of the estimated projections taken out, which was tried and refused."""
    rng = np.random.default_rng(seed)
    x, y = (side[rng.choice(len(side), min(len(side), 1024), replace=False)] for side in (a, b))
    found = _mmd.Parts.of(kid.kernel(x, x), kid.kernel(y, y), kid.kernel(x, y))
    noise = (found.xx / len(x) + found.xy / len(y), found.yy / len(y) + found.xy / len(x))
    sides = (max(0.0, found.x - noise[0]), max(0.0, found.y - noise[1]))
    return float(np.sqrt(_mmd.Parts(*sides, found.xx, found.yy, found.xy).variance(len(a), len(b))))


def coverage(p: np.ndarray, q: np.ndarray, n: int, draws: int) -> dict[str, Any]:
    """How often the interval of KID covers the truth in repeated draws of n rows a side."""
    truth, size = true_kid(p, q), min(n, kid.SUBSET_SIZE)
    values, errors, tried = [], [], []
    for number in range(draws):
        a, b = drawn(p, q, n, number)
        values.append(np.mean(kid.subset_values(a, b, seed=number, subsets=kid.SUBSETS, size=size)))
        errors.append(kid.standard_error(a, b, seed=number, subsets=kid.SUBSETS, size=size))
        tried.append(taken_out(a, b, number))
    off = np.abs(np.array(values) - truth)
    return {
        "n": n,
        "draws": draws,
        "truth": truth,
        "mean": float(np.mean(values)),
        "scatter": float(np.std(values, ddof=1)),
        "error": float(np.mean(errors)),
        "error_tried": float(np.mean(tried)),
        "covered": float(np.mean(off <= 1.96 * np.array(errors))),
        "covered_tried": float(np.mean(off <= 1.96 * np.array(tried))),
    }


def bias(p: np.ndarray, q: np.ndarray, n: int) -> dict[str, Any]:
    """FID on n rows a side against its truth."""
    values = []
    for number in range(FID_DRAWS):
        sides = []
        for rows in drawn(p, q, n, number):
            sides.append((rows.mean(axis=0), np.cov(rows, rowvar=False)))
        values.append(fid.frechet(*sides[0], *sides[1]))
    truth = true_fid(p, q)
    return {"n": n, "draws": FID_DRAWS, "truth": truth, "mean": float(np.mean(values)),
            "scatter": float(np.std(values, ddof=1)), "bias": float(np.mean(values)) - truth}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = ["# FID's bias and KID's interval", "", "`python benchmarks/metrics_bias.py`", ""]
    lines += ["## FID: mean of the draws less the truth", "", "| features | N | truth | mean | bias | scatter |"]
    lines += ["|---|---|---|---|---|---|"]
    for case in result["cases"]:
        lines += [f"| {case['name']} | {r['n']} | {r['truth']:.4g} | {r['mean']:.4g} | {r['bias']:+.4f} |"
                  f" {r['scatter']:.4f} |" for r in case["fid"]]  # fmt: skip
    lines += ["", "## KID: how often the 95 % interval covers the truth", "",
              "| features | N | draws | truth | mean | scatter | error | covered | scatter taken out | covered |",
              "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for case in result["cases"]:
        lines += [f"| {case['name']} | {r['n']} | {r['draws']} | {r['truth']:.3g} | {r['mean']:.3g} |"
                  f" {r['scatter']:.3g} | {r['error']:.3g} | {r['covered']:.0%} | {r['error_tried']:.3g} |"
                  f" {r['covered_tried']:.0%} |" for r in case["kid"]]  # fmt: skip
    worst = min(r["covered"] for case in result["cases"] for r in case["kid"])
    lines += ["", f"Worst coverage of KID's interval: {worst:.0%} (asked: 90 %). {result['seconds']:.0f} s."]
    return "\n".join([*lines, *result["notes"]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DIGITS, help=".npz with x: 28 x 28 grey digits")
    parser.add_argument("--draws", type=int, default=80)
    parser.add_argument("--large", type=int, default=20, help="draws of 5,000 rows on the last case")
    arguments = parser.parse_args()
    began, notes = time.process_time(), []
    populations = {f"made up, {name}": (made_up(0, 0.0), made_up(side, shift))
                   for name, side, shift in (("equal", 0, 0.0), ("near", 1, 0.03), ("far", 1, 0.2))}  # fmt: skip
    if arguments.data.is_file():
        populations["digits and dcgan"] = digits(arguments.data)
    else:
        notes.append(f"Without digits: {arguments.data.name} is not here.")
    cases = []
    for name, (p, q) in populations.items():
        sizes = [(n, arguments.draws) for n in KID_SIZES]
        if name == list(populations)[-1] and arguments.large:
            sizes.append((5000, arguments.large))
        found = [coverage(p, q, n, draws) for n, draws in sizes]
        cases.append({"name": name, "fid": [bias(p, q, n) for n in FID_SIZES], "kid": found})
        print(name, [f"{r['n']}: {r['covered']:.0%}" for r in found], flush=True)
    result = {"cases": cases, "seed": SEED, "notes": notes, "seconds": time.process_time() - began}
    files.write_json(RESULTS / "metrics-bias.json", result)
    files.write_text(RESULTS / "metrics-bias.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
