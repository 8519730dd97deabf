"""An environment for each peer: out/peers/<peer>/venv with the versions of its requirements.txt, by uv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from peers.cases import ROOT

HERE = Path(__file__).resolve().parent
WORK = ROOT / "out" / "peers"
OWN = "edgegen"  # runs in the environment of this script


class CannotInstall(Exception):
    """A peer's environment cannot be made: a row of the table."""


def names() -> list[str]:
    """The peers: the folders with a peer.py."""
    return sorted(file.parent.name for file in HERE.glob("*/peer.py"))


def python(peer: str) -> Path:
    """The interpreter of a peer's environment, made when it is not there or when its requirements changed.

    Raises:
        CannotInstall: uv is not here, or a package cannot be had; the last words of uv.
    """
    if peer == OWN:
        return Path(sys.executable)
    folder, wanted = WORK / peer / "venv", HERE / peer / "requirements.txt"
    found, stamp = folder / "bin" / "python", WORK / peer / "installed.txt"
    if stamp.is_file() and found.exists() and stamp.read_text(encoding="utf-8") == wanted.read_text(encoding="utf-8"):
        return found
    stamp.unlink(missing_ok=True)
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        raise CannotInstall("uv is not here: pip install uv")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    _call([uv, "venv", "--quiet", "--python", version, str(folder)])
    _call([uv, "pip", "install", "--quiet", "--python", str(found), "-r", str(wanted)])
    stamp.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return found


def _call(command: list[str]) -> None:
    # Hard links into uv's cache: ten environments with torch in them take the room of one.
    environment = {**os.environ, "UV_LINK_MODE": "hardlink"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise CannotInstall(one_line(done.stderr) or f"uv ended with {done.returncode}")


def one_line(text: str, most: int = 300) -> str:
    """The end of a text as one line of a table: no line breaks, no bars, no addresses."""
    words = [word for word in text.replace("|", "/").split() if "://" not in word]
    joined = " ".join(words)
    return joined if len(joined) <= most else "... " + joined[-most:]
