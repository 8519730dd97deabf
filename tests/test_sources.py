"""Sources of data: folders, archives and arrays, what is read from them, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from made_photos import photo, png, write_photos
from PIL import Image

from edgegen import archives, data
from edgegen.errors import DataError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


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
