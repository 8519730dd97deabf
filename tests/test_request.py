"""What a user asks for: budgets with units, and an output folder that can take the bundle."""

import os

import pytest

from edgegen.errors import BundleError, RecipeError
from edgegen.request import Request, check_out, parse_drop, parse_quantity

SIZES = {"MB": 1e6, "kB": 1e3}


@pytest.mark.parametrize(
    ("text", "expected"), [("0.5", (0.5, "")), ("2%", (2.0, "%")), ("0", (0.0, "")), (" 1 dB ", (1.0, ""))]
)
def test_a_quality_drop_is_a_number_with_an_optional_percent_sign(text, expected):
    assert parse_drop(text) == expected


@pytest.mark.parametrize("text", ["-1", "much", "", "nan", "5 ms"])
def test_any_other_quality_drop_is_refused(text):
    with pytest.raises(RecipeError, match="--max-quality-drop must be"):
        parse_drop(text)


def test_quantities_are_read_in_their_unit():
    assert parse_quantity("2MB", "--max-size", SIZES) == 2e6
    assert parse_quantity("1.5 kb", "--max-size", SIZES) == 1500
    assert parse_quantity("3", "--max-size", SIZES) == 3e6
    for bad in ("0MB", "2TB", "-1MB", "big"):
        with pytest.raises(RecipeError, match="--max-size must be a positive number"):
            parse_quantity(bad, "--max-size", SIZES)


def test_an_output_folder_must_be_new_or_empty_unless_resuming(tmp_path):
    check_out(tmp_path / "new" / "deep", resume=False)
    used = tmp_path / "used"
    used.mkdir()
    check_out(used, resume=False)
    (used / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not empty"):
        check_out(used, resume=False)
    with pytest.raises(BundleError, match="not a bundle"):
        check_out(used, resume=True)
    (used / "manifest.json").write_text("{}")
    check_out(used, resume=True)
    with pytest.raises(BundleError, match="is a file"):
        check_out(used / "notes.txt", resume=False)
    with pytest.raises(BundleError, match="is a file"):
        check_out(used / "notes.txt" / "below", resume=False)


def test_an_output_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    # Root may write anywhere, so the system call's answer is put in its place.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BundleError, match="is not writable"):
        check_out(tmp_path / "out", resume=False)


def test_resuming_does_not_change_the_identity_of_a_run():
    one, other = Request(model="edsr", command="a"), Request(model="edsr", resume=True, command="b")
    assert one.identity() == other.identity()
    assert one.identity() != Request(model="edsr", seed=1).identity()
