"""edgegen, by the command that a user types; default: the post-training preset; best: all runtimes of the target
(--thorough), with the case's recipe where it has one.

It looks at no image of the table's quality figures: --eval-data are the other half of the evaluation images.
"""

RUNS = ("bundle",)
SETTINGS = {"default": {"best": False}, "best": {"best": True}}


def compress(source, calibration, out, options):
    """A bundle in the folder `out`/bundle."""
    import os
    import shutil
    import subprocess
    import sys

    data, folder = source.told["data"], source.folder
    command = ["--model", source.told["model"], *options["weights"], *(options["arguments"])]
    if data["calibration"]:
        command += ["--data", str(folder / data["calibration"])]
        if "--latency-only" not in command:  # random weights: there is nothing to judge
            command += ["--eval-data", str(folder / data["judge"])]
        command += ["--calibration-images", str(options["calibration"])]
    environment = {**os.environ, "EDGEGEN_CACHE": str(out / "cache")}  # nothing that an earlier run has made
    # user: begin
    edgegen = [sys.executable, "-m", "edgegen.cli", "compress", *command, "--out", str(out / "bundle")]
    subprocess.run(edgegen, check=True, env=environment)
    # user: end
    shutil.rmtree(out / "cache", ignore_errors=True)
    return {"path": out / "bundle"}
