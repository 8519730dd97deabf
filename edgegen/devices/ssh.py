"""A device reached by OpenSSH's own client, with the user's keys and configuration. It never asks anything."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgegen.devices._shell import Device, Done, Options

if TYPE_CHECKING:
    from edgegen.devices._spec import Spec

_FAILED = 255  # what ssh exits with when it, and not the remote command, failed
_FOLDER = '"${XDG_CACHE_HOME:-$HOME/.cache}/edgegen-device"'
_REASONS = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is not the one in known_hosts: somebody may be "
     "listening, or the device was installed anew (then: ssh-keygen -R {known}, and connect once by hand)"),
    (r"Host key verification failed|host key is known for", "its host key is not known here: connect once by hand "
     "(ssh {dest}), compare the fingerprint, and try again"),
    (r"Permission denied|Too many authentication failures|no more authentication methods", "refused the login: no key "
     "of yours is accepted there, and passwords are not asked for (ssh-copy-id {dest})"),
    (r"Connection refused", "connection refused: no ssh server listens there"),
    (r"Could not resolve hostname|Name or service not known", "no such host name"),
    (r"timed out|No route to host|Network is unreachable", "cannot be reached: it is off, or on another network"),
    (r"closed by|reset by|Broken pipe|Connection closed|not responding|disconnect|mux_client|kex_exchange",
     "the connection was cut"),
    (r"Bad configuration option|Can't open user config|terminating, \d+ bad|no argument after keyword",
     "ssh cannot read its configuration: {words}"),
)  # fmt: skip


@contextmanager
def connect(spec: Spec, options: Options) -> Iterator[Device]:
    """A connected device; one connection carries all commands.

    Raises:
        TargetUnavailable: no connection; says why.
    """
    with tempfile.TemporaryDirectory(prefix="eg-") as folder:  # short: a socket's path has 100 characters at most
        base = _command(spec, options, Path(folder) / "s")
        try:
            yield Device(
                spec.text,
                lambda script: [*base, f"sh -c {shlex.quote(script)}"],
                lambda done: explain(spec, done),
                folder=shlex.quote(options.folder) if options.folder else _FOLDER,
                python=options.python,
            )
        finally:
            subprocess.run([*base[:-1], "-O", "exit", base[-1]], capture_output=True, check=False)


def _command(spec: Spec, options: Options, socket: Path) -> list[str]:
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": "15",
        "ServerAliveInterval": "5",  # a dead network is noticed after 20 s
        "ServerAliveCountMax": "4",
        "ControlMaster": "auto",
        "ControlPersist": "60",
        "ControlPath": str(socket),
        "LogLevel": "ERROR",
        "ForwardAgent": "no",
        "ForwardX11": "no",
    }
    return [
        "ssh",
        *(["-F", str(options.ssh_config)] if options.ssh_config else []),
        *(part for key, value in settings.items() for part in ("-o", f"{key}={value}")),
        *(["-p", str(spec.port)] if spec.port else []),
        *(["-l", spec.user] if spec.user else []),
        "-T",
        spec.host,
    ]


def explain(spec: Spec, done: Done) -> str:
    """Why the connection failed, in one line; "" when it did not."""
    if done.code != _FAILED:
        return ""
    dest = " ".join(filter(None, (f"-p {spec.port}" if spec.port else "", f"{spec.user}@{spec.host}".lstrip("@"))))
    known = shlex.quote(f"[{spec.host}]:{spec.port}" if spec.port not in (0, 22) else spec.host)
    words = next((line.strip() for line in reversed(done.err.splitlines()) if line.strip()), "the connection was cut")
    for pattern, reason in _REASONS:
        if re.search(pattern, done.err):
            return reason.format(dest=dest, known=known, words=words)
    return words[:300]
