"""House rules that a machine can check: layers as docs/design.md lists them, light imports, banned statements."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "edgegen"
HEAVY = ("torch", "openvino", "onnxruntime", "nncf", "timm")
LIGHT = ("edgegen", "edgegen.types", "edgegen.errors", "edgegen.registry", "edgegen.targets", "edgegen.measuring",
         "edgegen.worker", "edgegen.estimate")
PRINTERS = ("cli", "cli_compress", "cli_export", "cli_lint", "cli_device", "cli_doctor", "cli_train", "worker",
            "report")
RUNNER = "_runner.py"  # runs on the device as a program of its own

Place = tuple[int, str]  # layer, room: modules of one room may import each other


def layers(text: str) -> dict[str, Place]:
    """Module or folder -> its place, from the layer table of docs/design.md.

    An entry is `name` or `folder/`; modules named in backticks after "(with" share its room.
    """
    places: dict[str, Place] = {}
    for row in re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE):
        layer, entries = int(row[0]), row[1]
        for name, note in re.findall(r"`([\w/]+)`(?: \(([^)]*)\))?", entries):
            mates = re.findall(r"`(\w+)`", note.split(":")[0]) if note.startswith("with") else []
            for module in (name.rstrip("/"), *mates):
                places[module] = (layer, name.rstrip("/"))
    return places


def imported(tree: ast.AST) -> set[str]:
    """Names of edgegen's modules and folders that a module imports anywhere, such as {"errors", "devices"}."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "edgegen":
            found |= {f"edgegen.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    tops = {name.split(".")[1] for name in found if name.startswith("edgegen.")}
    return {top for top in tops if (PACKAGE / top).is_dir() or (PACKAGE / f"{top}.py").is_file()}


def breaches(module: str, tree: ast.AST, places: dict[str, Place]) -> list[str]:
    """What a module (or a file of the folder `module`) imports and must not."""
    if module not in places:
        return [f"{module} has no layer in docs/design.md"]
    layer, room = places[module]
    return [
        f"{module} (layer {layer}) imports {other} (layer {places.get(other, ('unknown',))[0]})"
        for other in sorted(imported(tree))
        if other not in places or not (places[other][0] < layer or places[other][1] == room)
    ]


def banned(module: str, tree: ast.AST) -> list[str]:
    """Lines with assert, a bare except, a relative import, or a print outside the modules that may print."""
    found = []
    for node in ast.walk(tree):
        what = ""
        if isinstance(node, ast.Assert):
            what = "assert"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            what = "bare except"
        elif isinstance(node, ast.ImportFrom) and node.level:
            what = "relative import"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            what = "" if module in PRINTERS else "print"
        if what:
            found.append(f"{what} in line {node.lineno}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
PLACES = layers((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def top(file: Path) -> str:
    """The module, or the folder of a file in a folder."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_import_only_from_lower_layers(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if top(file) == "__init__":
        assert imported(tree) == {"api"}, "for type checkers; at run time when first asked for"
    else:
        assert breaches(top(file), tree, PLACES) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_asserts_hides_errors_or_prints(file: Path) -> None:
    module = "worker" if file.name == RUNNER else top(file)
    assert banned(module, ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


TABLE = """
| layer | modules |
|---|---|
| 0 | `errors` |
| 1 | `types`, `data` (with `images`: `Model` in), `graph` (MACs) |
| 3 | `passes/`, `runtimes/` |
"""


def test_the_table_is_read_with_its_rooms() -> None:
    assert layers(TABLE) == {
        "errors": (0, "errors"), "types": (1, "types"), "data": (1, "data"), "images": (1, "data"),
        "graph": (1, "graph"), "passes": (3, "passes"), "runtimes": (3, "runtimes"),
    }


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("graph", "from edgegen.types import Model", ["graph (layer 1) imports types (layer 1)"]),
        ("graph", "from edgegen import errors", []),
        ("data", "from edgegen.images import decode", []),
        ("types", "def f():\n    from edgegen.passes.x import y", ["types (layer 1) imports passes (layer 3)"]),
        ("passes", "import edgegen.runtimes.openvino", ["passes (layer 3) imports runtimes (layer 3)"]),
        ("passes", "from edgegen.passes import _coupling\nfrom edgegen import __version__, graph", []),
        ("unheard", "", ["unheard has no layer in docs/design.md"]),
    ],
)
def test_a_breach_is_seen_wherever_the_import_stands(module: str, code: str, wrong: list[str]) -> None:
    assert breaches(module, ast.parse(code), layers(TABLE)) == wrong


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("graph", "assert x", ["assert in line 1"]),
        ("graph", "try:\n    f()\nexcept:\n    g()", ["bare except in line 3"]),
        ("graph", "print(1)", ["print in line 1"]),
        ("graph", "from . import x", ["relative import in line 1"]),
        ("cli", "print(1)", []),
    ],
)
def test_banned_statements_are_seen(module: str, code: str, wrong: list[str]) -> None:
    assert banned(module, ast.parse(code)) == wrong
