"""Facts about metrics; each is shown to change on wrong data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgegen import images, registry
from edgegen.errors import DataError
from edgegen.metrics import _mmd
from edgegen.metrics import fid as fid_module
from edgegen.metrics import kid as kid_module
from edgegen.metrics.agreement import agreement
from edgegen.metrics.fid import Moments, fid, frechet
from edgegen.metrics.kid import kid
from edgegen.metrics.perceptual import perceptual
from edgegen.metrics.psnr import psnr
from edgegen.metrics.ssim import image_ssim, ssim
from edgegen.metrics.top1 import top1
from edgegen.nn.features import FeatureExtractor

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(number=6, size=24, seed=0):
    """Smooth images (N, 3, size, size) in 0..1."""
    rng = np.random.default_rng(seed)
    small = rng.random((number, 3, size // 4, size // 4)).astype(np.float32)
    return np.kron(small, np.ones((4, 4), np.float32))


def filters(seed=0, width=12):
    """An extractor without weights of its own: random 3 x 3 filters at two resolutions; pooled = means."""
    kernel = torch.from_numpy(np.random.default_rng(seed).normal(size=(width, 3, 3, 3)).astype(np.float32))

    def run(x):
        one = torch.relu(torch.nn.functional.conv2d(torch.from_numpy(x), kernel, padding=1))
        return [one.numpy(), one[:, :, ::2, ::2].numpy()], one.mean((2, 3)).numpy()

    return FeatureExtractor("random filters", "0" * 64, run)


def identity(channels=3):
    """An extractor whose pooled features are the image's values: closed forms become possible."""
    return FeatureExtractor("identity", "0" * 64, lambda x: ([x], x.reshape(len(x), -1)), channels)


# Paired image metrics


@pytest.mark.parametrize("error", [0.1, 0.01, 0.001])
def test_psnr_of_a_known_error(error):
    a = np.full((3, 3, 16, 16), 0.5, np.float32)
    found = psnr([a], [a + np.float32(error)])
    assert found.value == pytest.approx(-20 * math.log10(error), abs=1e-3)
    assert (found.unit, found.direction, found.conditions["n"]) == ("dB", "higher", 3)


def test_psnr_is_the_mean_of_the_images_and_at_most_100_db():
    a = np.zeros((2, 1, 4, 4), np.float32)
    b = a.copy()
    b[1] = 0.1
    found = psnr([a], [b])
    assert found.samples == pytest.approx((100.0, 20.0)) and found.value == pytest.approx(60.0)


def test_ssim_agrees_with_scikit_image():
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    for shape in ((3, 20, 31), (1, 28, 28)):
        a = rng.random(shape)
        b = np.clip(a + rng.normal(0, 0.2, shape), 0, 1)
        theirs = structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
        )
        assert image_ssim(a[None], b[None])[0] == pytest.approx(theirs, abs=1e-6)


def test_ssim_of_flat_images_has_a_closed_form():
    a, b = np.full((1, 1, 12, 12), 0.2), np.full((1, 1, 12, 12), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim([a], [b]).value == pytest.approx(luminance, abs=1e-6)
    with pytest.raises(DataError, match="at least 11 x 11"):
        ssim([a[..., :10]], [b[..., :10]])


def test_perceptual_distance_of_orthogonal_features_is_two():
    a = np.zeros((1, 3, 12, 12), np.float32)
    b = a.copy()
    a[:, 0], b[:, 1] = 0.7, 0.3
    assert perceptual([a], [b], features=identity()).value == pytest.approx(2.0, abs=1e-5)
    assert perceptual([a], [a * 0.5], features=identity()).value == pytest.approx(0.0, abs=1e-9)


def test_perceptual_distance_is_symmetric_grows_with_noise_and_says_its_extractor():
    a, noise = pictures(20), np.random.default_rng(1).normal(size=(20, 3, 24, 24)).astype(np.float32)
    distances = [perceptual([a], [a + s * noise], features=filters()).value for s in (0.0, 0.05, 0.2)]
    assert distances[0] == pytest.approx(0.0, abs=1e-9) and distances[0] < distances[1] < distances[2]
    back = perceptual([a + np.float32(0.2) * noise], [a], features=filters())
    assert back.value == pytest.approx(distances[2], rel=1e-5)
    assert back.conditions["extractor"] == "random filters" and not back.conditions["learned_weights"]


PAIRED = {
    "psnr": lambda a, b: psnr([a], [b]),
    "ssim": lambda a, b: ssim([a], [b]),
    "perceptual": lambda a, b: perceptual([a], [b], features=filters()),
    "fid": lambda a, b: fid([a], [b], features=filters()),
    "kid": lambda a, b: kid([a], [b], features=filters()),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("wrong", ["doubled", "zeros"])
def test_every_image_metric_changes_clearly_on_wrong_output(name, wrong):
    a = pictures(30)
    noisy = np.clip(a + np.random.default_rng(2).normal(0, 0.01, a.shape), 0, 1).astype(np.float32)
    good = PAIRED[name](a, noisy)
    # clipped, as every output is before it is judged; the perceptual distance does not see brightness alone
    bad = PAIRED[name](a, np.clip(2 * a, 0, 1) if wrong == "doubled" else np.zeros_like(a))
    if good.direction == "higher":
        assert bad.value < good.value - 0.2 * abs(good.value)
    else:
        assert bad.value > 2 * abs(good.value) + 1e-3


@pytest.mark.parametrize("name", registry.names("metrics"))
def test_every_metric_file_holds_its_function_and_says_what_it_is(name):
    function = getattr(registry.module("metrics", name), name)
    assert callable(function) and registry.summary("metrics", name)
    assert function.__kwdefaults__["seed"] == 0


@pytest.mark.parametrize("name", PAIRED)
def test_figures_carry_seed_n_and_interval(name):
    a = pictures(12)
    b = np.clip(a + np.random.default_rng(2).normal(0, 0.1, a.shape), 0, 1).astype(np.float32)
    found = PAIRED[name](a, b)
    assert found.conditions["seed"] == 0 and found.conditions["n"] in (12, (12, 12))
    assert found.interval is not None and found.interval[0] <= found.value <= found.interval[1]
    assert found == PAIRED[name](a, b)


def test_batch_sizes_do_not_matter_but_numbers_of_samples_do():
    a, b = pictures(7), pictures(7, seed=1)
    whole = psnr([a], [b])
    assert psnr([a[:3], a[3:]], [b[:5], b[5:6], b[6:]]) == whole
    for left, right in (([a], [b[:6]]), ([a[:6]], [b]), ([], [b])):
        with pytest.raises(DataError, match="different numbers"):
            psnr(left, right)
    with pytest.raises(DataError, match="one shape"):
        ssim([a], [b[:, :1]])
    with pytest.raises(DataError, match="at least one"):
        psnr([], [])


@pytest.mark.parametrize("name", PAIRED)
def test_nan_in_the_output_is_nan_in_the_figure(name):
    a = pictures(6)
    broken = a.copy()
    broken[2] = np.nan
    assert math.isnan(PAIRED[name](a, broken).value)


def test_unit_range_maps_and_clips():
    values = np.array([-1.0, 0.0, 1.0, 3.0])
    np.testing.assert_allclose(images.unit_range(values, (-1.0, 1.0)), [0, 0.5, 1, 1])
    np.testing.assert_allclose(images.unit_range(values, None), [0, 0, 1, 1])
    assert np.isnan(images.unit_range(np.array([np.inf, -np.inf, np.nan]), (-1.0, 1.0))).all()


def test_features_of_an_image_that_is_not_finite_are_nan_though_the_network_swallows_it():
    lossy = FeatureExtractor("lossy", "0" * 64, lambda x: ([np.nan_to_num(x)], np.nan_to_num(x).mean(axis=(2, 3))))
    images_in = pictures(3)
    images_in[1, 0, 2, 2] = np.nan
    maps, pooled = lossy(images_in)
    assert np.isnan(maps[0][1]).all() and np.isnan(pooled[1]).all()
    np.testing.assert_array_equal(pooled[[0, 2]], images_in[[0, 2]].mean(axis=(2, 3)))


# Classification


def test_top1_and_agreement_by_hand():
    logits = np.array([[1.0, 2, 0], [5, 1, 0], [0, 0, 9], [np.nan, 0, 0]], np.float32)
    other = np.array([[0.0, 1, 0], [0, 1, 0], [0, 0, 9], [np.nan, 0, 0]], np.float32)
    found = top1([np.array([1, 0, 1, 0])], [logits])
    assert found.value == 0.5 and found.samples == (1.0, 1.0, 0.0, 0.0)
    assert agreement([logits], [other]).value == 0.5  # two not finite rows do not agree
    assert top1([np.array([1, 0, 1, 0])], [np.zeros_like(logits)]).value == 0.5  # zeros: always class 0
    assert agreement([logits[:3]], [2 * logits[:3]]).value == 1.0
    with pytest.raises(DataError, match="allowed are"):
        top1([logits], [logits])


# Distribution metrics


def test_fid_of_gaussians_with_equal_covariance_is_the_squared_distance_of_the_means():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    cov, shift = root @ root.T, rng.normal(size=8)
    assert frechet(shift, cov, np.zeros(8), cov) == pytest.approx(shift @ shift, rel=1e-9)


def test_fid_of_scaled_covariances_has_a_closed_form():
    cov = np.diag([1.0, 2.0, 3.0])
    expected = np.trace(cov) * (1 + 4 - 2 * 2)  # tr(S + 4 S - 2 (S 4S)^(1/2))
    assert frechet(np.zeros(3), cov, np.zeros(3), 4 * cov) == pytest.approx(expected, rel=1e-9)


def test_streamed_moments_are_those_of_the_whole():
    rows = np.random.default_rng(1).normal(1e3, 1.0, (101, 5))
    moments = Moments()
    for part in np.array_split(rows, 9):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-8)


@pytest.mark.parametrize(("n", "width"), [(400, 32), (40, 64)], ids=["full rank", "fewer images than features"])
def test_fid_agrees_with_torch_fidelity_on_the_same_features(n, width):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(n, width)), rng.normal(0.3, 1.4, size=(n + 7, width))
    stat = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid_statistics_to_metric(*stat, verbose=False)["frechet_inception_distance"]
    shaped = [x.reshape(len(x), 1, 1, width) for x in (a, b)]
    ours = fid(np.array_split(shaped[0], 3), [shaped[1]], features=identity(1), interval=False)
    assert ours.value == pytest.approx(theirs, rel=1e-3)
    assert ours.interval is None and "fewer than 2048" in ours.conditions["warning"]


@pytest.mark.parametrize(
    ("n", "size", "whole"),
    [(300, 100, 2500), (200, 1000, 2500), (300, 100, 10)],
    ids=["subsets of one kernel", "all at once", "a kernel each"],
)
def test_kid_agrees_with_torch_fidelity_on_the_same_features(n, size, whole, monkeypatch):
    monkeypatch.setattr(_mmd, "_WHOLE_KERNEL_IMAGES", whole)
    from torch_fidelity.metric_kid import kid_features_to_metric

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(n, 16)).astype(np.float32), rng.normal(0.4, 1.2, (n, 16)).astype(np.float32)
    theirs = kid_features_to_metric(
        *map(torch.from_numpy, (a, b)), kid_subsets=20, kid_subset_size=min(size, n), rng_seed=5, verbose=False
    )
    shaped = [x.reshape(n, 1, 1, 16) for x in (a, b)]
    ours = kid([shaped[0]], [shaped[1]], features=identity(1), seed=5, subsets=20, subset_size=size)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert np.std(ours.samples) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3, abs=1e-6)
    assert ours.conditions["subset_size"] == min(size, n)


def test_kid_of_one_distribution_is_zero_within_its_interval():
    """The interval covers the truth (0) about as often as it says, and misses a different distribution."""
    hits = misses = 0
    for i in range(40):
        rng = np.random.default_rng(100 + i)
        a, b, c = (rng.normal(shift, 1.0, (150, 8)) for shift in (0.0, 0.0, 0.6))
        for other, same in ((b, True), (c, False)):
            value = np.mean(kid_module.subset_values(a, other, seed=0, subsets=1, size=150))
            error = kid_module.standard_error(a, other, seed=0)
            hits += same and abs(value) <= 1.96 * error
            misses += not same and value > 1.96 * error
    assert hits >= 34 and misses == 40


def test_kid_error_is_that_of_repeated_draws():
    values, errors = [], []
    for i in range(60):
        rng = np.random.default_rng(i)
        a, b = rng.normal(0, 1, (120, 6)), rng.normal(0.5, 1, (120, 6))
        values += kid_module.subset_values(a, b, seed=0, subsets=1, size=120)
        errors.append(kid_module.standard_error(a, b, seed=i))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


def test_fid_error_is_that_of_repeated_draws():
    values, bounds = [], []
    for i in range(40):
        rng = np.random.default_rng(i)
        a, b = (rng.normal(shift, 1, (150, 1, 1, 5)).astype(np.float32) for shift in (0, 0.7))
        found = fid([a], [b], features=identity(1))
        values.append(found.value)
        bounds.append((found.interval[1] - found.interval[0]) / 3.92)
    assert np.mean(bounds) == pytest.approx(np.std(values), rel=0.35)


def test_fid_leaves_out_groups_where_a_bootstrap_would_be_too_much(monkeypatch):
    monkeypatch.setattr(fid_module, "_MAX_FEATURES", 4)
    values, bounds = [], []
    for i in range(25):
        rng = np.random.default_rng(i)
        a, b = (rng.normal(shift, 1, (200, 1, 1, 5)).astype(np.float32) for shift in (0, 0.7))
        found = fid([a], [b], features=identity(1))
        values.append(found.value)
        bounds.append((found.interval[1] - found.interval[0]) / 2 / 2.262)
    assert "jackknife" in found.conditions["interval"]
    assert np.mean(bounds) == pytest.approx(np.std(values), rel=0.35)


def test_distributions_need_two_images_a_side():
    for metric in (fid, kid):
        with pytest.raises(DataError, match="at least two images"):
            metric([pictures(5)], [pictures(1)], features=filters())
