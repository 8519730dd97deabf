"""What is installed: requirements that replace nothing, pinned versions, a wheel with every file, make targets."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
CORE: list[str] = PROJECT["project"]["dependencies"]
# import name -> distribution name, where they differ
DISTRIBUTIONS = {
    "onnx_ir": "onnx-ir",
    "google": "onnx",  # google.protobuf, which onnx requires
    "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "torch_pruning": "torch-pruning",
    "torch_fidelity": "torch-fidelity", "litert_converter": "litert-torch",
    "threadpoolctl": "scikit-learn", "markupsafe": "jinja2",
}  # fmt: skip
# torchvision asks for one exact torch; whatever asks for torchvision may bring another torch along
NEED_TORCHVISION = {"torchvision", "timm", "torch-fidelity"}
DATA_FOLDERS = ("targets", "calibration")


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return found[0].lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def shipped() -> set[str]:
    """Every file that a wheel must hold, as its path there; caches and private notes of editors are not."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "edgegen", *DATA_FOLDERS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    files = {f for f in listed if (ROOT / f).is_file()}
    return {f if f.startswith("edgegen/") else f"edgegen/{f}" for f in files}


def test_nothing_that_is_there_is_replaced() -> None:
    for requirement in [r for group in EXTRAS.values() for r in group] + CORE:
        assert "==" not in requirement
        assert "<" not in requirement, "an upper bound downgrades what is there"
        if name_of(requirement) in ("torch", "onnxruntime"):
            assert requirement == name_of(requirement), "any bound replaces a vendor's build that lies outside of it"
    assert not NEED_TORCHVISION & {name_of(r) for extra in ("torch", "onnxruntime", "openvino") for r in EXTRAS[extra]}


def test_the_core_is_small() -> None:
    assert {name_of(r) for r in CORE} == {"numpy", "onnx", "pydantic", "typer", "rich", "safetensors", "jinja2"}


def test_all_holds_every_extra_for_users() -> None:
    assert len(EXTRAS["all"]) == 1
    held = set(EXTRAS["all"][0].removeprefix("edgegen[").removesuffix("]").split(","))
    assert held == set(EXTRAS) - {"all", "test", "dev", "docs"}


def test_constraints_pin_every_requirement_exactly() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "@" not in text
    assert "edgegen==" not in text
    found = pins()
    names = [name.lower() for name in found]
    assert names == sorted(names)
    for requirement in [r for group in EXTRAS.values() for r in group] + CORE:
        name = name_of(requirement)
        if name != "edgegen":
            assert name in found, f"{requirement} has no pin"
            if ">=" in requirement:
                low = requirement.split(">=")[1]
                assert numbers(found[name]) >= numbers(low), f"{name} {found[name]} is below {low}"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def imported(file: Path) -> set[str]:
    """Top-level names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_import_is_a_requirement() -> None:
    allowed = {name_of(r) for group in [*EXTRAS.values(), CORE] for r in group}
    for file in sorted((ROOT / "edgegen").rglob("*.py")):
        for name in imported(file) - set(sys.stdlib_module_names) - {"edgegen"}:
            wanted = {DISTRIBUTIONS.get(name, name), name.replace("_", "-")}
            assert wanted & allowed, f"{file.relative_to(ROOT)} imports {name}: in no extra"


def test_the_import_check_sees_nested_imports(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def f():\n    import secret.thing\n    from other.x import y\n")
    assert imported(tmp_path / "m.py") == {"secret", "other"}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {p.parent for p in (ROOT / "edgegen").rglob("*.py")}
    folders |= {ROOT / "edgegen" / name for name in ("recipes", "spaces")}
    names = {".".join(p.relative_to(ROOT).parts) for p in folders} | {f"edgegen.{name}" for name in DATA_FOLDERS}
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(names) == packages, "sorted, without repeats"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder is left here."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is too old to build the wheel here")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"):
        shutil.copy(ROOT / file, copy)
    for folder in ("edgegen", *DATA_FOLDERS):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.glob("edgegen-*.whl")
    return built


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {n for n in names if n.startswith("edgegen/")} >= shipped()
    licences = {n.rsplit("/", 1)[-1] for n in names if "/licenses/" in n}
    assert licences == {"LICENSE", "THIRD_PARTY.md"}
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"edgegen"}, "nothing beside the package"


def test_the_wheel_works_with_the_core_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    extras = {name_of(r) for extra in EXTRAS.values() for r in extra} - {"edgegen"} | NEED_TORCHVISION
    blocked = extras | {short for short, long in DISTRIBUTIONS.items() if long in extras}
    code = (
        f"import sys\nblocked = {sorted(blocked)!r}\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "hide = lambda name, *rest: None if name.split('.')[0] in blocked else find(name, *rest)\n"
        "PathFinder.find_spec = staticmethod(hide)\n"
        "import edgegen, edgegen.types, edgegen.checking, edgegen.report.html, edgegen.report.terminal\n"
        "from edgegen import cli, registry\n"
        f"assert edgegen.__file__.startswith({str(tmp_path)!r}), edgegen.__file__\n"
        f"for kind in registry.KINDS: print(kind, *registry.names(kind))\n"
        "def call(*arguments):\n"
        "    sys.argv = ['edgegen', *arguments]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "call('--help')\n"
        "call('compress', '--model', 'edsr')\n"
        "call('verify', 'nowhere')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in ("targets android", "calibration digits", "recipes balanced", "compress", "verify"):
        assert expected in done.stdout
    assert re.findall(r"exit (\d)", done.stdout) == ["0", "2", "2"]
    wanted, unknown = done.stderr.splitlines()
    assert wanted == "edgegen: torch is not installed; it is needed to compress: pip install 'edgegen[torch]'"
    assert "nowhere" in unknown


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # an outer make hands its flags down; they are not part of what is tested
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_says_when_python_is_too_old_or_has_no_venv(checkout: Path) -> None:
    old = checkout / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    bare = checkout / "bare-python"
    bare.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 0;; *) exit 1;; esac\n')
    for file in (old, bare):
        file.chmod(0o755)
    done = make(checkout, "demo", f"PYTHON={old}")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert "is Python 3.9.2." in done.stderr
    done = make(checkout, "demo", f"PYTHON={bare}")
    assert done.returncode == 2
    assert "has no venv module" in done.stderr
    assert not (checkout / ".venv").exists()


def test_the_second_make_installs_nothing(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    done = make(checkout, "-n", "demo")
    assert "edgegen compress" in done.stdout
    assert "install" not in done.stdout
    later = (checkout / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert "uv pip install" in make(checkout, "-n", "test").stdout


@pytest.mark.parametrize("name", ["run", "setup"])
def test_ci_scripts_are_bash_and_executable(name: str) -> None:
    script = ROOT / ".ci" / name
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
