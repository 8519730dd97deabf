"""An Android device reached by `adb`, over USB or the network. Its folder is /data/local/tmp/edgegen."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgegen import errors
from edgegen.devices._shell import Device, Done, Options

if TYPE_CHECKING:
    from edgegen.devices._spec import Spec

_FOLDER = "/data/local/tmp/edgegen"
_REASONS = (
    (r"no devices/emulators found", "no device: plug one in and allow USB debugging on it (adb devices lists them)"),
    (r"device '?[^\n]*'? not found", "no device with this serial number (adb devices lists them)"),
    (r"more than one device", "more than one device: name one, adb:SERIAL (adb devices lists them)"),
    (r"unauthorized", "the device does not trust this computer: allow USB debugging on its screen"),
    (r"device offline|error: closed|protocol fault|connect failed|no response|device still authorizing",
     "the connection was cut"),
    (r"failed to (?:start|check server)|cannot connect to daemon", "the adb server does not start here: {words}"),
)  # fmt: skip


@contextmanager
def connect(spec: Spec, options: Options) -> Iterator[Device]:
    """A connected device.

    Raises:
        TargetUnavailable: adb is not installed, or it sees no such device.
    """
    base = ["adb", *(["-s", spec.serial] if spec.serial else [])]
    yield Device(
        spec.text,
        lambda script: [*base, "shell", "-T", script],
        explain,
        folder=shlex.quote(options.folder or _FOLDER),
        send=lambda device, file, name: _push(base, device, file, name),
        python=options.python,
    )


def _push(base: list[str], device: Device, file: Path, name: str) -> Done:
    """`adb push` is the fast way; the file gets its name when it is whole."""
    place = f"{device.folder}/{name}"
    quoted, part = shlex.quote(place), shlex.quote(f"{place}.part")
    device.must(f'mkdir -p "$(dirname {quoted})"', "make a folder")
    told = subprocess.run([*base, "push", str(file), f"{place}.part"], capture_output=True, check=False)
    done = Done(told.returncode, b"", told.stderr.decode(errors="replace"))
    if why := explain(done):
        raise errors.TargetUnavailable(f"{device.name}: {why}")
    if done.code != 0:
        device.shell(f"rm -f {part}")
        return done
    return device.shell(f"mv {part} {quoted}")


def explain(done: Done) -> str:
    """Why adb failed, in one line; "" when it did not, or when the command on the device did."""
    lines = [line.strip() for line in done.err.splitlines() if re.match(r"(adb|error|\* failed)", line.strip())]
    if done.code == 0 or not lines:
        return ""
    for pattern, reason in _REASONS:
        if re.search(pattern, done.err):
            return reason.format(words=lines[-1])
    return ""
