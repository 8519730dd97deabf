"""What users write after --device: `local`, `ssh://user@host[:port]`, `adb[:serial]`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgegen import errors, registry
from edgegen.devices._shell import Device, Options

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_SSH = re.compile(rf"ssh://(?:(?P<user>{_NAME})@)?(?P<host>{_NAME}|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(?P<port>\d{{1,5}}))?")
_ADB = re.compile(r"adb(?::(?P<serial>[A-Za-z0-9_][A-Za-z0-9_.:-]*))?")
DEFAULTS = Options()
ALLOWED = "local, ssh://user@host[:port] or adb[:serial]"


@dataclass(frozen=True)
class Spec:
    """A parsed device. kind: file name under devices/. port 0: the user's ssh configuration says."""

    text: str
    kind: str
    user: str = ""
    host: str = ""
    port: int = 0
    serial: str = ""


def parse(text: str) -> Spec:
    """The parts of a device's name.

    Raises:
        UsageError: not one of the three forms; names them.
    """
    if text == "local":
        return Spec(text, "local")
    if found := _SSH.fullmatch(text):
        port = int(found["port"] or 0)
        if found["port"] is None or 0 < port < 65536:
            return Spec(text, "ssh", found["user"] or "", found["host"].strip("[]"), port)
    if found := _ADB.fullmatch(text):
        return Spec(text, "adb", serial=found["serial"] or "")
    raise errors.UsageError(f"device must be {ALLOWED}, got {text!r}")


@contextmanager
def open_device(text: str, options: Options = DEFAULTS) -> Iterator[Device]:
    """Connect to a device: `with open_device("ssh://pi@board") as device: device.probe()`.

    Raises:
        UsageError: not a device's name. TargetUnavailable: it cannot be reached; says why and what to do.
    """
    spec = parse(text)
    with registry.module("devices", spec.kind).connect(spec, options) as device:
        yield device
