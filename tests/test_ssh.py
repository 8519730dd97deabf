"""Devices over ssh, for real: an OpenSSH server on loopback that the tests start, with keys and ports of its own.

The "device" has a Python and the runtimes, and nothing else: its Python is a fresh environment into which only the
runtimes' packages are linked, and edgegen cannot be imported there.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles_for_devices import edsr, tiny

from edgegen import device_records, errors, on_device
from edgegen.devices import _spec
from edgegen.devices._shell import Options

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None)
ABSENT = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None] + ([] if SSHD else ["sshd"])
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)} (apt install openssh-server)")

QUICK = on_device.Settings(rounds=6, iterations=5, warm_seconds=0.01, cold=1, limit_s=60)
# What onnxruntime and openvino need; edgegen is not among it.
PACKAGES = ("numpy", "numpy.libs", "onnxruntime", "openvino", "google", "flatbuffers", "packaging")


@dataclasses.dataclass
class Server:
    """A running sshd. `config` is what `ssh -F` takes; `folder` is where the device may be written."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]
    python: str

    @property
    def spec(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    def options(self, folder: str = "", config: str = "ssh_config", python: str = "") -> Options:
        return Options(python or self.python, folder or str(self.home / "device"), self.home / config)

    def profile(self, *bundles: Path, settings: on_device.Settings = QUICK, **how: Any) -> list[Any]:
        return on_device.profile(bundles, self.spec, settings=settings, options=self.options(**how))

    def cut(self) -> None:
        """Kill every connection, as a network that goes away would; the server stays."""
        for child in children(self.process.pid):
            with_children = [child, *children(child)]
            for pid in with_children:
                if b"sshd" in command_of(pid):
                    os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def device_python(folder: Path) -> str:
    """A Python that has the runtimes' packages and no others."""
    venv.create(folder, symlinks=True, with_pip=False)
    here = Path(sysconfig.get_paths()["purelib"])
    there = next((folder / "lib").glob("python*/site-packages"))
    for name in PACKAGES:
        if (here / name).exists():
            (there / name).symlink_to(here / name)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user", "stranger", "other_host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True)
    shutil.copy(home / "user.pub", home / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile {home}/pid\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {home}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nSetEnv PATH={home}/path:/usr/bin:/bin\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where its unprivileged part lives; it does not start without
    for host in ("host", "other_host"):
        public = (home / f"{host}.pub").read_text().split()
        (home / f"known_{host}").write_text(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")
    (home / "known_nobody").write_text("")
    write_config(home / "ssh_config", "user", "known_host")
    write_config(home / "stranger_config", "stranger", "known_host")
    write_config(home / "wrong_config", "user", "known_other_host")
    write_config(home / "unknown_config", "user", "known_nobody")
    command = [str(SSHD), "-D", "-E", str(home / "log"), "-f", str(home / "sshd_config")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port), "sshd")
        yield Server(home, port, process, device_python(home / "venv"))
    finally:
        process.terminate()
        process.wait()


def write_config(file: Path, key: str, known: str) -> None:
    home = file.parent
    file.write_text(
        f"IdentityFile {home}/{key}\nIdentitiesOnly yes\nUserKnownHostsFile {home}/{known}\nGlobalKnownHostsFile none\n"
        "UpdateHostKeys no\n"
    )


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_for(holds: Any, what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} took longer than {seconds} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("bundle") / "net")


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    return edsr(tmp_path_factory.mktemp("edsr") / "edsr")


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# -------------------------------------------------------------------------------------------------------- measuring


def test_the_device_has_nothing_of_edgegen(server: Server) -> None:
    with _spec.open_device(server.spec, server.options()) as device:
        done = device.shell(f"cd / && {shlex.quote(device.python())} -c 'import onnxruntime; import edgegen'")
    assert done.code == 1 and "No module named 'edgegen'" in done.err


@pytest.mark.slow
def test_edsr_is_measured_over_ssh_in_two_runtimes(server: Server, upscaler: Path, tmp_path: Path) -> None:
    records = server.profile(upscaler)
    assert [(r.artifact.runtime, r.status, r.reason) for r in records] == [
        ("onnxruntime", "measured", ""), ("openvino", "measured", "")
    ]  # fmt: skip
    for record in records:
        assert record.network.name == "edsr" and record.device["kind"] == "ssh"
        assert record.golden.ok and record.golden.samples == 2
        assert len(record.rounds) == 6 and all(len(one.ms) == len(one.bare_ms) == 5 for one in record.rounds)
        assert record.runtime_version and record.obtained["threads"] == 1
        assert device_records.measurements(record)[0].status == "measured"
    assert records[1].obtained["inference_precision"] == "float32"
    file = tmp_path / "results" / "loopback.json"
    assert device_records.submit(records, file) == 2
    assert device_records.load_records(file.parent) == records


def test_what_is_there_is_not_pushed_again(server: Server, bundle: Path) -> None:
    server.profile(bundle)
    device = server.home / "device"
    before = {file: file.stat().st_mtime_ns for file in device.rglob("*") if file.is_file() and file.name != "lock"}
    server.profile(bundle)
    assert {file: file.stat().st_mtime_ns for file in before} == before


# ------------------------------------------------------------------------------------------------------------ retry


@pytest.mark.slow
def test_a_cut_in_mid_run_is_one_line_and_the_retry_goes_on(server: Server, bundle: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = server.home / "cut"
    settings = on_device.Settings(rounds=12, seconds=0.3, warm_seconds=0.01, cold=1, limit_s=60)

    def finished() -> list[dict[str, Any]]:
        logs = list((folder / "runs").glob("*/log.jsonl")) if folder.exists() else []
        lines = logs[0].read_text().splitlines() if logs else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rounds() -> list[dict[str, Any]]:
        return [line for line in finished() if line["kind"] == "round"]

    def cut() -> None:
        wait_for(lambda: len(rounds()) >= 3, "the third round")
        server.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(errors.TargetUnavailable, match="the connection was cut in mid-run") as caught:
        server.profile(bundle, settings=settings, folder=str(folder))
    thread.join()
    assert "are kept there: the same command goes on from there" in one_line(caught)
    time.sleep(1.5)  # the runner ends when its input does
    kept = rounds()
    assert 3 <= len(kept) < 12
    time.sleep(1.0)
    assert rounds() == kept  # nothing goes on measuring there behind the user's back
    pushed = {file: file.stat().st_mtime_ns for file in (folder / "bundles").rglob("*") if file.is_file()}
    (record,) = server.profile(bundle, settings=settings, folder=str(folder))
    assert record.status == "measured" and len(record.rounds) == 12
    assert [one.ms for one in record.rounds][: len(kept)] == [line["ms"] for line in kept]
    assert [one.session for one in record.rounds] == [1] * len(kept) + [2] * (12 - len(kept))
    assert len(record.cold) == 1  # not loaded again for it
    assert {file: file.stat().st_mtime_ns for file in pushed} == pushed


# ----------------------------------------------------------------------------------------------------------- errors


def test_no_server_is_one_line(server: Server, bundle: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(errors.TargetUnavailable, match="connection refused: no ssh server listens there") as caught:
        on_device.profile([bundle], f"ssh://me@127.0.0.1:{port}", options=server.options())
    one_line(caught)


def test_another_host_key_is_one_line(server: Server, bundle: Path) -> None:
    with pytest.raises(errors.TargetUnavailable, match="its host key is not the one in known_hosts") as caught:
        server.profile(bundle, config="wrong_config")
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in one_line(caught)


def test_an_unknown_host_key_is_one_line(server: Server, bundle: Path) -> None:
    with pytest.raises(errors.TargetUnavailable, match="host key is not known here: connect once by hand") as caught:
        server.profile(bundle, config="unknown_config")
    one_line(caught)


def test_a_refused_key_is_one_line(server: Server, bundle: Path) -> None:
    with pytest.raises(errors.TargetUnavailable, match="refused the login: no key of yours is accepted") as caught:
        server.profile(bundle, config="stranger_config")
    one_line(caught)


def test_a_broken_ssh_configuration_is_one_line(server: Server, bundle: Path) -> None:
    (server.home / "broken").write_text("NoSuchOption yes\n")
    with pytest.raises(errors.TargetUnavailable, match=r"ssh cannot read its configuration: .*bad config") as caught:
        server.profile(bundle, config="broken")
    one_line(caught)


def test_a_missing_runtime_is_named_with_its_cure(server: Server, tmp_path: Path) -> None:
    (record,) = server.profile(tiny(tmp_path / "lite", runtime="litert"))
    assert record.status == "not measured"
    cure = f"pip install ai-edge-litert there (for {server.python}; another Python: --device-python)"
    assert record.reason == f"ai_edge_litert is not on the device: {cure}"


def test_a_missing_runtime_spares_the_others(server: Server, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    lite, good = server.profile(tiny(tmp_path / "lite", runtime="ncnn"), bundle)
    assert lite.reason.startswith("ncnn is not on the device: pip install ncnn") and good.status == "measured"


def test_no_python_is_named_with_its_cure(server: Server, bundle: Path) -> None:
    (record,) = server.profile(bundle, python="/no/such/python3")
    assert record.status == "not measured" and "no Python 3.8 or newer there: install Python 3.8" in record.reason


def test_an_old_python_is_one_line(server: Server, bundle: Path) -> None:
    old = server.home / "old"
    old.write_text("#!/bin/sh\necho 3.6.9\n")
    old.chmod(0o755)
    with pytest.raises(errors.TargetUnavailable, match=r"Python 3\.6\.9, the runner needs 3\.8 or newer") as caught:
        server.profile(bundle, python=str(old))
    one_line(caught)


@pytest.mark.slow
def test_benchmark_app_measures_where_there_is_no_python(server: Server, upscaler: Path) -> None:
    """OpenVINO's own tool, for real; it is found in the PATH that sshd gives."""
    tool = Path(sys.executable).with_name("benchmark_app")
    if not tool.exists():
        pytest.skip("OpenVINO's benchmark_app is not installed")
    (server.home / "path").mkdir()
    (server.home / "path" / "benchmark_app").symlink_to(tool)
    record = server.profile(upscaler, python="/no/such/python3")[1]
    assert record.status == "measured", record.reason
    (bare, load, first) = device_records.measurements(record)
    assert (bare.name, load.name, first.name) == ("latency without copies", "cold load", "first run")
    assert bare.value > 0 and bare.conditions["n"] > 3 and bare.conditions["tool"] == "benchmark_app"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(options, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can only be mounted as root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_at_the_push_is_one_line_and_the_retry_goes_on(
    server: Server, bundle: Path, small_disk: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * (1 << 20))
    with pytest.raises(errors.RuntimeFailed, match="the disk there is full: cannot ") as caught:
        server.profile(bundle, folder=str(small_disk / "d"))
    one_line(caught)
    assert not list(small_disk.rglob("*.part"))
    filler.unlink()
    assert server.profile(bundle, folder=str(small_disk / "d"))[0].status == "measured"


@pytest.mark.slow
def test_a_disk_that_fills_in_mid_run_is_one_line_and_the_retry_goes_on(
    server: Server, bundle: Path, small_disk: Path
) -> None:
    settings = on_device.Settings(rounds=8, iterations=400, warm_seconds=0.01, cold=1, limit_s=60)

    def fill() -> None:
        wait_for(lambda: any('"round"' in f.read_text() for f in small_disk.glob("d/runs/*/log.jsonl")), "a round")
        with (small_disk / "filler").open("wb", buffering=0) as handle:
            try:
                while True:
                    handle.write(b"0" * 4096)
            except OSError:
                pass

    thread = threading.Thread(target=fill)
    thread.start()
    with pytest.raises(errors.RuntimeFailed, match="the disk there is full") as caught:
        server.profile(bundle, settings=settings, folder=str(small_disk / "d"))
    thread.join()
    one_line(caught)
    (small_disk / "filler").unlink()
    (record,) = server.profile(bundle, settings=settings, folder=str(small_disk / "d"))
    assert record.status == "measured" and len(record.rounds) == 8
    assert {one.session for one in record.rounds} == {1, 2}
