"""The sampler's settings are chosen by distance to the teacher's images; factors on skips export."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_denoiser_labels import labelled  # noqa: E402
from test_distill_steps import MEAN, SPREAD, TARGET, Exact, denoiser  # noqa: E402
from torch import nn  # noqa: E402

from edgegen import samplers  # noqa: E402
from edgegen.nn.skips import ScaledSkips  # noqa: E402
from edgegen.passes import tune_sampler  # noqa: E402
from edgegen.types import Job  # noqa: E402

TEACHER = denoiser(Exact(), 60)


def tuned(**options):
    model = denoiser(Exact(), 6)
    job = Job(TARGET, teacher=TEACHER, threads=1)
    return tune_sampler.tune_sampler(model, job, **{"images": 8, **options})


def test_a_better_sampler_is_found_at_the_same_number_of_runs():
    result = tuned()
    settings = samplers.of(result.model.options)
    assert settings is not None and samplers.nfe(settings) <= 6
    assert result.notes["distance"] < 0.5 * result.notes["distance_before"]
    assert result.notes["distance"] == min(entry["distance"] for entry in result.notes["tried"])
    again = [entry for entry in result.notes["tried"] if entry["distance"] == result.notes["distance"]]
    assert (again[0]["name"], again[0]["timesteps"]) == (settings["name"], settings["timesteps"])


def test_moving_the_times_alone_helps_too():
    result = tuned(methods=["ddim"], rhos=[], times=2)
    assert samplers.of(result.model.options)["timesteps"]
    assert result.notes["distance"] < 0.9 * result.notes["distance_before"]
    assert "own times" in result.changed["sampler"]


def test_the_number_of_runs_can_be_asked_for():
    settings = samplers.of(tuned(nfe=3, times=0).model.options)
    assert settings is not None and samplers.nfe(settings) == 3


class Moments:
    """Stands for a feature extractor: mean and spread of an image."""

    def __call__(self, images):
        assert images.min() >= 0 and images.max() <= 1
        return [], np.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], axis=1)


@pytest.mark.parametrize("real", [False, True])
def test_settings_can_be_judged_by_kid(real: bool, monkeypatch):
    monkeypatch.setattr(tune_sampler.features, "load_features", lambda name: {"mnist": Moments()}[name])
    base = denoiser(Exact(), 12)
    model = dataclasses.replace(base, options={**base.options, "features": "mnist"})
    job = Job(TARGET, teacher=None if real else TEACHER, data=Photos(TEACHER) if real else None, threads=1)
    options = {"metric": "kid", "images": 256, "methods": ["ddim", "dpmpp_2m"], "times": 0}
    result = tune_sampler.tune_sampler(model, job, **options)
    assert result.notes["metric"] == "kid" and result.notes["distance"] < 0.5 * result.notes["distance_before"]
    assert result.model.options["sampler"]["name"] == "dpmpp_2m"  # of second order


def test_kid_of_few_images_and_other_metrics_are_refused():
    for wrong in ({"metric": "kid", "images": 32}, {"metric": "fid"}):
        with pytest.raises(ValueError, match="metric must be distance, or kid with 64 images or more, got"):
            tuned(**wrong)


def test_kid_of_a_pass_is_that_of_the_metric():
    from edgegen.metrics import kid
    from edgegen.nn import mmd

    x, y = (np.random.default_rng(i).standard_normal((70, 5)) + i for i in range(2))
    (value,) = kid.subset_values(x, y, seed=0, subsets=1, size=70)
    assert mmd.squared(x, y) == pytest.approx(value)
    assert mmd.squared(x, x[::-1]) < 0 < mmd.squared(x, y)


class Photos:
    """Stands for data.Dataset: real images that are distributed as the teacher's."""

    def __init__(self, model) -> None:
        self.model = model

    def real_count(self) -> int:
        return 256

    def real_image(self, i: int) -> np.ndarray:
        pixels = MEAN + SPREAD * np.random.default_rng([i, 9]).standard_normal((1, 4, 4))
        return np.clip((pixels + 1) / 2, 0, 1)


@pytest.mark.parametrize("thinned", [{}, {"guidance_every": 3}, {"guidance_interval": [0.0, 0.5]}], ids=str)
def test_guidance_counts_in_the_number_of_runs(thinned: dict):
    model = labelled(12, guidance=2.0, **thinned)
    result = tune_sampler.tune_sampler(model, Job(TARGET, threads=1), nfe=5, images=2)
    settings = samplers.of(result.model.options)
    assert settings is not None and settings["guidance"] == 2.0 and samplers.nfe(settings) <= 5
    facts = {key: settings[key] for key in samplers._core.OF_NETWORK}
    tried = [{**facts, **{key: value for key, value in entry.items() if key != "distance"}}
             for entry in result.notes["tried"]]  # fmt: skip
    assert max(samplers.nfe(one) for one in tried) in (4, 5) and samplers.nfe(model.options["sampler"] | facts) > 12
    assert len({one["name"] for one in tried}) == 3


def test_runs_that_are_too_few_for_guidance_are_refused():
    with pytest.raises(ValueError, match="room for one step, which takes 2 runs with guidance; got 1"):
        tune_sampler.tune_sampler(labelled(12, guidance=2.0), Job(TARGET), nfe=1)


class Up(nn.Module):
    """Takes what diffusers' up blocks take."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([nn.Identity()])

    def forward(self, hidden_states: torch.Tensor, res_hidden_states_tuple: tuple, temb: object = None) -> torch.Tensor:
        return torch.cat((hidden_states, *res_hidden_states_tuple), dim=1)


def test_factors_reach_the_skips_and_half_of_the_backbone():
    block = ScaledSkips(Up(), skip=0.5, backbone=2.0)
    made = block(torch.ones(1, 4, 2, 2), (torch.ones(1, 3, 2, 2),), None)
    assert torch.equal(made[0, :, 0, 0], torch.tensor([2.0, 2, 1, 1, 0.5, 0.5, 0.5]))
    assert len(block.resnets) == 1
    again = ScaledSkips(Up(), **block.config)
    assert torch.equal(again(torch.ones(1, 4, 2, 2), (torch.ones(1, 3, 2, 2),)), made)


@pytest.mark.slow
def test_factors_on_a_real_u_net_are_tried_and_the_best_one_is_described(tmp_path):
    pytest.importorskip("diffusers")
    import dataclasses

    from edgegen import architecture, onnx_graph
    from edgegen.models import ddpm_unet

    def made() -> nn.Module:
        torch.manual_seed(0)
        return ddpm_unet.create(widths=(8, 8), attention=(False, False), groups=4, size=8).eval()

    base = denoiser(Exact(), 2)
    wide = [dataclasses.replace(spec, shape=(1, 1, 8, 8)) if spec.name != "timestep" else spec
            for spec in (*base.stage.inputs, *base.stage.outputs)]  # fmt: skip
    stage = dataclasses.replace(base.stage, module=made(), inputs=tuple(wide[:2]), outputs=tuple(wide[2:]))
    model = dataclasses.replace(base, stages=(stage,))
    scaled = made()
    scaled.net.up_blocks[0] = ScaledSkips(scaled.net.up_blocks[0], 0.8, 1.2)
    scaled.net.up_blocks[1] = ScaledSkips(scaled.net.up_blocks[1], 0.8, 1.2)
    teacher = model.with_module(scaled.eval())  # so that these factors are the right ones
    options = {"methods": ["ddim"], "rhos": [], "times": 0, "skips": [1.0, 0.8], "backbones": [1.0, 1.2], "images": 2}
    result = tune_sampler.tune_sampler(model, Job(TARGET, teacher=teacher, threads=1), **options)
    assert (result.notes["skip"], result.notes["backbone"]) == (0.8, 1.2)
    assert result.notes["distance"] < 1e-9
    told = architecture.describe(result.model.stage.module, made())
    rebuilt = architecture.rebuild(made(), told)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([500.0])
    rebuilt.load_state_dict(result.model.stage.module.state_dict())
    assert torch.allclose(rebuilt.eval()(x, t), scaled(x, t), atol=1e-6)
    graph = onnx_graph.to_onnx(result.model.stage, tmp_path / "net.onnx")
    feeds = {"sample": x.numpy(), "timestep": t.numpy()}
    assert onnx_graph.parity(result.model.stage, graph, feeds).max_abs < 1e-4
