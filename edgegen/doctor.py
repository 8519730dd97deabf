"""What works on this machine and on a device, what is missing, and the exact line that mends it."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import __version__, registry
from edgegen.devices import local

TABLE = Path(__file__).with_name("tested.toml")
_TEGRA = Path("/etc/nv_tegra_release")
_VERSION = Callable[[str], str | None]


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: "works", "note" (works, with a remark), "missing" or "broken". cure: a command."""

    what: str
    state: str
    text: str
    cure: str = ""


def examine() -> list[Finding]:
    """Everything about this machine, broken things first inside each part."""
    facts = local.probe()
    host = f"{facts['cpu_model']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, {facts['os']}"
    host += f"; {told}" if (told := facts.get("instructions")) else ""
    found = [Finding("host", "works", host), Finding("edgegen", "works", f"{__version__} on Python {facts['python']}")]
    table = registry.load_toml(TABLE)
    found += rivals(owners())
    found += runtimes()
    found += versions(table["packages"], installed)
    found += tegra(_TEGRA.is_file(), platform.machine(), ctypes.util.find_library)
    return found


def installed(package: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def owners() -> dict[str, list[str]]:
    """Module -> distributions that install it."""
    return {module: sorted(set(names)) for module, names in importlib.metadata.packages_distributions().items()}


def rivals(found: Mapping[str, list[str]]) -> list[Finding]:
    """Modules that two distributions own: the later one overwrote files of the other, and neither is whole.

    onnxruntime and onnxruntime-gpu are the usual pair (microsoft/Olive#557).
    """
    broken = []
    for module, known in registry.load_toml(TABLE)["rivals"].items():
        both = [name for name in found.get(module, []) if name in known]
        if len(both) > 1:
            text = f"{' and '.join(both)} both install the module {module} and overwrite each other"
            cure = f"pip uninstall -y {' '.join(both)} && pip install {both[-1]}"
            broken.append(Finding(module, "broken", text, cure))
    return broken


def runtimes() -> list[Finding]:
    """For each runtime: builds and runs here, builds only, or neither and why."""
    found = []
    for name in registry.names("runtimes"):
        module = registry.module("runtimes", name)
        cannot_run = module.missing()
        cannot_build = getattr(module, "cannot_build", module.missing)()
        if cannot_build:
            found.append(Finding(name, "missing", cannot_build.partition(": pip")[0], _command(cannot_build)))
        elif cannot_run:
            found.append(Finding(name, "note", f"builds here; {cannot_run}"))
        else:
            found.append(Finding(name, "works", "builds and runs here"))
    return found


def _command(reason: str) -> str:
    found = re.search(r"pip install .*", reason)
    return found[0] if found else ""


def versions(table: Mapping[str, Iterable[str]], version: _VERSION) -> list[Finding]:
    """Installed versions beside the tested ones; another one is a note, with the path that it affects."""
    found = []
    for package, (tested, used_for) in table.items():
        have = version(package)
        if have is None:
            continue
        same = have.split("+")[0] == tested
        said = "the tested version" if same else f"tested with {tested}; used for {used_for}: its numeric checks decide"
        found.append(Finding(package, "works" if same else "note", f"{have}, {said}"))
    return found


def tegra(is_jetson: bool, machine: str, find: Callable[[str], str | None]) -> list[Finding]:
    """On a Jetson: whether TensorRT's DLA library is there, without which `import tensorrt` fails."""
    if not is_jetson or machine != "aarch64":
        return []
    if find("nvdla_compiler"):
        return [Finding("libnvdla_compiler.so", "works", "found")]
    text = "not found: `import tensorrt` fails without it (JetPack 7.2 containers and thin board packages)"
    cure = "sudo apt-get install -y nvidia-l4t-dla-compiler && sudo ldconfig"
    return [Finding("libnvdla_compiler.so", "broken", text, cure)]


def of_device(facts: Mapping[str, Any]) -> list[Finding]:
    """What a probe of a device tells, in the same form."""
    return [
        Finding(str(name), "works", str(value)) for name, value in facts.items() if value not in (None, "", [], {})
    ]
