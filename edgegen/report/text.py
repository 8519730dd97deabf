"""Numbers as people read them; the same text in the page and in the terminal."""

from __future__ import annotations

from typing import Any

NOT_MEASURED = "not measured"
INT8_SHARES = (("int8_weight_share", "weights in INT8 or less"), ("int8_macs_share", "MACs in INT8"))
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_WORDS = {
    "value_range": "value range", "sha256": "SHA-256", "weights_sha256": "weights SHA-256",
    "weights sha256": "weights SHA-256", "macs": "MACs",
    "params": "parameters", "nfe": "runs of the network for an image", "cpu_model": "processor", "os": "system",
    "io": "", "load": "load before the run", "mhz": "clock",
}  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without exponent: 0.000512, 2.39, 48.2, 12,345."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10**digits:
        return f"{value:,.0f}"
    places = 0
    while size < 10 ** (digits - 1) and places < 12:
        size, places = size * 10, places + 1
    return f"{value:.{places}f}"


def count(value: int | None) -> str:
    """1.37 M, 2.15 G, 812."""
    if value is None:
        return NOT_MEASURED
    for factor, suffix in _UNITS:
        if value >= factor:
            return f"{number(value / factor)} {suffix}"
    return str(value)


def size(value: int | None) -> str:
    """Bytes in decimal units: 812 B, 1.37 MB."""
    if value is None:
        return NOT_MEASURED
    return f"{value} B" if value < 1000 else count(value) + "B"


def share(value: float | None) -> str:
    """0.9731 as 97.3%; only an exact 0 or 1 is shown as 0% or 100%."""
    if value is None:
        return NOT_MEASURED
    if value in (0, 1):
        return f"{value * 100:.0f}%"
    return f"{min(max(value * 100, 0.1), 99.9):.1f}%"


def percent_less(before: float | None, after: float | None) -> str:
    """The change from `before` to `after` as "42% less", "1.5x less" from a factor of two on, "same", "7% more"."""
    if not before or after is None:
        return ""
    if after == before:
        return "same"
    if after > before:
        return f"{(after / before - 1) * 100:.0f}% more" if after < 2 * before else f"{number(after / before)}x more"
    if after and before / after >= 2:
        return f"{number(before / after)}x less"
    return f"{(1 - after / before) * 100:.1f}% less"


def speed(ratio: dict[str, Any] | None) -> str:
    """A latency ratio (after / before) in words: 0.47 is "2.13x faster", 1.2 is "1.20x slower".

    An estimate is "predicted 2.13x": only what was measured is faster.
    """
    if ratio is None or ratio["value"] is None or ratio["value"] <= 0:
        return ""
    value = ratio["value"]
    if ratio["status"] != "measured":
        return f"predicted {number(1 / value)}x"
    if "1.00" in (number(value), number(1 / value)):
        return "same speed"
    return f"{number(1 / value)}x faster" if value < 1 else f"{number(value)}x slower"


def seconds(value: float | None) -> str:
    """41 s, 3 min 5 s, 2 h 1 min."""
    if value is None:
        return ""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if value < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figure(value: dict[str, Any] | None) -> str:
    """A figure's value with its unit, "about" before an estimate, "not measured" where there is none."""
    if value is None or value["value"] is None:
        return NOT_MEASURED
    about, unit = "about " if value["status"] == "estimated" else "", value["unit"]
    if unit == "share":
        return f"{about}{_percent(value['value'])}"
    gap, unit = "" if unit in ("", "%", "x", "1/s") else " ", unit.removeprefix("1")
    return f"{about}{number(value['value'], _digits(value['unit']))}{gap}{unit}"


def interval(value: dict[str, Any] | None) -> str:
    """The interval as "2.31 to 2.45", or an empty string."""
    if value is None or value["interval"] is None:
        return ""
    unit = value["unit"]
    low, high = (_percent(end) if unit == "share" else number(end, _digits(unit)) for end in value["interval"])
    return f"{low} to {high}"


def difference(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """How far a figure moved: "0.28 dB lower", "1.2 points higher" (percentages, shares), "same"; '' without either."""
    if before is None or after is None or before["value"] is None or after["value"] is None:
        return ""
    gap = (after["value"] - before["value"]) * (100 if after["unit"] == "share" else 1)
    unit = {"": "", "%": " points", "share": " points"}.get(after["unit"], f" {after['unit']}")
    return "same" if gap == 0 else f"{number(abs(gap), 2)}{unit} {'higher' if gap > 0 else 'lower'}"


def difference_span(ends: tuple[float, float], unit: str) -> str:
    """Between what and what a figure moved: "0.03 to 0.19 dB lower", "0.2 points lower to 0.1 points higher"."""
    low, high = (end * (100 if unit == "share" else 1) for end in ends)
    name = {"": "", "%": " points", "share": " points"}.get(unit, f" {unit}")
    if low * high > 0:
        near, far = sorted((abs(low), abs(high)))
        return f"{number(near, 2)} to {number(far, 2)}{name} {'higher' if low > 0 else 'lower'}"
    return f"{number(-low, 2)}{name} lower to {number(high, 2)}{name} higher"


def _percent(value: float) -> str:
    """A share (0..1) in percent, to the hundredth of a point: that much may decide."""
    return f"{number(100 * value, 4)}%"


def _trim(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _digits(unit: str) -> int:
    # a tenth of a dB or of a point decides, so these are told apart to the second decimal
    return 4 if unit in ("dB", "%") else 3


def plain(value: Any) -> str:
    """Any option or fact as one line: floats shortened, lists joined, dicts as "key value"."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _trim(number(value, 4))
    if isinstance(value, dict):
        return ", ".join(f"{words(key)} {plain(item)}".strip() for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def notes(figures: dict[str, Any]) -> str:
    """What a pass reported, as a line: "MACs 2.69 G to 702 M, loss 0.0106 to 0.00265, took 1 min 36 s"."""
    parts = []
    for key, value in figures.items():
        stem, _, end = key.rpartition("_")
        later = next((stem + name for name in ("_after", "_last", "") if stem + name in figures), "")
        if value == "" or value in ({}, [], None) or (end in ("after", "last") and f"{stem}_{_FIRST[end]}" in figures):
            continue
        if key == "from":
            parts.append(f"taken from the {value} of finished steps")
        elif key == "seconds":
            parts.append(f"took {seconds(value)}")
        elif end in _FIRST.values() and later:
            parts.append(f"{words(stem)} {_short(value)} to {_short(figures[later])}")
        elif f"{key}_before" not in figures:
            parts.append(f"{words(key)} {_short(value)}")
    return ", ".join(parts)


_FIRST = {"after": "before", "last": "first"}


def _short(value: Any) -> str:
    large = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000
    return count(value) if large else plain(value)


def words(key: str) -> str:
    """A key as words: max_latency_ms -> max latency ms."""
    return _WORDS.get(key, key.replace("_", " "))
