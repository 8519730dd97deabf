"""Facts about datasets, splits and calibration files; sources are in test_sources.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_photos import model, photo, write_photos
from PIL import Image

from edgegen import data, images, types
from edgegen.errors import DataError

SHARED = Path(__file__).parents[1].parent / "shared" / "assets"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


# Tasks


@pytest.mark.parametrize(
    ("value_range", "mean", "std"),
    [((0, 1), (), ()), ((0, 255), (), ()), ((-1, 1), (), ()), ((0, 1), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))],
)
def test_preprocessing_is_the_stated_formula(value_range, mean, std):
    image = photo(6, 5)
    low, high = value_range
    expected = image.transpose(2, 0, 1) / 255.0 * (high - low) + low
    if mean:
        expected = (expected - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    found = images.network_input(image, types.Preprocessing(value_range, mean, std))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1, high))


def test_classification_resizes_then_crops_the_middle():
    image = photo(300, 400)
    how = types.Preprocessing(resize=64, crop=(56, 56))
    source = data.ArraySource("a", image[None], np.array([2]))
    sample = data.Dataset(source, model("classification", (1, 3, 56, 56), (1, 3), preprocessing=how))[0]
    resized = np.array(Image.fromarray(image).resize((85, 64), Image.Resampling.BICUBIC))
    expected = resized[4:60, 14:70].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_allclose(sample.input, expected, atol=1e-6)
    assert sample.label == 2 and sample.reference is None


def test_grey_network_gets_luma_and_colour_network_gets_repeated_grey():
    colour = photo(8, 8)
    grey = colour[..., :1]
    to_grey = data.Dataset(data.ArraySource("a", colour[None]), model("classification", (1, 1, 8, 8), (1, 2)))[0]
    luma = np.array(Image.fromarray(colour).convert("L")) / 255.0
    np.testing.assert_allclose(to_grey.input[0], luma, atol=1e-6)
    to_colour = data.Dataset(data.ArraySource("a", grey[None]), model("classification", (1, 3, 8, 8), (1, 2)))[0]
    np.testing.assert_allclose(to_colour.input, np.repeat(grey[None, ..., 0], 3, axis=0) / 255.0, atol=1e-6)


def test_super_resolution_tiles_lie_apart_and_inputs_are_their_reduction():
    image = photo(100, 150)
    net = model("super-resolution", (1, 3, 16, 16), (1, 3, 32, 32), scale=2, out_range=(-1.0, 1.0))
    dataset = data.Dataset(data.ArraySource("a", image[None]), net)
    assert len(dataset) == 3 * 4
    places = images.tiles((100, 150), 32, 32)
    covered = np.zeros((100, 150), int)
    for top, left in places:
        covered[top : top + 32, left : left + 32] += 1
    assert covered.max() == 1 and covered.sum() == 12 * 32 * 32
    top, left = places[5]
    tile = image[top : top + 32, left : left + 32]
    small = np.array(Image.fromarray(tile).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(dataset[5].reference, tile.transpose(2, 0, 1) / 127.5 - 1, atol=1e-5)
    np.testing.assert_allclose(dataset[5].input, small.transpose(2, 0, 1) / 255.0, atol=1e-6)
    assert len(dataset.keys()) == 1


def test_large_photo_cannot_drown_the_others():
    assert len(images.tiles((5000, 5000), 32, 32)) == images.TILES_A_SIDE**2
    assert images.tiles((31, 500), 32, 32) == []


def test_photos_smaller_than_a_tile_are_counted_or_refused(tmp_path):
    net = model("super-resolution", (1, 3, 32, 32), (1, 3, 64, 64), scale=2)
    Image.fromarray(photo(64, 64)).save(tmp_path / "a.png")
    Image.fromarray(photo(40, 64)).save(tmp_path / "b.png")
    assert data.Dataset(data.open_source(tmp_path), net).skipped == 1
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="smaller than a tile of 64 x 64"):
        data.Dataset(data.open_source(tmp_path), net)


def test_image_to_image_takes_the_whole_and_tiles_of_large_photos():
    net = model("image-to-image", (1, 3, 20, 20), (1, 3, 20, 20))
    assert len(data.Dataset(data.ArraySource("a", photo(39, 60)[None]), net)) == 1
    large = data.Dataset(data.ArraySource("a", photo(100, 160)[None]), net)
    assert len(large) == 1 + 2 * 3
    assert {large[i].input.shape for i in range(7)} == {(3, 20, 20)} and large[0].reference is None


def test_image_to_image_fits_a_reference_as_its_photo():
    net = model("image-to-image", (1, 3, 20, 20), (1, 3, 20, 20), out_range=(0.0, 1.0))
    x = np.stack([photo(100, 160), photo(100, 160)[:, ::-1]])
    pairs = data.Dataset(data.ArraySource("a", x, 255 - x), net)
    assert len(pairs) == len(data.Dataset(data.ArraySource("a", x), net))
    for i in (0, 3, 6):
        for sample in (pairs[i], pairs.train_item(i, np.random.default_rng(i))):
            np.testing.assert_allclose(sample.reference, 1 - sample.input, atol=2.1 / 255)  # rounded when resized
            assert np.abs(sample.reference - sample.input).max() > 0.1
    plain = data.Dataset(data.ArraySource("a", x), net).train_item(0, np.random.default_rng(3))
    np.testing.assert_array_equal(plain.input, pairs.train_item(0, np.random.default_rng(3)).input)
    for y in (255 - x[:, ::2], (x / 255).transpose(0, 3, 1, 2).astype(np.float32)):
        with pytest.raises(DataError, match="references of image-to-image are uint8 images as large as x"):
            data.Dataset(data.ArraySource("a", x, y), net)
    with pytest.raises(DataError, match="makes images of another size than it takes"):
        data.Dataset(data.ArraySource("a", x, 255 - x), model("image-to-image", (1, 3, 20, 20), (1, 3, 40, 40)))


def test_restoration_pairs_inputs_with_references():
    x = RNG.normal(size=(4, 8, 5, 5)).astype(np.float32)
    y = RNG.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    net = model("restoration", (1, 8, 5, 5), (1, 3, 40, 40), out_range=(0.0, 1.0))
    sample = data.Dataset(data.ArraySource("a", x, y), net)[2]
    np.testing.assert_array_equal(sample.input, x[2])
    np.testing.assert_allclose(sample.reference, y[2].transpose(2, 0, 1) / 255.0, atol=1e-6)


def test_latents_are_a_pure_function_of_seed_and_index():
    net = model("unconditional", (1, 4096), (1, 3, 8, 8))
    a, b, c = (data.Dataset(None, net, seed=s, length=50) for s in (3, 3, 4))
    np.testing.assert_array_equal(a[17].input, b[17].input)
    assert not np.array_equal(a[17].input, c[17].input) and not np.array_equal(a[17].input, a[18].input)
    assert abs(a[17].input.mean()) < 0.08 and abs(a[17].input.std() - 1) < 0.06
    assert data.overlap(a, b) == 50 and data.overlap(a, c) == 0


def test_training_draws_latents_anew_but_keeps_to_a_set_of_them():
    net = model("unconditional", (1, 16), (1, 1, 12, 12))
    drawn = data.Dataset(None, net, length=3)
    one, same, other = (drawn.train_item(2, np.random.default_rng(s)).input for s in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other) and one.dtype == np.float32 and one.shape == (16,)
    kept = data.Dataset(data.LatentSource("noise", [(0, 4)]), net)
    np.testing.assert_array_equal(kept.train_item(1, np.random.default_rng(6)).input, kept[1].input)


def test_real_images_are_fitted_to_the_output():
    net = model("unconditional", (1, 16), (1, 1, 12, 12), out_range=(-1.0, 1.0))
    dataset = data.Dataset(data.ArraySource("a", RNG.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)), net, length=3)
    found = np.concatenate(list(dataset.real_images(size=2)))
    assert found.shape == (5, 1, 12, 12) and found.min() >= 0 and found.max() <= 1 and len(dataset) == 3
    np.testing.assert_array_equal(dataset.real_image(4), found[4])
    with pytest.raises(IndexError, match="5 of 5"):
        dataset.real_image(5)
    with pytest.raises(DataError, match="no real images"):
        next(data.Dataset(None, net).real_images())


def test_passes_learn_from_all_real_images_and_keep_few_of_them(monkeypatch: pytest.MonkeyPatch):
    from edgegen.passes import _reals

    net = model("unconditional", (1, 16), (1, 1, 2, 2), out_range=(-1.0, 1.0))
    grey = np.arange(200, dtype=np.uint8)  # sorted, as folders by class are
    dataset = data.Dataset(data.ArraySource("a", np.broadcast_to(grey[:, None, None, None], (200, 2, 2, 1))), net)
    found = _reals.reals(dataset, net)
    drawn = found.drawn(2000, [0, 1])
    assert drawn.shape == (2000, 1, 2, 2) and drawn.dtype == np.float32
    values = np.unique(np.rint((drawn[:, 0, 0, 0] + 1) / 2 * 255))
    assert len(values) > 190 and values.max() > 195
    monkeypatch.setattr(_reals, "KEPT", 10)
    little = _reals.reals(dataset, net)
    np.testing.assert_array_equal(little.drawn(2000, [0, 1]), drawn)
    assert len(little._kept) == 2, "4 bytes each"
    assert _reals.reals(data.Dataset(None, net), net) is None
    assert _reals.reals(data.Dataset(dataset.source, model("unconditional", (1, 16), (1, 5))), net) is None
    none = dataset.subset(range(3))
    none._real = ()
    assert _reals.reals(none, net) is None


def test_what_does_not_fit_the_model_is_said():
    pictures = data.ArraySource("pics", RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), np.arange(4))
    floats = data.ArraySource("nums", np.zeros((4, 3, 9, 9), np.float32))
    cases = [
        (pictures, model("classification", (1, 3, "H", "W"), (1, 4)), "free dimensions"),
        (pictures, model("classification", (1, 3, 8, 8), (1, 3)), "4 classes, net has 3"),
        (pictures, model("super-resolution", (1, 3, 4, 4), (1, 3, 8, 8)), "option scale"),
        (pictures, model("restoration", (1, 3, 8, 8), (1, 3, 8, 8)), "no reference images"),
        (pictures, model("image-to-image", (1, 4, 8, 8), (1, 3, 8, 8)), "4 channels"),
        (floats, model("image-to-image", (1, 3, 8, 8), (1, 3, 8, 8)), r"\(3, 9, 9\), net takes \(3, 8, 8\)"),
        (floats, model("restoration", (1, 3, 9, 9), (1, 3, 9, 9)), "no reference images"),
        (data.LatentSource("noise", [(0, 4)]), model("classification", (1, 3, 8, 8), (1, 4)), "holds latents"),
        (None, model("classification", (1, 3, 8, 8), (1, 4)), "needs data"),
    ]
    for source, net, words in cases:
        with pytest.raises(DataError, match=words):
            data.Dataset(source, net)


# Augmentation


def test_augmentation_is_seeded_and_stays_within_the_task():
    source = data.ArraySource("a", np.stack([photo(64, 64, i) for i in range(3)]), np.arange(3))
    for net in (
        model("classification", (1, 3, 64, 64), (1, 3)),
        model("image-to-image", (1, 3, 24, 24), (1, 3, 24, 24)),
        model("super-resolution", (1, 3, 16, 16), (1, 3, 32, 32), scale=2),
    ):
        dataset = data.Dataset(source, net)
        one, two = (dataset.train_item(1, np.random.default_rng(5)) for _ in range(2))
        np.testing.assert_array_equal(one.input, two.input)
        varied = {dataset.train_item(1, np.random.default_rng(s)).input.tobytes() for s in range(8)}
        assert len(varied) > 3 and one.input.shape == dataset[1].input.shape
        assert one.key == dataset[1].key and one.label == dataset[1].label


def test_augmented_super_resolution_pair_still_belongs_together():
    source = data.ArraySource("a", photo(90, 90)[None])
    dataset = data.Dataset(source, model("super-resolution", (1, 3, 16, 16), (1, 3, 32, 32), scale=2))
    for seed in range(4):
        sample = dataset.train_item(0, np.random.default_rng(seed))
        tile = np.rint(sample.reference.transpose(1, 2, 0) * 255).astype(np.uint8)
        small = np.array(Image.fromarray(tile).resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(sample.input, small.transpose(2, 0, 1) / 255.0, atol=1e-6)


def test_grey_digits_and_arrays_are_not_augmented():
    grey = data.ArraySource("a", RNG.integers(0, 256, (2, 28, 28), dtype=np.uint8), np.arange(2))
    dataset = data.Dataset(grey, model("classification", (1, 1, 28, 28), (1, 2)))
    np.testing.assert_array_equal(dataset.train_item(1, np.random.default_rng(0)).input, dataset[1].input)


# Splits, selection, streams


def test_equal_images_never_fall_into_two_parts():
    distinct = RNG.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    source = data.ArraySource("a", distinct[RNG.integers(0, 40, 200)])
    dataset = data.Dataset(source, model("classification", (1, 1, 4, 4), (1, 2)))
    parts = data.split(dataset, (0.6, 0.2, 0.2), seed=1)
    assert sum(len(p) for p in parts) == 200
    assert [data.overlap(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2))] == [0, 0, 0]
    shares = [len(p.keys()) / len(dataset.keys()) for p in parts]
    np.testing.assert_allclose(shares, (0.6, 0.2, 0.2), atol=0.03)
    again = data.split(dataset, (0.6, 0.2, 0.2), seed=1)
    assert [p.digest for p in parts] == [p.digest for p in again]
    assert parts[0].keys() != data.split(dataset, (0.6, 0.2, 0.2), seed=2)[0].keys()


def test_overlap_sees_a_shared_image():
    x = RNG.integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    net = model("classification", (1, 1, 4, 4), (1, 2))
    a, b = data.Dataset(data.ArraySource("a", x[:4]), net), data.Dataset(data.ArraySource("b", x[3:]), net)
    assert data.overlap(a, b) == 1


@pytest.mark.parametrize("number", [3, 4, 10])
def test_every_part_gets_a_photo_when_there_are_enough(number):
    source = data.ArraySource("a", RNG.integers(0, 256, (number, 70, 70, 3), dtype=np.uint8))
    dataset = data.Dataset(source, model("super-resolution", (1, 3, 16, 16), (1, 3, 32, 32), scale=2))
    parts = data.split(dataset, (0.98, 0.01, 0.01), seed=0)
    assert min(len(p) for p in parts) >= 4 and sum(len(p) for p in parts) == 4 * number


def test_split_refuses_fractions_that_are_none():
    dataset = data.Dataset(None, model("unconditional", (1, 4), (1, 1, 8, 8)), length=5)
    for fractions in ((0.9, 0.2), (0.5, 0.0), ()):
        with pytest.raises(DataError, match="sum to at most 1"):
            data.split(dataset, fractions, seed=0)


def test_real_images_are_cut_with_the_latents():
    x = RNG.integers(0, 256, (20, 6, 6, 1), dtype=np.uint8)
    dataset = data.Dataset(data.ArraySource("a", x), model("unconditional", (1, 4), (1, 1, 6, 6)), length=40)
    one, two = (np.concatenate(list(p.real_images())) for p in data.split(dataset, (0.5, 0.5), seed=0))
    assert len(one) == len(two) == 10
    assert not {i.tobytes() for i in one} & {i.tobytes() for i in two}


def test_selection_is_deterministic_and_grows():
    dataset = data.Dataset(None, model("unconditional", (1, 4), (1, 1, 8, 8)), length=100)
    small, large = dataset.select(10, 7), dataset.select(30, 7)
    assert len(small) == 10 and small.keys() < large.keys() and dataset.select(500, 7) is dataset
    assert small.keys() != dataset.select(10, 8).keys()


def test_batches_are_the_samples_in_order():
    source = data.ArraySource("a", RNG.integers(0, 256, (23, 6, 6, 3), dtype=np.uint8), np.arange(23) % 4)
    dataset = data.Dataset(source, model("classification", (1, 3, 6, 6), (1, 4)))
    found = list(data.batches(dataset, 5))
    assert [len(b.input) for b in found] == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.concatenate([b.input for b in found]), [dataset[i].input for i in range(23)])
    np.testing.assert_array_equal(np.concatenate([b.label for b in found]), np.arange(23) % 4)
    assert [k for b in found for k in b.keys] == [dataset.key(i) for i in range(23)] and found[0].reference is None


def test_batches_decode_at_most_two_batches_ahead():
    class Counting(data.ArraySource):
        made = 0

        def image(self, i):
            Counting.made += 1
            return super().image(i)

    source = Counting("a", RNG.integers(0, 256, (200, 6, 6, 3), dtype=np.uint8))
    stream = data.batches(data.Dataset(source, model("classification", (1, 3, 6, 6), (1, 4))), 4)
    next(stream)
    assert Counting.made <= 8
    stream.close()


def test_decoded_images_are_kept_within_bounds(tmp_path, monkeypatch):
    from edgegen import image_files

    source = data.open_source(write_photos(tmp_path, number=6))
    monkeypatch.setattr(image_files, "_DECODED_BYTES", 3 * 40 * 56 * 3)
    for i in range(6):
        source.image(i)
    assert list(source._decoded) == [3, 4, 5]


def test_calibration_file_holds_the_first_inputs(tmp_path):
    dataset = data.Dataset(None, model("unconditional", (1, 7), (1, 1, 8, 8)), length=50)
    path = data.write_calibration(dataset, tmp_path / "cal", "z", 20)
    assert path == tmp_path / "cal" / "z.npy" and list((tmp_path / "cal").iterdir()) == [path]
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(stored, [dataset[i].input for i in range(20)])
    with pytest.raises(DataError, match="at least one sample"):
        data.write_calibration(dataset.subset([]), tmp_path, "z", 20)
    with pytest.raises(DataError, match="file name"):
        data.write_calibration(dataset, tmp_path, "a/b", 20)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/assets is not here")
def test_real_photos_and_real_npz_open():
    kodak = data.open_source(SHARED / "kodak24")
    assert len(kodak) == 24 and kodak.broken == () and kodak.size(0) in ((512, 768), (768, 512))
    digits = data.open_source(SHARED / "mnist-test.npz")
    assert len(digits) == 10_000 and digits.image(0).shape == (28, 28, 1) and digits.labels[-1] == "9"
