"""edgegen, by the command that a user types; default: the post-training preset; best: the case's recipe where it has
one, else the preset `balanced` where images to learn from are at hand.

It looks at no image of the table's quality figures: --eval-data are the other half of the evaluation images.
"""

RUNS = ("bundle",)
SETTINGS = {"default": {"best": False}, "best": {"best": True}}


def compress(source, calibration, out, options):
    """A bundle in the folder `out`/bundle."""
    import contextlib
    import os
    import subprocess
    import sys

    data, told = source.told["data"], source.told
    command = ["--model", told["model"], *options["weights"], *(options["arguments"])]
    if data["calibration"]:
        command += ["--data", str(source.folder / data["calibration"]), "--eval-data", str(source.folder / data["judge"])]
        command += ["--calibration-images", str(options["calibration"])]
    environment = {**os.environ, "EDGEGEN_CACHE": str(out / "cache")}  # nothing that an earlier run has made
    # user: begin
    command = [sys.executable, "-m", "edgegen.cli", "compress", *command, "--target", "cpu", "--out", str(out / "bundle")]
    subprocess.run(command, check=True, env=environment)
    # user: end
    with contextlib.suppress(FileNotFoundError):
        import shutil

        shutil.rmtree(out / "cache")
    return {"path": out / "bundle"}
