"""A small network as a user would bring it, with weights and data, for tests of whole runs."""

from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = '''
import torch
from torch import nn

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 64, 64], "value_range": [0, 1], "mean": [], "std": []},
    "output": {"shape": [1, 3, 64, 64], "value_range": [0, 1]},
    "licence": "CC0-1.0",
    "source": "made for a test",
}


class Smooth(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.body = nn.Sequential(*(m for _ in range(4) for m in (nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))))
        self.tail = nn.Conv2d(width, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return x + self.shuffle(self.tail(self.body(self.head(x))))


def net(width=128):
    return Smooth(width)
'''
TARGET = """
description = "this host, one runtime, for tests"
runtimes = ["onnxruntime"]
is_host = true
precisions = ["fp32", "int8"]
threads = 1
"""
RECIPE = """
schema = 1
[[steps]]
pass = "prune_channels"
options = { ratio = 0.5 }
[[steps]]
pass = "distill"
options = { steps = 60, batch = 2 }
[[steps]]
pass = "quantize"
"""


def write(folder: Path) -> tuple[str, ...]:
    """Fill `folder` with the network, its weights, 16 photos, a target and a recipe; arguments of `compress`."""
    import torch
    from safetensors.torch import save_file

    (folder / "net.py").write_text(SOURCE)
    namespace: dict = {}
    exec(compile(SOURCE, "net.py", "exec"), namespace)
    torch.manual_seed(0)
    save_file(namespace["net"]().state_dict(), folder / "net.safetensors")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i:02d}.png")
    (folder / "one.toml").write_text(TARGET)
    (folder / "recipe.toml").write_text(RECIPE)
    return ("--model", "net.py:net", "--weights", "net.safetensors", "--data", "photos", "--target", "one.toml",
            "--recipe", "recipe.toml", "--max-quality-drop", "30", "--calibration-images", "4")  # fmt: skip
