"""This host: what it is, what state it is in, and as a device to measure on.

Facts come from /proc and /sys where there are any, else from Python's platform module; what cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen import files

if TYPE_CHECKING:
    from edgegen.devices._shell import Device, Options
    from edgegen.devices._spec import Spec

# What decides which precisions are fast, by Linux's names; processors of one name differ in them.
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
                "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


@contextlib.contextmanager
def connect(spec: Spec, options: Options) -> Iterator[Device]:
    """This host as a device: its own shell and, unless another is named, the Python that runs now."""
    from edgegen.devices._shell import Device

    yield Device(
        spec.text,
        lambda script: ["sh", "-c", script],
        lambda done: "",
        folder=shlex.quote(options.folder or str(files.cache_folder() / "device")),
        python=options.python or sys.executable,
    )


def probe() -> dict[str, Any]:
    """Facts of this host: cpu_model, cores, memory_bytes, os, python; when readable instructions, governor, mhz, load.

    instructions: those of INSTRUCTIONS that the processor has. cores: those that this process may use. mhz: present
    clock of the first core. load: processes running or waiting to run, mean of the last minute.
    """
    facts: dict[str, Any] = {
        "cpu_model": cpu_model(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if found := [name for name in INSTRUCTIONS if name in cpu_flags()]:
        facts["instructions"] = " ".join(found)
    if governor := _read(_CPUFREQ / "scaling_governor"):
        facts["governor"] = governor
    if mhz := _mhz():
        facts["mhz"] = mhz
    with contextlib.suppress(OSError, AttributeError):
        facts["load"] = round(os.getloadavg()[0], 2)
    return facts


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction set flags as Linux names them, such as avx512_vnni; empty where there is no /proc/cpuinfo."""
    for name in ("flags", "Features"):  # x86 and Arm
        if words := _cpuinfo(name):
            return frozenset(words.split())
    return frozenset()


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or _cpuinfo("Model") or platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of this host or of its control group, whichever is less, in bytes; 0 when unknown."""
    sizes = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    if limit.isdigit():
        sizes.append(int(limit))
    return min(sizes, default=0)


def _mhz() -> float:
    khz = _read(_CPUFREQ / "scaling_cur_freq")
    with contextlib.suppress(ValueError):
        return int(khz) / 1000 if khz else float(_cpuinfo("cpu MHz"))
    return 0.0


def _cpuinfo(name: str) -> str:
    """The first value of `name` in /proc/cpuinfo, or an empty string."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(file: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").strip()
    return ""
