"""The GAN space on the 32x32 colour generator: half the MACs, inside the KID interval of the original.

    python benchmarks/search_gan.py [--trials 12] [--sampler tpe] [--max-drop 3]

`edgegen search --model sagan_cifar --space dcgan`, as a user would type it, on CIFAR-10 (benchmarks/prepare_data.py),
with a bundle for each point of the front. A point counts as inside where the KID of what it draws, to CIFAR-10 test
images that neither the training nor the search saw, lies in the 95% interval of the original's own KID to them, both
from the same latents. Its features are those that the training's discriminator looks at too, so a network of ImageNet
(../shared/assets; images enlarged to 128) is asked as well, about images of other latents.

The machine must be quiet; killed and called again, it goes on (out/search-gan). Writes results/search-gan.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import conditions
import goals
import numpy as np
import search_live

if TYPE_CHECKING:
    from edgegen.metrics._rows import Rows

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "search-gan.json"
WORK = ROOT / "out" / "search-gan"
DATA = goals.DATA / "cifar"
OTHER = f"mobilenet_v1_025:{goals.ASSETS / 'mobilenet_v1_025-imagenet.safetensors'}"
AT_ONCE = 250


def searched(options: argparse.Namespace) -> Path:
    """The folder of the front, after the search as a command."""
    out = WORK / f"{options.sampler}-{options.seed}"
    case = search_live.Case("sagan_cifar", DATA / "train-all.npz", DATA / "test.npz", options.max_drop,
                            samples=options.samples)  # fmt: skip
    search_live.search(case, "dcgan", options.trials, options.sampler, options.seed, out)
    return out / "front"


def told(row: dict[str, Any]) -> dict[str, Any]:
    """What counts of a build in a report: its label, MACs, bytes, latency (ms) and KID with its interval and N."""
    kid = next(figure for figure in row["quality"] if figure["name"] == "KID")
    return {
        "label": row["label"], "macs": row["macs"], "params": row["params"], "size_bytes": row["size_bytes"],
        "latency_ms": row["latency"]["value"], "ratio": (row["ratio"] or {}).get("value"), "kid": kid["value"],
        "interval": kid["interval"], "n": kid["conditions"]["n"], "features": kid["conditions"].get("extractor"),
    }  # fmt: skip


def enlarged(images: np.ndarray) -> np.ndarray:
    """(N, 3, 32, 32) to (N, 3, 128, 128)."""
    import torch

    return torch.nn.functional.interpolate(torch.from_numpy(images), scale_factor=4, mode="bilinear").numpy()


def other_rows(images: Iterable[np.ndarray]) -> Rows:
    """The other network's features of batches (n, 3, 32, 32) in 0..1."""
    from edgegen.metrics._common import feature_rows
    from edgegen.nn.features import load_features

    return feature_rows(map(enlarged, images), load_features(OTHER))


def other_kid(real: Rows, made: Iterable[np.ndarray]) -> dict[str, Any]:
    """KID in the other network's features; `real` as `other_rows` gives them, batches (n, 3, 32, 32) in 0..1."""
    from edgegen.metrics.kid import kid
    from edgegen.nn.features import load_features

    found = kid(real, other_rows(made), features=load_features(OTHER))
    return {"kid": found.value, "interval": found.interval, "n": found.conditions["n"]}


def other_of(run: Any, count: int) -> dict[str, Any]:
    """The same of what `run` draws, latents (n, 138) to images in -1..1, to test images."""
    with np.load(DATA / "test.npz") as archive:
        photos = archive["x"][np.random.default_rng(13).permutation(len(archive["x"]))[:count]]
    starts = range(0, count, AT_ONCE)

    def drawn(start: int) -> np.ndarray:
        z = np.random.default_rng((17, start)).standard_normal((min(AT_ONCE, count - start), 138), np.float32)
        return (run(z) + 1) / 2

    real = (photos[start : start + AT_ONCE].transpose(0, 3, 1, 2).astype(np.float32) / 255 for start in starts)
    return other_kid(other_rows(real), map(drawn, starts))


def other_of_original(count: int) -> dict[str, Any]:
    """The original's, in torch."""
    import torch

    from edgegen import graph, loading

    module = loading.load_model("sagan_cifar").stage.module
    return other_of(lambda z: graph.outputs(module, (torch.from_numpy(z),))[0].numpy(), count)


def other_of_bundle(folder: Path, count: int) -> dict[str, Any]:
    """A bundle's, as built."""
    from edgegen import bundle, measuring

    artifact = bundle.artifacts(bundle.read(folder))[0]
    with measuring.Worker(artifact) as worker:
        return other_of(lambda z: next(iter(worker.run_many({artifact.inputs[0].name: z}).values())), count)


def entry(front: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The original and each point of the front that has a bundle."""
    content = json.loads((front / "front.json").read_text(encoding="utf-8"))
    points, original = [], other_of_original(options.samples)
    for point in content["points"]:
        if not point["bundle"]:
            continue
        folder = front / point["bundle"]
        read = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        before, after = told(read["baseline"]), told(read["result"])
        low, high = before["interval"]
        points.append({
            "choices": point["choices"], "before": before, "after": after,
            "macs_share": after["macs"] / before["macs"], "inside": low <= after["kid"] <= high,
            "other": other_of_bundle(folder, options.samples),
        })  # fmt: skip
    return {
        **conditions.conditions(), "trials": options.trials, "sampler": options.sampler, "seed": options.seed,
        "max_drop": options.max_drop, "counts": content["counts"], "unit": content["unit"],
        "other": {"extractor": OTHER.partition(":")[0], "original": original}, "points": points,
    }  # fmt: skip


def shown(found: dict[str, Any]) -> str:
    """KID x 1000 with its interval."""
    low, high = found["interval"]
    return f"{1e3 * found['kid']:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"


def markdown(one: dict[str, Any]) -> str:
    """The report: a line a point, from fast to slow."""
    other = one["other"]
    lines = [
        f"{one['trials']} trials, {one['sampler']}, seed {one['seed']}, {one['date']}, {one['cores']} cores.",
        f"By {other['extractor']} the original's KID x 1000 is {shown(other['original'])}.", "",
        "| MACs | latency | KID x 1000 | of the original | inside | by the other network | choices |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for point in one["points"]:
        kids = [shown(k) for k in (point["after"], point["before"], point["other"])]
        choices = ", ".join(f"{name} {value}" for name, value in point["choices"].items())
        share = point["after"]["ratio"]
        lines.append(f"| {point['macs_share']:.2f} | {'-' if share is None else f'{share:.2f}'} | {kids[0]} |"
                     f" {kids[1]} | {'yes' if point['inside'] else 'no'} | {kids[2]} | {choices} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000, help="latents and real images in each evaluation part")
    parser.add_argument("--max-drop", type=float, default=3.0, help="KID x 1000, two-sided")
    options = parser.parse_args()
    os.chdir(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ["EDGEGEN_CACHE"] = str(WORK / "cache")

    from edgegen import files

    found = entry(searched(options), options)
    files.write_json(RESULT, found)
    files.write_text(RESULT.with_suffix(".md"), markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
