"""Bad input on the command line: one line that says what, got, allowed and what to do; exit code 2; nothing written."""

import io
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="compress needs the extra `torch`")

import torch
from PIL import Image
from safetensors.torch import save_file

from edgegen import cli

USER_FILE = '''
from torch import nn
RECORD = {
    "task": "classification",
    "input": {"shape": [1, 3, 16, 16], "value_range": [0, 1], "mean": [], "std": []},
    "output": {"shape": [1, 10]},
}
def net():
    body = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4, 10))
def bare():
    return nn.Conv2d(3, 3, 3)
def broken():
    raise RuntimeError("no such luck")
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a user's network, good weights and a few images; the cache is in it, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    Path("net.py").write_text(USER_FILE)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )  # fmt: skip
    save_file(module.state_dict(), "good.safetensors")
    Path("images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(f"images/{i:02d}.png")
    return tmp_path


def run(capsys, monkeypatch, *arguments):
    """(exit code, lines on stderr) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["edgegen", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return code, [line for line in capsys.readouterr().err.splitlines() if line]


def refused(capsys, monkeypatch, *arguments, out="out"):
    """The one line with which `compress` refuses its arguments; checks exit code and that nothing was written."""
    before = sorted(str(p) for p in Path(".").rglob("*") if "npz" not in p.parts)
    code, lines = run(capsys, monkeypatch, "compress", "--quiet", "--out", out, *arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("edgegen: ")
    assert sorted(str(p) for p in Path(".").rglob("*") if "npz" not in p.parts and p.suffix != ".pyc") == before
    return lines[0]


NET = ("--model", "net.py:net", "--weights", "good.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "edsrr"), "did you mean 'edsr'"),
        (("--model", "timm:resnet51"), "did you mean"),
        (("--model", "edsr", "--target", "jetsn"), "did you mean 'jetson'"),
        (("--model", "edsr", "--recipe", "balancd"), "did you mean 'balanced'"),
        (("--model", "edsr", "--keep", "distil"), "did you mean 'distill'"),
        (("--model", "edsr", "--train-device", "gpu"), "must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("--model", "edsr", "--max-latancy", "5ms"), "did you mean '--max-latency'"),
        (("--model", "edsr", "--max-quality-drop", "lots"), "--max-quality-drop must be"),
        (("--model", "edsr", "--max-size", "2parsec"), "--max-size must be"),
        (("--model", "edsr", "--calibration", "photoz"), "did you mean 'photos'"),
        (("--model", "nowhere.py:net"), "nowhere.py"),
        (("--model", "net.py:nett"), "nett"),
        (("--model", "net.py:broken", "--weights", "good.safetensors"), "no such luck"),
        (("--model", "net.py:net"), "--weights"),
        ((*NET, "--input-shape", "1,three,16,16"), "--input-shape must be"),
        ((*NET, "--data", "nowhere"), "nowhere"),
        (NET, "--data"),
    ],
    ids=lambda value: " ".join(value[1:])[:40] if isinstance(value, tuple) else "",
)
def test_unknown_names_and_values_get_one_line_with_the_near_match(place, capsys, monkeypatch, arguments, words):
    assert words in refused(capsys, monkeypatch, *arguments)


def test_an_unknown_pass_or_option_in_a_recipe_gets_the_near_match(place, capsys, monkeypatch):
    Path("r.toml").write_text("schema = 1\n[[steps]]\npass = 'quantise'\n")
    assert "did you mean 'quantize'" in refused(capsys, monkeypatch, "--model", "edsr", "--recipe", "r.toml")


class Code:
    def __reduce__(self):
        return (Path("pwned").touch, ())


def damaged(kind):
    good = Path("good.safetensors").read_bytes()
    state = {k: v.clone() for k, v in torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).state_dict().items()}
    if kind == "truncated":
        Path("bad.safetensors").write_bytes(good[: len(good) // 2])
    elif kind == "nan":
        save_file({**state, "0.bias": torch.full((4,), float("nan"))}, "bad.safetensors")
    elif kind == "shape":
        save_file(
            {"0.weight": torch.zeros(8, 3, 3, 3), "0.bias": torch.zeros(4), "4.weight": torch.zeros(10, 4),
             "4.bias": torch.zeros(10)}, "bad.safetensors",
        )  # fmt: skip
    elif kind == "partial":
        save_file(state, "bad.safetensors")
    elif kind == "pickle":
        buffer = io.BytesIO()
        pickle.dump({"0.weight": Code()}, buffer)
        Path("bad.pth").write_bytes(buffer.getvalue())
        return "bad.pth"
    elif kind == "zipped pickle":
        torch.save({"0.weight": Code()}, "bad.pth")
        return "bad.pth"
    return "bad.safetensors"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "bad.safetensors"),
        ("nan", "0.bias"),
        ("shape", "0.weight"),
        ("partial", "4.weight"),
        ("pickle", "bad.pth"),
        ("zipped pickle", "bad.pth"),
        ("absent", "bad.safetensors"),
    ],
)
def test_damaged_weights_are_refused_and_code_in_them_is_not_run(place, capsys, monkeypatch, kind, words):
    file = damaged(kind)
    line = refused(capsys, monkeypatch, "--model", "net.py:net", "--weights", file, "--data", "images")
    assert words in line
    assert not Path("pwned").exists()


def test_an_onnx_file_cut_in_half_is_refused(place, capsys, monkeypatch):
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 16, 16])],
    )
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(whole))
    Path("half.onnx").write_bytes(whole[: len(whole) // 2])
    line = refused(capsys, monkeypatch, "--model", "half.onnx", "--task", "classification", "--value-range", "0,1",
                   "--mean", "0,0,0", "--std", "1,1,1", "--data", "images")  # fmt: skip
    assert "half.onnx" in line


def test_a_folder_without_images_is_refused(place, capsys, monkeypatch):
    Path("empty").mkdir()
    Path("empty/readme.txt").write_text("nothing here")
    assert "empty" in refused(capsys, monkeypatch, *NET, "--data", "empty")


def test_more_than_a_tenth_of_broken_images_stops_and_names_them(place, capsys, monkeypatch):
    for i in (3, 7):
        Path(f"images/{i:02d}.png").write_bytes(b"\x89PNG broken")
    line = refused(capsys, monkeypatch, *NET, "--data", "images")
    assert "03.png" in line
    assert "2" in line


def test_a_pickled_npz_is_refused(place, capsys, monkeypatch):
    with zipfile.ZipFile("bad.npz", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Code()], dtype=object), allow_pickle=True)
        archive.writestr("x.npy", buffer.getvalue())
    assert "bad.npz" in refused(capsys, monkeypatch, *NET, "--data", "bad.npz")
    assert not Path("pwned").exists()


def test_an_output_folder_that_is_not_empty_is_refused(place, capsys, monkeypatch):
    Path("used").mkdir()
    Path("used/mine.txt").write_text("keep me")
    assert "not empty" in refused(capsys, monkeypatch, "--model", "edsr", out="used")
    assert Path("used/mine.txt").read_text() == "keep me"


def test_data_to_judge_on_is_refused_where_nothing_is_judged(place, capsys, monkeypatch):
    said = refused(capsys, monkeypatch, *NET, "--eval-data", "images", "--latency-only")
    assert "--eval-data images: --latency-only judges no quality" in said


def test_random_data_for_calibration_is_refused_by_name(place, capsys, monkeypatch):
    assert "--latency-only" in refused(capsys, monkeypatch, *NET, "--data", "images", "--calibration", "random")


def test_calibration_images_that_are_also_judged_on_are_refused(place, capsys, monkeypatch):
    Path("judge").mkdir()
    rng = np.random.default_rng(1)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(f"judge/{i}.png")
    line = refused(
        capsys, monkeypatch, *NET, "--data", "images", "--eval-data", "judge", "--calibration", "judge", "--recipe",
        "post-training",
    )  # fmt: skip
    assert "evaluation" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "nowhere"), "nowhere"),
        (("verify", "images"), "images"),
        (("list", "modles"), "did you mean 'models'"),
        (("reproduce", "images"), "images"),
        (("compres",), "compres"),
    ],
)
def test_other_commands_refuse_in_one_line_too(place, capsys, monkeypatch, arguments, words):
    code, lines = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert words in lines[0]
