"""Facts about the metrics of sets and of single images: closed forms first, and each is shown to fail on wrong data."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from edgegen.errors import DataError
from edgegen.metrics import _corruptions, _mmd
from edgegen.metrics import spectrum as spectrum_module
from edgegen.metrics._rows import Rows
from edgegen.metrics.bad_images import bad_images
from edgegen.metrics.brightness_shift import brightness_shift
from edgegen.metrics.cafd import cafd
from edgegen.metrics.cmmd import cmmd, kernel, unit
from edgegen.metrics.colour_shift import colour_shift
from edgegen.metrics.corruption_accuracy import corruption_accuracy
from edgegen.metrics.fid import fid, frechet
from edgegen.metrics.inception_score import inception_score
from edgegen.metrics.kid import change, kid
from edgegen.metrics.luminance_psnr import luminance_psnr
from edgegen.metrics.perceptual import learned_weights, perceptual
from edgegen.metrics.precision import precision
from edgegen.metrics.recall import recall
from edgegen.metrics.spectrum import spectrum
from edgegen.nn import mmd
from edgegen.nn.features import FeatureExtractor

SCALE = np.float32(20.0)


def plain(head=None):
    """Pooled features are the image's values; `head` makes it a classifier."""
    return FeatureExtractor("plain", "0" * 64, lambda x: ([x], x.reshape(len(x), -1)), 1, head=head)


def shaped(rows):
    """Features (n, D) as images that `plain` turns back into them."""
    rows = np.asarray(rows, np.float32)
    return [rows.reshape(len(rows), 1, 1, -1)]


def normal(n, width, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1.0, (n, width))


# Rows


def test_rows_come_back_as_they_went_in():
    rows, values = Rows(), normal(50, 7).astype(np.float32)
    for part in np.array_split(values, 6):
        rows.append(part)
    np.testing.assert_array_equal(np.concatenate(list(rows.blocks(8))), values)
    np.testing.assert_array_equal(rows.take(np.array([49, 0, 3, 3])), values[[49, 0, 3, 3]])
    view = rows.only(np.arange(10, 30)).only(np.arange(0, 20, 2))
    np.testing.assert_array_equal(np.concatenate(list(view.blocks(3))), values[10:30:2])
    del rows
    np.testing.assert_array_equal(view.take(np.array([1])), values[12:13])  # a view keeps the file open
    with pytest.raises(DataError, match="all must be"):
        Rows.of([values, values[:, :3]])


def test_features_of_another_extractor_are_refused():
    with pytest.raises(DataError, match="another hash"):
        kid(Rows.of([normal(5, 3)], "1" * 64), shaped(normal(5, 3)), features=plain())


# Agreement with the field's own code, on the same features


@pytest.mark.slow  # it imports torchvision
def test_fid_agrees_with_pytorch_fid():
    calculate_frechet_distance = pytest.importorskip("pytorch_fid.fid_score").calculate_frechet_distance
    a, b = normal(400, 24).astype(np.float32), (normal(300, 24, seed=1) * 1.4 + 0.3).astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `disp` argument is deprecated", DeprecationWarning)
        theirs = calculate_frechet_distance(
            a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False)
        )
    assert fid(shaped(a), shaped(b), features=plain(), interval=False).value == pytest.approx(theirs, rel=1e-3)
    assert fid(shaped(a), shaped(2 * b), features=plain(), interval=False).value > 2 * theirs


def test_precision_and_recall_agree_with_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = normal(150, 6).astype(np.float32), (normal(130, 6, seed=1) * 0.6 + 0.8).astype(np.float32)
    theirs = prc_features_to_metric(torch.from_numpy(b), torch.from_numpy(a), verbose=False)
    found = {f.__name__: f(shaped(a), shaped(b), features=plain()).value for f in (precision, recall)}
    assert found == pytest.approx({k: theirs[k] for k in found}, rel=1e-3)
    assert 0.2 < found["recall"] < found["precision"] < 1.0  # the narrow set lies inside the wide one


def test_inception_score_agrees_with_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = normal(203, 10).astype(np.float32) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, rng_seed=4)
    ours = inception_score(None, shaped(logits), features=plain(head=lambda x: x), seed=4)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert np.std(ours.samples) == pytest.approx(theirs["inception_score_std"], rel=1e-3)


def test_cmmd_agrees_with_the_gaussian_kernel_of_torch_fidelity():
    from torch_fidelity.metric_kid import kernel_rbf, mmd2

    a, b = unit(normal(60, 9)), unit(normal(60, 9, 1.0, seed=1))
    kernels = [kernel_rbf(x, y, kid_kernel_rbf_sigma=10.0) for x, y in ((a, a), (a, b), (b, b))]
    ours = cmmd(shaped(a), shaped(b), features=plain()).value
    assert ours == pytest.approx(1000 * mmd2(*kernels), rel=1e-3)
    biased = 1000 * (kernels[0].mean() + kernels[2].mean() - 2 * kernels[1].mean())
    assert cmmd(shaped(a), shaped(b), features=plain(), biased=True).value == pytest.approx(biased, rel=1e-3)


# Closed forms


def test_fid_of_gaussians_with_known_moments():
    mean, root = np.arange(3.0), np.diag([1.0, 2.0, 0.5])
    expected = float(mean @ mean + np.square(np.diag(root) - 1.0).sum())
    assert frechet(np.zeros(3), np.eye(3), mean, root @ root) == pytest.approx(expected, rel=1e-9)
    a, b = normal(20000, 3), normal(20000, 3, seed=1) @ root + mean
    assert fid(shaped(a), shaped(b), features=plain(), interval=False).value == pytest.approx(expected, rel=0.05)


def test_kid_of_equal_distributions_is_zero_on_average_and_its_error_is_the_true_one():
    values, errors = [], []
    for seed in range(120):
        found = kid(shaped(normal(60, 5, seed=2 * seed)), shaped(normal(60, 5, seed=2 * seed + 1)), features=plain())
        values.append(found.value)
        errors.append((found.interval[1] - found.value) / 1.96)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert 1.0 < np.mean(errors) / np.std(values) < 2.0
    assert sum(abs(v) <= 1.96 * e for v, e in zip(values, errors)) >= 112


@pytest.mark.parametrize(("shift", "widest"), [(0.0, 2.0), (0.6, 1.25)], ids=["equal", "distant"])
def test_the_error_of_an_mmd_is_never_small_and_right_for_distant_sets(shift, widest):
    from edgegen.metrics.kid import kernel as cubic

    values, errors = [], []
    for seed in range(80):
        a, b = normal(150, 8, seed=2 * seed), normal(150, 8, shift, seed=2 * seed + 1)
        ones = np.ones((1, 150))
        values.append(float(mmd.weighted(a, b, ones, ones, cubic)[0]))
        errors.append(_mmd.standard_error(a, b, cubic, seed=seed))
    assert 0.85 < np.mean(errors) / np.std(values) < widest


def test_a_mean_over_subsets_scatters_more_than_the_whole():
    from edgegen.metrics.kid import kernel as cubic

    a, b = normal(300, 6), normal(300, 6, 0.3, seed=1)
    whole = _mmd.standard_error(a, b, cubic, seed=0)
    few, many = (_mmd.standard_error(a, b, cubic, seed=0, subsets=s, size=100) for s in (1, 100))
    assert whole < many < 1.1 * whole and few > 1.5 * whole


def test_the_change_of_kid_is_paired():
    """Two students of one teacher: one that is the teacher with a little noise, one that is shifted."""
    real, teacher = normal(200, 6), normal(200, 6, 0.2, seed=1)
    near, far = teacher + 0.01 * normal(200, 6, seed=2), teacher + 0.5
    small = change(shaped(real), shaped(teacher), shaped(near), features=plain())
    large = change(shaped(real), shaped(teacher), shaped(far), features=plain())
    alone = kid(shaped(real), shaped(near), features=plain())
    assert small.interval[0] <= 0 <= small.interval[1] and large.interval[0] > 0
    assert small.interval[1] - small.interval[0] < 0.2 * (alone.interval[1] - alone.interval[0])
    same = change(shaped(real), shaped(teacher), shaped(teacher), features=plain())
    assert same.value == 0 and same.interval == (0.0, 0.0)
    with pytest.raises(DataError, match="same inputs"):
        change(shaped(real), shaped(teacher), shaped(near[:50]), features=plain())


def test_the_error_of_a_change_is_that_of_repeated_draws():
    values, errors = [], []
    for seed in range(50):
        z = normal(100, 4, seed=seed)
        real, teacher, student = normal(100, 4, seed=seed + 500), z + 0.3, 1.1 * z + 0.5
        found = change(shaped(real), shaped(teacher), shaped(student), features=plain())
        values.append(found.value)
        errors.append((found.interval[1] - found.value) / 1.96)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


@pytest.mark.parametrize("metric", [precision, recall], ids=["precision", "recall"])
def test_precision_and_recall_of_equal_and_of_disjoint_sets(metric):
    a = normal(40, 3)
    assert metric(shaped(a), shaped(a), features=plain()).value == 1.0
    found = metric(shaped(a), shaped(a + 100), features=plain())
    assert found.value == 0.0 and "wide" in found.conditions["warning"] and found.conditions["n"] == (40, 40)
    with pytest.raises(DataError, match="more than 3 images"):
        metric(shaped(a[:3]), shaped(a), features=plain())


def test_a_set_with_half_of_the_modes_has_half_the_recall_and_full_precision():
    far = np.concatenate([normal(60, 2), normal(60, 2, seed=1) + 50])
    half = normal(60, 2)
    assert precision(shaped(far), shaped(half), features=plain()).value == 1.0
    assert recall(shaped(far), shaped(half), features=plain()).value == 0.5


def test_blocks_of_neighbours_do_not_matter(monkeypatch):
    from edgegen.metrics import _neighbours

    a, b = normal(70, 4), normal(50, 4, 0.5, seed=3)
    whole = precision(shaped(a), shaped(b), features=plain())
    monkeypatch.setattr(_neighbours, "_BLOCK", 16)
    assert precision(shaped(a), shaped(b), features=plain()) == whole


def test_inception_score_of_sure_answers_is_the_number_of_classes_that_occur():
    sure = np.eye(10, dtype=np.float32)[np.arange(400) % 10] * 100
    score = inception_score([], shaped(sure), features=plain(head=lambda x: x), splits=1)
    assert score.value == pytest.approx(10.0, rel=1e-6) and "biased downwards" in score.conditions["warning"]
    assert inception_score([], shaped(0 * sure), features=plain(head=lambda x: x)).value == pytest.approx(1.0)
    assert inception_score([], shaped(sure[::10]), features=plain(head=lambda x: x)).value == pytest.approx(1.0)
    with pytest.raises(DataError, match="take a classifier"):
        inception_score([], shaped(sure), features=plain())


def classes(centres, n, seed=0):
    """n rows around each centre; the first two values say the class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 0.05, (n, 2)) + centre for centre in centres])


def nearest(centres):
    centres = np.asarray(centres, np.float32)
    return lambda x: -200 * np.square(x[:, None, :] - centres[None]).sum(axis=2)


def test_cafd_is_the_mean_of_the_classes_distances_and_shows_a_class_that_is_missing():
    centres = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    features = plain(head=nearest(centres))
    real = classes(centres, 400)
    moved = classes([(0.2, 0.0), (1.0, 0.0), (0.0, 1.0)], 400, seed=1)
    found = cafd(shaped(real), shaped(moved), features=features)
    assert found.value == pytest.approx(0.2**2 / 3, rel=0.1) and np.argmax(found.conditions["classes"]) == 0
    assert found.interval[0] < found.value < found.interval[1]
    assert cafd(shaped(real), shaped(classes(centres, 400, seed=2)), features=features).value < 0.001
    dropped = cafd(shaped(real), shaped(classes(centres[:2], 600, seed=3)), features=features)
    assert dropped.value > 0.05 and dropped.conditions["class_shares"][1][2] == pytest.approx(0, abs=1e-3)


def test_cmmd_is_zero_for_equal_distributions_and_grows():
    values = [cmmd(shaped(normal(80, 6, 1, 2 * i)), shaped(normal(80, 6, 1, 2 * i + 1)), features=plain()).value
              for i in range(40)]  # fmt: skip
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)
    other = cmmd(shaped(normal(80, 6, 1.0)), shaped(normal(80, 6, -1.0, seed=1)), features=plain())
    assert other.value > 10 * np.std(values) and other.interval[0] > 0
    assert kernel(np.eye(2), np.eye(2))[0, 1] == pytest.approx(math.expm1(-0.01))


# Single images


def test_brightness_and_colour_shift_by_hand():
    a = np.full((3, 3, 8, 8), 0.4, np.float32)
    lighter = a + np.float32(10 / 255)
    found = brightness_shift([a], [lighter])
    assert found.value == pytest.approx(10.0, abs=1e-3) and found.conditions["two_sided"]
    assert brightness_shift([lighter], [a]).value == pytest.approx(-10.0, abs=1e-3)
    assert colour_shift([a], [lighter]).value == pytest.approx(0.0, abs=1e-3)
    blue = a.copy()
    blue[:, 2] += 0.1
    expected = 25.5 * math.hypot(0.5, 0.081312)
    assert colour_shift([a], [blue]).value == pytest.approx(expected, rel=1e-3)
    assert brightness_shift([a[:, :1]], [lighter[:, :1]]).value == pytest.approx(10.0, abs=1e-3)
    blue[0] = np.nan
    assert math.isnan(colour_shift([a], [blue]).value)


def test_luminance_of_grey_images_is_their_value_and_of_others_refused():
    a = np.full((2, 1, 8, 8), 0.5, np.float32)
    assert luminance_psnr([a], [a + np.float32(0.1)]).value == pytest.approx(20.0, abs=1e-3)
    assert luminance_psnr([a], [a]).value == pytest.approx(100.0)
    four = np.repeat(a, 4, axis=1)
    with pytest.raises(DataError, match="4 channels"):
        luminance_psnr([four], [four])


def test_bad_images_are_found_and_flat_references_excuse_them():
    good = np.random.default_rng(0).random((5, 3, 8, 8)).astype(np.float32)
    made = good.copy()
    made[0], made[1], made[2] = 0.0, 0.5, np.nan
    found = bad_images([good], [made])
    assert found.samples == (1, 1, 1, 0, 0) and found.value == pytest.approx(0.6)
    assert found.conditions["kinds"] == {"not finite": 1, "black": 1, "flat": 1}
    assert bad_images([made], [made]).value == 0.0 and bad_images([good], [good]).value == 0.0


def test_spectrum_finds_a_checkerboard_and_where_it_is():
    rng = np.random.default_rng(0)
    a, b = (rng.random((40, 3, 16, 16)).astype(np.float32) for _ in range(2))
    same = spectrum([a], [b])
    board = np.indices((16, 16)).sum(axis=0) % 2 * np.float32(0.3)
    found = spectrum([a], [b + board])
    assert found.value > 4 * same.value and found.conditions["peak_db"] > 10
    assert found.conditions["peak_frequency"] == pytest.approx(math.sqrt(0.5))  # the corner: a pattern of two pixels
    blocks = np.indices((16, 16))[1] // 2 % 2 * np.float32(0.5)
    assert spectrum([a], [b + blocks]).conditions["peak_frequency"] == pytest.approx(0.25, abs=0.05)
    assert found.interval[0] < found.value < found.interval[1]
    assert math.isnan(spectrum([a], [np.full_like(b, np.nan)]).value)
    with pytest.raises(DataError, match="both sides need one"):
        spectrum([a], [b[..., :8, :8]])


def test_a_profile_holds_all_the_power_of_an_image():
    image = np.random.default_rng(1).random((1, 12, 20))
    rings = spectrum_module.profile(np.stack([np.full((12, 20), 0.7), *image]))
    assert rings[0] == pytest.approx(0.0, abs=1e-9)  # a flat image has none
    wave = np.cos(2 * np.pi * np.arange(16) * 4 / 16)[None, None] * np.ones((1, 16, 1))
    ring = spectrum_module.profile(wave)[0]
    assert ring.argmax() + 1 == 4 and ring[[0, 1, 6]] == pytest.approx(0, abs=1e-9)


def test_corruption_accuracy_by_hand():
    logits = np.zeros((2, 4, 3), np.float32)
    logits[0, :, 1] = 1  # always class 1
    logits[1, :2, 2] = 1  # class 2 on noise and blur, else class 0
    found = corruption_accuracy([np.array([1, 2])], [logits])
    assert found.samples == (1.0, 0.5) and found.conditions["each"] == {"noise": 1, "blur": 1, "jpeg": .5,
                                                                       "contrast": .5}  # fmt: skip
    with pytest.raises(DataError, match="one row of logits for each"):
        corruption_accuracy([np.array([1, 2])], [logits[:, :2]])


@pytest.mark.parametrize("name", _corruptions.CORRUPTIONS)
def test_corruptions_change_images_the_same_way_every_time(name):
    image = (np.kron(np.random.default_rng(0).random((8, 8, 3)), np.ones((4, 4, 1))) * 255).astype(np.uint8)
    once, again = (_corruptions.corrupted(image, name, seed=1, number=7) for _ in range(2))
    assert once.shape == image.shape and once.dtype == np.uint8
    np.testing.assert_array_equal(once, again)
    assert 1 < np.abs(once.astype(float) - image).mean() < 60
    if name == "noise":
        assert (once != _corruptions.corrupted(image, name, seed=1, number=8)).any()
    with pytest.raises(DataError, match="unknown corruption"):
        _corruptions.corrupted(image, "fog", seed=0, number=0)


def test_lpips_weights_are_read_and_used(tmp_path):
    a = np.zeros((1, 3, 12, 12), np.float32)
    b = a.copy()
    a[:, 0], b[:, 1] = 0.7, 0.3
    torch.save({"lin0.model.1.weight": torch.tensor([0.5, 0.25, 9.0]).reshape(1, 3, 1, 1)}, tmp_path / "lin.pth")
    colour = FeatureExtractor("plain", "0" * 64, lambda x: ([x], x.reshape(len(x), -1)))
    found = perceptual([a], [b], features=colour, learned=learned_weights(tmp_path / "lin.pth"))
    assert found.value == pytest.approx(0.75, rel=1e-5) and found.conditions["learned_weights"]
    with pytest.raises(DataError, match="channels, the extractor has"):
        perceptual([a], [b], features=colour, learned=[np.ones(4)])
    torch.save({"other": torch.zeros(3)}, tmp_path / "no.pth")
    with pytest.raises(DataError, match="no LPIPS weights"):
        learned_weights(tmp_path / "no.pth")
