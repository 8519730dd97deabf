"""A small ResNet for CIFAR-10 (ten classes, 32x32), widths 16-64-128, two blocks a stage.

He et al., 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2, wider and shallower than
there: the same accuracy in a tenth of the training time, which is what a two-core machine has.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from edgegen.nn.resnet import CifarResNet

RECORD = {
    "task": "classification",
    "input": {
        "shape": [1, 3, 32, 32],
        "value_range": [0, 1],
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
        "colour": "RGB",
        "resize": 32,
        "crop": [32, 32],
    },
    "output": {"shape": [1, 10]},
    "options": {
        "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    },
    "paper": "He et al., 2015, ResNet, arXiv:1512.03385",
    "licence": "Apache-2.0",
    "source": "benchmarks/train/cifar.py, trained on the CIFAR-10 training images (Krizhevsky 2009)",
}


def create(widths: Sequence[int] = (16, 64, 128), blocks: int = 2, classes: int = 10) -> nn.Module:
    """A fresh network.

    Args:
        widths: channels of the three stages.
        blocks: residual blocks a stage.
        classes: outputs.
    """
    return CifarResNet(widths, blocks, classes)
