"""How good a network is while it learns: the gate's figure of the torch network, on images of the part that decides.

Building a candidate for each look would take longer than the training. `test`, which the report is about, is not seen.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgegen import files, graph, quality, samplers
from edgegen.run import Run
from edgegen.types import Measurement, Model

MOST = {"classification": 1000, "unconditional": 500}  # samples of one look; of images, which take longer, IMAGES
IMAGES = 64


@dataclass
class Judge:
    """`Job.quality` of a run."""

    run: Run
    data: Any
    evaluation: list[quality.Evaluation] = field(default_factory=list)

    @cached_property
    def key(self) -> str:
        """Identity of the data and the figure; two judges of one key say the same. Reads the data: few passes ask."""
        request = self.run.request
        return files.key(self.data.digest, self.run.gate.figure, request.features, request.seed)

    def __call__(self, model: Model) -> Measurement:
        """The figure that decides about a candidate, of this network on the CPU; its module is not modified."""
        if not self.evaluation:
            self.evaluation.append(self._against_teacher())
        with tempfile.TemporaryDirectory(dir=self.run.folder) as scratch:
            outputs = self._outputs(model, self.data, Path(scratch) / "outputs.npy")
            return quality.find(self.evaluation[0].figures(outputs, self.run.gate.figure), self.run.gate.figure)

    def _against_teacher(self) -> quality.Evaluation:
        """What stays the same between two looks, with the outputs of the torch teacher."""
        run, folder = self.run, self.run.folder / "looks"
        folder.mkdir(parents=True, exist_ok=True)
        teacher = self._outputs(run.model, self.data, folder / "teacher.npy")
        real = self.data.real_images if run.model.task == "unconditional" and self.data.source is not None else None
        fresh = None
        if run.data.fresh is not None and real is None:
            others = run.data.fresh[0].subset(range(len(self.data)))
            fresh = self._outputs(run.model, others, folder / "fresh.npy")
        features = quality.features(run.model, run.request.features)
        return quality.Evaluation(run.model, self.data, teacher, run.request.seed, features, real, fresh)

    def _outputs(self, model: Model, data: Any, out: Path) -> Path:
        device = self.run.train_device
        module = graph.clone(model.stage.module).eval().to(device)

        def run_many(inputs: np.ndarray) -> np.ndarray:
            found: np.ndarray = graph.outputs(module, [torch.from_numpy(inputs).to(device)])[0].float().cpu().numpy()
            return found

        return quality.collect(run_many, data, out, lambda text, share: None)


def judge(run: Run) -> Judge | None:
    """None where nothing is judged (--latency-only), and for denoisers: a look would be a whole loop for each image."""
    one = run.model.stage.module is not None and len(run.model.stage.inputs) == 1
    if run.data.select is None or not one or samplers.of(run.model.options) is not None:
        return None
    return Judge(run, run.data.select.select(MOST.get(run.model.task, IMAGES), run.request.seed))
