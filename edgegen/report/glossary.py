"""The words of a report: what its terms mean, and its reasons without the long names of builds."""

from __future__ import annotations

import re
from html import escape
from typing import Any

Report = dict[str, Any]

_ALWAYS = {
    "baseline": "the best unquantized build of the original network on this target: what there is without edgegen",
    "p50, p90, p99": "the time that half, 90% and 99% of the runs stay below; p50 is the median",
    "ratio": "the latency divided by the baseline's, from runs in turns: 0.25 is four times as fast",
    "95% a to b": "the interval that the measurement leaves for the figure, by bootstrap; n is the number of samples",
    "MACs": "multiply-accumulates of one run: the work, whatever the device",
    "INT8, BF16, FP16, FP32": "numbers of 8, 16, 16 and 32 bits; narrower ones are smaller and may take less time",
    "teacher, student": "the network as it was given, and the result",
    "kept, undone": "a step stays only where it pays on this target inside the limits; else the network goes back",
}
_FIGURES = {
    "top-1": "share of the images whose most likely class is the right one",
    "agreement": "share of the images on which student and teacher name the same class",
    "PSNR to the reference": "closeness to the true images, in dB; more is better",
    "luminance PSNR to the reference": "closeness to the true images in brightness alone, in dB; more is better",
    "PSNR to the teacher": "closeness to what the original network gives, in dB; more is better",
    "SSIM to the reference": "likeness of structure to the true images, 1 is the same",
    "SSIM to the teacher": "likeness of structure to what the original network gives, 1 is the same",
    "perceptual distance to the teacher": "distance of the features of an image network; 0 is the same",
    "KID": "distance between the features of made and of real images as two crowds; less is better; chance may take"
    " it a little below 0",
    "KID change from the teacher": "how much farther the student's images are than the teacher's, from the same noise",
    "bad images": "share of the images that are black, flat or not finite where the teacher's are not",
    "brightness shift from the teacher": "how much lighter (above 0) or darker the images are, in steps of 255",
    "colour shift from the teacher": "how far the mean colour of the images moved, in steps of 255",
    "FID": "distance between the features of made and of real images as two crowds; less is better",
}


def meanings(report: Report) -> dict[str, str]:
    """Term -> what it means, of the terms that this report uses."""
    figures = [one["name"] for side in ("baseline", "result") for one in report[side]["quality"]]
    return _ALWAYS | {name: _FIGURES[name] for name in dict.fromkeys(figures) if name in _FIGURES}


def plainly(reason: str, report: Report, row: Report | None = None) -> str:
    """A reason with "the baseline" in the place of its label, and in the row of a build "the chosen build" too.

    row: the build whose reason it is; its own label need not be said again.
    """
    own = row["label"] if row is not None else ""
    short = own.partition(": ")[2]
    while short and reason.startswith(f"{short}: "):
        reason = reason.removeprefix(f"{short}: ")
    names = {report["result"]["label"]: "the chosen build"} if row is not None else {}
    names |= {report["baseline"]["label"]: "the baseline"}
    labels = {*names, *(row["label"] for row in report["candidates"])} - {own}
    if not all(len(label) > 3 and ": " in label for label in names):  # a label that may be a word of a sentence
        return reason
    # the longest first: a label may begin with another one
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    return re.sub(pattern, lambda found: names.get(found[0], found[0]), reason) if pattern else reason


def section(report: Report) -> str:
    """The meanings as a closed list."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in meanings(report).items())
    return f'<details><summary>What the words mean</summary><dl class="lines">{rows}</dl></details>'
