"""Facts about sources, datasets, splits and calibration files."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgegen import archives, data, images, types
from edgegen.errors import DataError

SHARED = Path(__file__).parents[1].parent / "shared" / "assets"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


def model(task, inputs, outputs, **options):
    """A model of which only the contract matters."""
    how = options.pop("preprocessing", types.Preprocessing())
    out_range = options.pop("out_range", (0.0, 1.0))
    stage = types.Stage(
        "net", None, (types.TensorSpec("x", inputs),), (types.TensorSpec("y", outputs, value_range=out_range),)
    )
    return types.Model("net", task, (stage,), preprocessing=how, options=options)


def photo(height, width, seed=0):
    """Smooth colour noise, so that resizing keeps something of it."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_photos(folder, number=5, size=(40, 56), classes=()):
    for i in range(number):
        place = folder / (classes[i % len(classes)] if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(*size, seed=i)).save(place / f"{i:02d}.png")
    return folder


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


# Sources


def test_folder_without_subfolders_has_no_labels(tmp_path):
    source = data.open_source(write_photos(tmp_path / "p"))
    assert len(source) == 5 and source.labels == () and source.label(0) is None
    np.testing.assert_array_equal(source.image(3), photo(40, 56, 3))


def test_class_folders_sorted_are_labels(tmp_path):
    source = data.open_source(write_photos(tmp_path / "p", classes=("dog", "cat")))
    assert source.labels == ("cat", "dog")
    assert [source.label(i) for i in range(5)] == [0, 0, 1, 1, 1]


def test_numbered_class_folders_are_their_own_label(tmp_path):
    source = data.open_source(write_photos(tmp_path / "p", classes=("10", "2")))
    assert {source.label(i) for i in range(5)} == {2, 10} and len(source.labels) == 11


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.xz"])
def test_archive_equals_its_folder(tmp_path, kind):
    folder = write_photos(tmp_path / "p", classes=("a", "b"))
    path = tmp_path / f"p.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, Path("top") / file.relative_to(folder))
    else:
        with tarfile.open(path, "w:" + {"tar": "", "tar.xz": "xz"}.get(kind, "gz")) as archive:
            archive.add(folder, "top")
    a, b = data.open_source(folder), data.open_source(path)
    assert b.labels == ("a", "b")
    assert [a.key(i) for i in range(5)] == [b.key(i) for i in range(5)]
    np.testing.assert_array_equal(a.image(2), b.image(2))


def test_key_is_of_the_pixels_not_of_the_file(tmp_path):
    image = photo(30, 30)
    for name, options in (("a.png", {}), ("b.png", {"compress_level": 0}), ("c.bmp", {})):
        Image.fromarray(image).save(tmp_path / name, **options)
    Image.fromarray(255 - image).save(tmp_path / "d.png")
    source = data.open_source(tmp_path)
    assert len({source.key(i) for i in range(3)}) == 1
    assert source.key(3) != source.key(0)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "g.png")
    np.testing.assert_array_equal(data.open_source(tmp_path).image(0)[..., 0], (grey >> 8).astype(np.uint8))


def test_photo_is_turned_as_its_exif_says(tmp_path):
    upright = photo(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(upright[::-1, ::-1].copy()).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(data.open_source(tmp_path).image(0), upright)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_broken_image_is_named_and_skipped(tmp_path, suffix):
    for i in range(12):
        Image.fromarray(photo(40, 40, i)).save(tmp_path / f"{i:02d}.{suffix}")
    cut = tmp_path / f"05.{suffix}"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    source = data.open_source(tmp_path)
    assert source.broken == (f"05.{suffix}",) and len(source) == 11
    assert f"05.{suffix}" not in source.names


def test_more_than_a_tenth_broken_stops(tmp_path):
    write_photos(tmp_path, number=9)
    for name in ("x.png", "y.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 of 11 images are broken.*x\.png, y\.jpg"):
        data.open_source(tmp_path)


def test_long_scan_is_kept_and_noticed_when_files_change(tmp_path, monkeypatch):
    from edgegen import image_files

    monkeypatch.setattr(image_files, "_SCAN_CACHED_FROM", 1)
    folder = write_photos(tmp_path / "p")
    first = data.open_source(folder)
    monkeypatch.setattr(image_files, "_facts", lambda reader: pytest.fail("scanned again"))
    again = data.open_source(folder)
    assert [again.key(i) for i in range(5)] == [first.key(i) for i in range(5)]
    monkeypatch.undo()
    Image.fromarray(photo(40, 56, 77)).save(folder / "00.png")
    os.utime(folder / "00.png", (1, 1))
    monkeypatch.setattr(image_files, "_SCAN_CACHED_FROM", 1)
    assert data.open_source(folder).key(0) != first.key(0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_npz_is_mapped_not_loaded(tmp_path, save):
    x = RNG.integers(0, 256, (20, 9, 7, 3), dtype=np.uint8)
    save(tmp_path / "d.npz", x=x, y=np.arange(20) % 3)
    mapped = archives.npz_arrays(tmp_path / "d.npz")["x"]
    assert isinstance(mapped, np.memmap)
    source = data.open_source(tmp_path / "d.npz")
    np.testing.assert_array_equal(source.image(7), x[7])
    assert source.label(7) == 1 and source.labels == ("0", "1", "2")


def test_fortran_ordered_npz_reads_right(tmp_path):
    x = np.asfortranarray(RNG.normal(size=(6, 2, 5)).astype(np.float32))
    np.savez(tmp_path / "d.npz", x=x)
    np.testing.assert_array_equal(data.open_source(tmp_path / "d.npz").array(4), x[4])


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("pickle-ran",))


def bad_inputs(tmp_path):
    """name -> (path, what the message must say)."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.zip").write_bytes(zip_bytes()[:200])
    (tmp_path / "half.tar.gz").write_bytes(b"\x1f\x8b\x08\x00garbage")
    (tmp_path / "text.tar").write_bytes(b"hello" * 500)
    np.savez(tmp_path / "no_x.npz", images=np.zeros((2, 2)))
    np.savez(tmp_path / "objects.npz", x=np.array([Payload()], dtype=object))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Payload()))
    np.savez(tmp_path / "short_y.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.zeros(3, np.int64))
    np.savez(tmp_path / "chw.npz", x=np.zeros((4, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "negative.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.array([0, 1, -1, 2]))
    np.savez(tmp_path / "nan.npz", x=np.full((4, 8), np.nan, np.float32))
    (tmp_path / "video.mp4").write_bytes(b"0")
    return {
        "missing": "does not exist",
        "empty": "no images",
        "half.zip": "not a readable archive",
        "half.tar.gz": "not a readable archive",
        "text.tar": "not a readable archive",
        "no_x.npz": "no array x",
        "objects.npz": "pickle",
        "raw.npz": "not a readable .npz",
        "short_y.npz": "one y for every x",
        "chw.npz": r"allowed are \(N, H, W, 3\)",
        "negative.npz": "labels start at 0",
        "nan.npz": "4 of 4 samples hold NaN",
        "video.mp4": "unknown kind",
    }


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png(photo(16, 16)))
    return buffer.getvalue()


def test_bad_data_is_one_line_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in bad_inputs(tmp_path).items():
        with pytest.raises(DataError, match=words) as caught:
            data.open_source(tmp_path / name)
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "pickle-ran").exists()


def test_npz_sample_with_nan_is_skipped_and_named(tmp_path):
    x = RNG.normal(size=(20, 4)).astype(np.float32)
    x[3, 1] = np.inf
    np.savez(tmp_path / "d.npz", x=x)
    source = data.open_source(tmp_path / "d.npz")
    assert source.broken == ("x[3]",) and len(source) == 19
    np.testing.assert_array_equal(source.array(3), x[4])


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


def test_real_images_are_fitted_to_the_output():
    net = model("unconditional", (1, 16), (1, 1, 12, 12), out_range=(-1.0, 1.0))
    dataset = data.Dataset(data.ArraySource("a", RNG.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)), net, length=3)
    found = np.concatenate(list(dataset.real_images(size=2)))
    assert found.shape == (5, 1, 12, 12) and found.min() >= 0 and found.max() <= 1 and len(dataset) == 3
    with pytest.raises(DataError, match="no real images"):
        next(data.Dataset(None, net).real_images())


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
