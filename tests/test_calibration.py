"""Facts about the calibration sets: what is recorded is what is read, and the two parts share nothing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgegen import calibration_sets, data, registry, types
from edgegen.errors import DataError

NAMES = registry.names("calibration")


def keys(source):
    return {source.key(i) for i in range(len(source))}


def test_there_are_at_least_three_sets():
    assert {"photos", "digits", "latents"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parts_share_no_content_and_make_the_whole(name):
    train, judged = (calibration_sets.load_split(name, part) for part in ("train", "eval"))
    assert len(train) and len(judged) and not keys(train) & keys(judged)
    assert keys(calibration_sets.load(name)) == keys(train) | keys(judged)


@pytest.mark.parametrize("name", NAMES)
def test_every_set_says_whose_it_is(name):
    assert calibration_sets.read(name).licence and all(calibration_sets.attributions(name))
    assert registry.summary("calibration", name)


def test_photos_are_colour_and_large_enough_for_a_tile():
    photos = calibration_sets.load("photos")
    assert len(photos) >= 10
    assert all(photos.image(i).shape[2] == 3 and min(photos.size(i)) >= 256 for i in range(len(photos)))


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), calibration_sets.load("digits")
    assert len(ours) == len(theirs.images) and ours.labels == tuple("0123456789")
    for i in (0, 999, 1000, 1796):
        np.testing.assert_array_equal(ours.image(i)[..., 0], np.rint(theirs.images[i] * 255 / 16))
        assert ours.label(i) == theirs.target[i]


def test_latents_feed_a_generator_of_any_shape():
    stage = types.Stage("net", None, (types.TensorSpec("z", (1, 6, 1, 1)),), (types.TensorSpec("y", (1, 1, 8, 8)),))
    net = types.Model("net", "unconditional", (stage,))
    train = data.Dataset(calibration_sets.load_split("latents", "train"), net)
    judged = data.Dataset(calibration_sets.load_split("latents", "eval"), net)
    assert train[0].input.shape == (6, 1, 1) and data.overlap(train, judged) == 0


def test_loading_imports_neither_torch_nor_the_packages_whose_photos_it_reads():
    code = (
        "import sys; from edgegen import calibration_sets as c; c.load('photos'); c.load('digits');"
        "print([m for m in ('torch', 'skimage', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_refused_with_the_near_one():
    with pytest.raises(DataError, match="did you mean 'photos'"):
        calibration_sets.load("photo")
    with pytest.raises(DataError, match="train and eval"):
        calibration_sets.load_split("photos", "test")


PHOTO = """
[[photos]]
kind = "folder"
file = "{file}"
sha256 = "{sha256}"
split = "{split}"
licence = "CC0-1.0"
author = "a test"
source = "noise"
"""
HEAD = 'version = 1\nkind = "images"\ndescription = "d"\nlicence = "CC0-1.0"\npreprocessing = "p"\n'


def folder_set(tmp_path: Path, **changed: str) -> Path:
    """A set of two images beside its TOML file; `changed` replaces fields of the first."""
    text = HEAD
    for i, split in enumerate(("train", "eval")):
        image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        Image.fromarray(image).save(path)
        fields = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "split": split}
        text += PHOTO.format(**(fields | (changed if i == 0 else {})))
    (tmp_path / "mine.toml").write_text(text)
    return tmp_path / "mine.toml"


def test_a_folder_set_lies_beside_its_file(tmp_path):
    path = folder_set(tmp_path)
    source = calibration_sets.open_set(calibration_sets.read_file(path), path, ("train", "eval"))
    assert len(source) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sha256": "0" * 64}, "not the recorded file"),
        ({"file": "gone.png"}, "is missing"),
        ({"file": "../0.png"}, "lies outside"),
        ({"split": "both"}, r"photos\.0\.split.*'both'"),
        ({"sha256": "12"}, r"photos\.0\.sha256"),
    ],
)
def test_a_damaged_set_is_refused_and_the_field_named(tmp_path, changed, words):
    path = folder_set(tmp_path, **changed)
    with pytest.raises(DataError, match=words) as caught:
        calibration_sets.open_set(calibration_sets.read_file(path), path, ("train",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [("colour = 1", "colour"), ("version = 2", "version"), ('kind = "video"', "video"), ('licence = ""', "licence")],
)
def test_unknown_or_wrong_fields_are_named(tmp_path, line, words):
    path = folder_set(tmp_path)
    head = [old for old in HEAD.splitlines() if old.split("=")[0] != line.split("=")[0]]
    path.write_text("\n".join([*head, line]) + path.read_text().removeprefix(HEAD))
    with pytest.raises(DataError, match=words):
        calibration_sets.read_file(path)
