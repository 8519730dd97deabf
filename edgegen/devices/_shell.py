"""A device that has a POSIX shell: push files, run a program, pull files, whatever carries the commands there.

A kind of device is two functions: `wrap` makes of a shell script the command line that runs it on the device, and
`explain` says in words why the connection failed, or "" when it did not. `send` is for carriers that copy files better.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen import errors, files

OLDEST_PYTHON = (3, 8)
_PLACES = ("/opt/homebrew/bin/python3", "/usr/local/bin/python3")  # a Mac's, which ssh does not have in its PATH
_PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(15, 7, -1)), "python", *_PLACES)
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|File size limit exceeded|ENOSPC", re.I)


@dataclass(frozen=True)
class Options:
    """python: the Python on the device ("": the first that is new enough). folder: where edgegen writes there ("": its
    cache). ssh_config: a file for `ssh -F` instead of the user's own."""

    python: str = ""
    folder: str = ""
    ssh_config: Path | None = None


@dataclass(frozen=True)
class Done:
    """How a command on the device ended; `out` is what it wrote to standard output."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        """`out` as text."""
        return self.out.decode(errors="replace")


class Device:
    """A device that is connected. All methods raise TargetUnavailable when the connection fails or is cut."""

    def __init__(
        self,
        name: str,
        wrap: Callable[[str], list[str]],
        explain: Callable[[Done], str],
        *,
        folder: str,
        python: str = "",
        send: Callable[[Device, Path, str], Done] | None = None,
    ):
        self.name, self._wrap, self._explain = name, wrap, explain
        self._pythons = (python,) if python else _PYTHONS
        self._send = send or _through_the_shell
        self.folder = folder
        place = self.must(f"mkdir -p {folder} && cd {folder} && pwd", "make its folder")
        self.folder = place.text.strip().splitlines()[-1]

    def shell(self, script: str, *, data: Path | None = None, seconds: float = 120) -> Done:
        """Run a shell script there; `data` becomes its input."""
        with tempfile.TemporaryFile() as words:
            with data.open("rb") if data else open("/dev/null", "rb") as given:
                try:
                    done = subprocess.run(
                        self._wrap("export LC_ALL=C; " + script),
                        stdin=given, stdout=subprocess.PIPE, stderr=words, timeout=seconds, check=False,
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    raise errors.TargetUnavailable(f"{self.name}: no answer in {seconds:g} s") from None
                except FileNotFoundError as error:
                    raise errors.TargetUnavailable(f"{self.name}: {error.filename} is not installed here") from error
            words.seek(0)
            result = Done(done.returncode, done.stdout, words.read().decode(errors="replace"))
        if why := self._explain(result):
            raise errors.TargetUnavailable(f"{self.name}: {why}")
        return result

    def must(self, script: str, what: str, **how: Any) -> Done:
        """`shell` for what must succeed.

        Raises:
            RuntimeFailed: it did not; a full disk is called so.
        """
        return self._check(self.shell(script, **how), what)

    def push(self, wanted: Mapping[str, Path]) -> list[str]:
        """Copy files to their names in the device's folder, each whole or not at all; the names that were not there.

        A file that is there with the same hash is not copied again. What arrived is compared by hash.

        Raises:
            RuntimeFailed: the disk is full, the folder cannot be written, or a file arrived damaged.
        """
        hashes = {name: files.sha256(file) for name, file in wanted.items()}
        there = self._hashes(list(wanted))
        missing = [name for name in wanted if there.get(name) != hashes[name]]
        for name in missing:
            done = self._send(self, wanted[name], name)
            self._check(done, f"write {name} ({wanted[name].stat().st_size / 1e6:.1f} MB)")
        arrived = self._hashes(missing)
        if damaged := [name for name in missing if arrived.get(name) != hashes[name]]:
            raise errors.RuntimeFailed(f"{self.name}: {damaged[0]} did not arrive whole; try again")
        return missing

    def pull(self, name: str) -> bytes:
        """Content of a file of the device's folder; empty when there is none."""
        return self.shell(f"cd {self._place} && if [ -f {_q(name)} ]; then cat {_q(name)}; fi").out

    def remove(self, name: str) -> None:
        """Remove a file or folder of the device's folder."""
        self.shell(f"cd {self._place} && rm -rf {_q(name)}")

    def run(self, argv: Sequence[str], on_line: Callable[[str], Any], *, seconds: float) -> Done:
        """Run a program in the device's folder; its output comes line by line. Its input ends with the connection.

        Raises:
            TargetUnavailable: the connection was cut, or it took longer than `seconds`.
        """
        script = f"export LC_ALL=C; cd {self._place} && {' '.join(map(_q, argv))}; exit $?"
        with tempfile.TemporaryFile() as words:
            process = subprocess.Popen(self._wrap(script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words)
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            try:
                for line in process.stdout or ():
                    on_line(line.decode(errors="replace").rstrip("\n"))
                code = process.wait()
                late = not timer.is_alive()
            finally:
                timer.cancel()
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            words.seek(0)
            done = Done(code, b"", words.read().decode(errors="replace"))
        if late:
            raise errors.TargetUnavailable(f"{self.name}: did not end in {seconds:g} s")
        if why := self._explain(done):
            raise errors.TargetUnavailable(f"{self.name}: {why}")
        return done

    def python(self) -> str:
        """A Python on the device that is new enough, or "" when there is none at all.

        Raises:
            TargetUnavailable: there are only older ones; says which.
        """
        check = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
        tries = "; ".join(f'echo "{_q(p)} $({_q(p)} -c {_q(check)} 2>/dev/null)"' for p in self._pythons)
        found = re.findall(r"^(\S+) (\d+)\.(\d+)\.(\d+)$", self.shell(tries).text.replace("'", ""), re.M)
        for name, *version in found:
            if tuple(map(int, version[:2])) >= OLDEST_PYTHON:
                return str(name)
        if found:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            name, *version = found[0]
            raise errors.TargetUnavailable(
                f"{self.name}: {name} there is Python {'.'.join(version)}, the runner needs {oldest} or newer: install "
                "one there, and name it with --device-python"
            )
        return ""

    def probe(self) -> dict[str, Any]:
        """Facts and state by the shell alone: model, os, machine, celsius, mhz, where the device tells them."""
        told: dict[str, Any] = {}
        for line in self.shell(_PROBE).text.splitlines():
            key, _, rest = line.partition("\t")
            name, _, value = rest.partition("\t")
            if value and re.fullmatch(r"-?\d+", value):
                told.setdefault(key, {})[name] = int(value) / 1000
            elif not value and name.strip():
                told[key] = name.strip()
        return told

    def refuse_full(self, words: str, what: str) -> None:
        """Raise the one error of a full disk when `words` tell of one.

        Raises:
            RuntimeFailed: they do.
        """
        if _FULL.search(words):
            raise errors.RuntimeFailed(f"{self.name}: the disk there is full: cannot {what} in {self.folder}")

    @property
    def _place(self) -> str:
        return _q(self.folder)

    def _hashes(self, names: Sequence[str]) -> dict[str, str]:
        if not names:
            return {}
        listed = " ".join(map(_q, names))
        one = '(sha256sum "$f" || shasum -a 256 "$f") 2>/dev/null'
        each = f'for f in {listed}; do if [ -f "$f" ]; then {one}; fi; done'
        done = self.shell(f"cd {self._place} && {each}", seconds=600)
        return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](.+)$", done.text, re.M)}

    def _check(self, done: Done, what: str) -> Done:
        if done.code == 0:
            return done
        words = [line.strip() for line in done.err.splitlines() if line.strip()] or [f"exit code {done.code}"]
        self.refuse_full(" ".join(words), what)
        raise errors.RuntimeFailed(f"{self.name}: cannot {what}: {words[-1][:300]}")


def _through_the_shell(device: Device, file: Path, name: str) -> Done:
    """Copy one file; it appears whole or not at all."""
    place, part = _q(f"{device.folder}/{name}"), _q(f"{device.folder}/{name}.part")
    script = f'mkdir -p "$(dirname {place})" && cat > {part} && mv {part} {place} || {{ rm -f {part}; exit 1; }}'
    return device.shell(script, data=file, seconds=3600)


def _q(text: str) -> str:
    return shlex.quote(text)


_PROBE = r"""
model=$( (tr -d '\0' < /proc/device-tree/model || getprop ro.product.model || sysctl -n hw.model) 2>/dev/null )
android=$(getprop ro.build.version.release 2>/dev/null)
printf 'model\t%s\n' "$model"
printf 'os\t%s\n' "${android:+Android $android, }$(uname -sr)"
printf 'machine\t%s\n' "$(uname -m)"
for z in /sys/class/thermal/thermal_zone*/temp; do
  [ -r "$z" ] && printf 'celsius\t%s\t%s\n' "$(cat "${z%/*}/type" 2>/dev/null)" "$(cat "$z" 2>/dev/null)"
done
for c in /sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq; do
  [ -r "$c" ] && p="${c%/*}" && printf 'mhz\t%s\t%s\n' "${p##*/}" "$(cat "$c" 2>/dev/null)"
done
true
"""
