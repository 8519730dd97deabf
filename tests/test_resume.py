"""A killed run goes on where it was, and ends with the same recipe, weights and graph as an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch", reason="compress needs the extra `torch`")
pytest.importorskip("onnxruntime", reason="this run builds for ONNX Runtime")

import user_network

from edgegen import bundle, checking

KILLS = 5
FILES = ("recipe.toml", "weights.safetensors", "architecture.json", "model.onnx")


def start(folder, arguments, cache, *more):
    environment = {**os.environ, "EDGEGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "edgegen.cli", "compress", "--quiet", *arguments, *more]
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)


def hashes(path):
    listed = bundle.read(path).manifest["files"]
    return {name: listed[name]["sha256"] for name in FILES}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_five_random_moments_a_run_ends_as_if_undisturbed(tmp_path):
    arguments = user_network.write(tmp_path)
    began = time.monotonic()
    undisturbed = start(tmp_path, arguments, tmp_path / "cache-a", "--out", "whole")
    assert undisturbed.wait() == 0, (tmp_path / "said.txt").read_text()
    duration = time.monotonic() - began
    moments = random.Random(20261120)
    out, killed = tmp_path / "killed", 0
    for _ in range(KILLS):
        process = start(tmp_path, arguments, tmp_path / "cache-b", "--out", "killed", "--resume")
        try:
            process.wait(timeout=moments.uniform(0.1, 0.3) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            assert not out.exists() or (out / "manifest.json").is_file(), "half a bundle was left"
    assert killed >= 3, "the run is too short for this test to mean anything"
    last = start(tmp_path, arguments, tmp_path / "cache-b", "--out", "killed", "--resume")
    assert last.wait() == 0, (tmp_path / "said.txt").read_text()
    assert hashes(out) == hashes(tmp_path / "whole")
    assert checking.verify(out) == []
    assert not list((tmp_path / "cache-b" / "runs").iterdir()), "the finished run's folder is gone"
