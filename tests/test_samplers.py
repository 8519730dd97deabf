"""Samplers: the exact denoiser of a Gaussian gives its mean and spread, at each method's order; diffusers agrees."""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgegen import registry, samplers
from edgegen.errors import UsageError
from edgegen.samplers import _core

MEAN, SPREAD = 0.3, 0.4
NAMES = registry.names("samplers")
# diffusers' own use of torch and numpy; nothing that a caller could mend
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FREE = {"clip": 0, "schedule": "linear", "train_steps": 1000}


def angles(t: np.ndarray, schedule: str = "linear") -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) of times (N,), for arrays (N, C, H, W)."""
    bars = samplers.alpha_bars(schedule, 1000)
    ratio = np.exp(np.interp(t, np.arange(1000), np.log(np.sqrt((1 - bars) / bars)))).reshape(-1, 1, 1, 1)
    return 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)


def gaussian(prediction: str = "epsilon", schedule: str = "linear"):
    """The best denoiser of images whose pixels are N(MEAN, SPREAD^2)."""

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x = feeds["sample"].astype(np.float64)
        alpha, sigma = angles(feeds["timestep"], schedule)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma
        return {"output": {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0}[prediction]}

    return run


def latents(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(x: np.ndarray, settings: dict) -> np.ndarray:
    """Where the probability flow leads from x at the first level: it keeps each pixel's place in the distribution."""
    first = samplers.levels(samplers.complete(settings))[0]
    return MEAN + SPREAD * (x - first.alpha * MEAN) / math.hypot(first.alpha * SPREAD, first.sigma)


def error(name: str, steps: int, **more) -> float:
    settings = {**FREE, "name": name, "steps": steps, "spacing": "karras", **more}
    x = latents(8, 1, 4, 4)
    made = samplers.generate(settings, gaussian(settings.get("prediction", "epsilon")), x)
    return float(np.abs(made - exact(x, settings)).max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_deterministic_samplers_converge_with_their_order(name: str, order: int):
    coarse, fine = error(name, 16), error(name, 32)
    assert fine < 0.1 / order**2
    assert order - 0.35 < math.log2(coarse / fine) < order + 0.6


@pytest.mark.parametrize("prediction", samplers._core.PREDICTIONS)
def test_every_kind_of_prediction_leads_to_the_same_images(prediction: str):
    assert error("heun", 24, prediction=prediction) == pytest.approx(error("heun", 24), abs=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", samplers._core.SCHEDULES)
def test_mean_and_spread_of_the_data_come_out(name: str, schedule: str):
    steps = {"ddpm": 100, "consistency": 1}.get(name, 40)
    settings = {**FREE, "name": name, "steps": steps, "schedule": schedule}
    made = samplers.generate(settings, gaussian(schedule=schedule), latents(50, 1, 16, 16))
    assert made.mean() == pytest.approx(MEAN, abs=0.02)  # 12,800 pixels: standard error 0.004
    wanted = 0.0 if name == "consistency" else SPREAD  # one step of a denoiser that is no consistency model: the mean
    assert made.std() == pytest.approx(wanted, abs=0.04)


def test_ddim_with_all_the_noise_is_ddpm():
    settings = {**FREE, "steps": 20}
    a, b = (samplers.generate({**settings, **own}, gaussian(), latents(4, 1, 4, 4))
            for own in ({"name": "ddpm"}, {"name": "ddim", "eta": 1.0}))  # fmt: skip
    assert np.allclose(a, b, atol=1e-5)
    c = samplers.generate({**settings, "name": "ddim", "eta": 0.9}, gaussian(), latents(4, 1, 4, 4))
    assert not np.allclose(a, c, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_its_own_latent_alone(name: str):
    settings, x = {**FREE, "name": name, "steps": 4}, latents(5, 1, 4, 4)
    together = samplers.generate(settings, gaussian(), x)
    alone = np.concatenate([samplers.generate(settings, gaussian(), x[i : i + 1]) for i in range(5)])
    assert np.array_equal(together, alone)
    assert np.array_equal(together, samplers.generate(settings, gaussian(), x))


# ------------------------------------------------------------------------------------------------------- diffusers


def wobbly(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A network that is no Gaussian's: whatever it says, both sides must make the same of it."""
    x, t = feeds["sample"].astype(np.float64), feeds["timestep"].reshape(-1, 1, 1, 1)
    return {"output": np.tanh(x + np.sin(t / 100)) + 0.2 * x}


def theirs(scheduler, x: np.ndarray, times: list[float], noise=None, scaled: bool = False) -> np.ndarray:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(x.astype(np.float64))
    scheduler.set_timesteps(len(times)) if not scaled else None
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t).numpy()
        told = np.full(len(x), float(t), np.float32)
        made = torch.from_numpy(wobbly({"sample": given.astype(np.float32), "timestep": told})["output"])
        more = {} if noise is None else {"variance_noise": noise(t)}
        x = scheduler.step(made, t, x, **more).prev_sample
    return x.numpy()


@pytest.fixture(scope="module")
def schedulers():
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("diffusers.schedulers")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.slow
def test_ddim_agrees_with_diffusers(schedulers, spacing: str, prediction: str):
    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    other = schedulers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing=spacing, prediction_type=kind
    )
    settings = {"name": "ddim", "steps": 10, "spacing": spacing, "schedule": "cosine", "clip": 0,
                "prediction": prediction}  # fmt: skip
    x = latents(2, 1, 4, 4)
    levels = samplers.levels(samplers.complete(settings))[:-1]
    wanted = theirs(other, x, [level.t for level in levels])
    assert [level.t for level in levels] == [float(t) for t in other.timesteps]
    made = samplers.generate(settings, wobbly, x)
    assert np.abs(made - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


@pytest.mark.slow
def test_ddpm_agrees_with_diffusers_on_the_same_noise(schedulers, monkeypatch):
    torch = pytest.importorskip("torch")
    other = schedulers.DDPMScheduler(clip_sample=True, timestep_spacing="leading")
    x, steps = latents(2, 1, 4, 4), 25
    draws = iter(np.random.default_rng(5).standard_normal((steps, *x.shape)))
    kept = [next(draws) for _ in range(steps)]
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    noises = iter(kept)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **more: torch.from_numpy(next(noises)))
    wanted = theirs(other, x, [0.0] * steps)
    settings = _core.complete({"name": "ddpm", "steps": steps, "spacing": "leading", "clip": 1.0})
    denoise = _core.Denoiser(settings, wobbly, None)
    made = _core.function("ddpm")(denoise, x.astype(np.float64), _core.levels(settings), lambda number: kept[number])
    assert np.abs(made - wanted).max() < 1e-4


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.slow
def test_euler_and_heun_with_rho_schedule_agree_with_diffusers(schedulers, name: str):
    torch = pytest.importorskip("torch")
    kind = getattr(schedulers, f"{name.capitalize()}DiscreteScheduler")
    other = kind(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", use_karras_sigmas=True)
    other.set_timesteps(8)
    settings = {**FREE, "name": name, "steps": 8, "spacing": "karras"}
    levels = samplers.levels(samplers.complete(settings))
    ours = np.array([level.sigma / level.alpha for level in levels])
    sigmas = other.sigmas.numpy()
    sigmas = np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]]) if name == "heun" else sigmas
    assert np.allclose(ours, sigmas, rtol=1e-4, atol=1e-6)
    x = latents(2, 1, 4, 4)
    start = torch.from_numpy(x.astype(np.float64) / levels[0].alpha)
    made, y = samplers.generate(settings, wobbly, x), start
    for t in other.timesteps:
        given = other.scale_model_input(y, t).numpy().astype(np.float32)
        out = torch.from_numpy(wobbly({"sample": given, "timestep": np.full(2, float(t), np.float32)})["output"])
        y = other.step(out, t, y).prev_sample
    assert np.abs(made - y.numpy()).max() < 1e-4 * max(1, float(y.abs().max()))


@pytest.mark.slow
def test_dpmpp_2m_agrees_with_diffusers(schedulers):
    other = schedulers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    x = latents(2, 1, 4, 4)
    wanted = theirs(other, x, [0.0] * 10)
    settings = {**FREE, "name": "dpmpp_2m", "steps": 10, "timesteps": [float(t) for t in other.timesteps]}
    made = samplers.generate(settings, wobbly, x)
    assert np.abs(made - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
    assert np.abs(2 * made - wanted).max() > 1e-2  # the comparison can fail


# ------------------------------------------------------------------------------------------ counts, guidance, caching


@pytest.mark.parametrize(("own", "wanted"), [
    ({"name": "ddim", "steps": 7}, 7),
    ({"name": "heun", "steps": 7}, 13),
    ({"name": "dpmpp_2m", "timesteps": [900.0, 300.0, 10.0]}, 3),
    ({"name": "ddim", "steps": 10, "labels": 10, "guidance": 2.0}, 20),
    ({"name": "ddim", "steps": 10, "labels": 10, "guidance": 2.0, "guidance_every": 3}, 14),
    ({"name": "ddim", "steps": 10, "labels": 10, "guidance": 2.0, "guidance_interval": [0.0, 0.5]}, 15),
    ({"name": "heun", "steps": 4, "labels": 10, "guidance": 2.0, "guidance_every": 2}, 11),
    ({"name": "heun", "steps": 4, "labels": 10, "guidance": 2.0, "guidance_interval": [0.5, 1.0]}, 11),
])  # fmt: skip
def test_runs_of_the_network_are_counted(own: dict, wanted: int):
    assert samplers.nfe(own) == wanted


def test_guidance_goes_beyond_the_label_and_thinning_less_often():
    seen: list[float] = []

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.extend(feeds["label"].tolist())
        return {"output": feeds["label"].reshape(-1, 1, 1, 1) * 0.01 + 0 * feeds["sample"]}

    settings = {**FREE, "prediction": "x0", "name": "ddim", "steps": 1, "labels": 10, "guidance": 3.0}
    made = samplers.generate(settings, run, latents(1, 1, 2, 2), np.array([4]))
    assert np.allclose(made, 0.10 + 3 * (0.04 - 0.10), atol=1e-6)  # 10 stands for no class
    assert seen == [4.0, 10.0]


def test_a_cached_network_runs_in_full_at_every_third_step():
    used: list[str] = []

    def full(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        used.append("full")
        return {"output": 0.1 * feeds["sample"], "cache": feeds["sample"] + feeds["timestep"][0]}

    def partial(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        used.append("partial")
        assert feeds["cache"].shape == feeds["sample"].shape
        return {"output": 0.1 * feeds["sample"]}

    settings = {**FREE, "name": "ddim", "steps": 7, "cache_every": 3}
    samplers.generate(settings, {"full": full, "partial": partial}, latents(1, 1, 2, 2))
    assert used == ["full", "partial", "partial", "full", "partial", "partial", "full"]
    assert samplers.calls(settings) == (7, 4)


@pytest.mark.parametrize("thinned", [{"guidance_every": 2}, {"guidance_interval": [0.5, 1.0]}], ids=str)
def test_both_runs_of_a_heun_step_are_guided_or_neither(thinned: dict):
    runs: list[tuple[float, bool]] = []

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs.append((float(feeds["timestep"][0]), bool(feeds["label"][0] == 10)))
        return {"output": 0.1 * feeds["sample"]}

    settings = {**FREE, "name": "heun", "steps": 4, "labels": 10, "guidance": 2.0, **thinned}
    samplers.generate(settings, run, latents(1, 1, 2, 2), np.array([4]))
    first, second, third, last = (level.t for level in samplers.levels(samplers.complete(settings))[:-1])
    step = {"guided": [False, True] * 2, "not": [False] * 2}  # whether each run is the one without a class
    order = ("guided", "not", "guided", "not") if "guidance_every" in thinned else ("guided", "guided", "not", "not")
    wanted = [free for kind in order for free in step[kind]][:-1]
    assert [free for _, free in runs] == wanted
    assert [t for t, free in runs if not free] == [first, second, second, third, third, last, last]


def test_both_runs_of_a_heun_step_are_full_or_partial():
    assert samplers.calls({"name": "heun", "steps": 4, "cache_every": 2}) == (7, 3)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"name": "dim"}, "did you mean 'ddim'"),
    ({"stepps": 4}, "unknown setting 'stepps'"),
    ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
    ({"steps": 5.0}, "steps must be a whole number"),
    ({"name": "heun", "eta": 0.5}, "unknown setting 'eta'"),
    ({"schedule": "cosin"}, "schedule must be one of linear, scaled_linear, cosine"),
    ({"timesteps": [10.0, 500.0]}, "timesteps must fall"),
    ({"guidance": 2.0}, "needs a network with class labels"),
    ({"guidance_interval": [0.5, 0.2]}, "guidance_interval"),
    ({"guidance_interval": 0.5}, r"guidance_interval must be two shares of the time, .* got \[0.5\]"),
    ({"timesteps": ["soon"]}, r"timesteps must be numbers, got \['soon'\]"),
    ({"eta": -0.5}, "eta must be a number of 0 or more, got -0.5"),
    ({"clip": [1.0, 2.0]}, "clip must be a number of 0 or more"),
    ({"rho": "seven"}, "rho must be numbers, got 'seven'"),
    ({"rho": 0}, "rho must be a number above 0"),
])  # fmt: skip
def test_wrong_settings_are_one_line(wrong: dict, said: str):
    with pytest.raises(UsageError, match=said):
        samplers.complete(wrong)


def test_settings_come_from_a_models_options():
    assert samplers.of({}) is None
    found = samplers.of({"prediction": "v", "schedule": "cosine", "sampler": {"name": "ddim", "steps": 9}})
    assert found is not None
    assert (found["prediction"], found["schedule"], found["steps"], found["eta"]) == ("v", "cosine", 9, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_bundle_need_nothing_but_numpy(name: str, tmp_path: Path):
    settings = samplers.complete({**FREE, "name": name, "steps": 3})
    (tmp_path / "samplers").mkdir()
    for file, source in samplers.sources(settings).items():
        shutil.copyfile(source, tmp_path / "samplers" / file)
    program = (
        "import sys, numpy as np\n"
        "from samplers import _core\n"
        f"x = np.load('x.npy'); s = {settings!r}\n"
        "np.save('y.npy', _core.generate(s, lambda f: {'output': 0.3 * f['sample']}, x))\n"
        "assert not [m for m in sys.modules if m.startswith(('edgegen', 'torch'))]\n"
    )
    x = latents(2, 1, 4, 4)
    np.save(tmp_path / "x.npy", x)
    program = "import sys; sys.path.insert(0, '.')\n" + program
    subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, check=True)
    here = samplers.generate(settings, lambda feeds: {"output": 0.3 * feeds["sample"]}, x)
    assert np.array_equal(np.load(tmp_path / "y.npy"), here)
