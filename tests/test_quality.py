"""The gates: what counts as a drop in each task, and that wrong outputs are caught."""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from edgegen import conditions, quality, teacher
from edgegen.candidates import Candidate, within
from edgegen.errors import DataError, RecipeError
from edgegen.metrics._common import paired
from edgegen.types import Budget, Measurement, Model, PrecisionPlan, Preprocessing, Stage, TensorSpec


def model(task, value_range=(0.0, 1.0)):
    shape = (1, 3, 16, 16)
    outputs = (TensorSpec("y", shape, value_range=value_range),)
    return Model("m", task, (Stage("main", None, (TensorSpec("x", shape),), outputs),))


@dataclass
class Sample:
    input: np.ndarray
    reference: np.ndarray | None = None
    label: int | None = None


def figures(**values):
    return tuple(Measurement(name.replace("_", " "), "", value) for name, value in values.items())


@pytest.mark.parametrize(
    ("task", "teacher", "candidate", "expected"),
    [
        ("classification", {"top-1": 0.90}, {"top-1": 0.885}, 1.5),
        ("classification", {"top-1": 0.90}, {"top-1": 0.92}, -2.0),
        ("super-resolution", {"PSNR to the reference": 28.0}, {"PSNR to the reference": 27.6}, 0.4),
        ("image-to-image", {"PSNR to the teacher": 100.0}, {"PSNR to the teacher": 25.6}, 24.4),
        ("image-to-image", {"PSNR to the teacher": 100.0}, {"PSNR to the teacher": 100.0}, 0.0),
        ("unconditional", {"KID": 0.010}, {"KID": 0.004, "KID change from the teacher": -0.006}, 6.0),
    ],
)
def test_a_drop_is_in_the_unit_of_its_task(task, teacher, candidate, expected):
    gate = quality.gate(model(task), labelled=True)
    found = quality.drop(model(task), gate, figures(**teacher), figures(**candidate))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("right", range(3000, 4000, 7))
def test_twenty_of_4000_images_are_half_a_point_and_twenty_one_are_more(right):
    gate = quality.gate(model("classification"), labelled=True)
    shares = [{"top-1": (right - lost) / 4000} for lost in (0, 20, 21)]
    exact, over = (quality.drop(model("classification"), gate, figures(**shares[0]), figures(**s)) for s in shares[1:])
    assert exact <= 0.5 < over


def test_percent_means_perceptual_distance_and_only_for_images():
    gate = quality.gate(model("image-to-image"), labelled=False, unit="%")
    lost = quality.drop(model("image-to-image"), gate, (), figures(perceptual_distance_to_the_teacher=0.03))
    assert lost == pytest.approx(3.0)
    with pytest.raises(RecipeError, match="got task classification"):
        quality.gate(model("classification"), labelled=True, unit="%")


def test_a_figure_that_is_not_a_number_breaks_every_budget():
    gate = quality.gate(model("super-resolution"), labelled=False)
    bad = figures(**{"PSNR to the reference": math.nan})
    assert quality.drop(model("super-resolution"), gate, bad, bad) == math.inf


def evaluation(tmp_path, images, value_range=(0.0, 1.0)):
    teacher = tmp_path / "teacher.npy"
    np.save(teacher, images)
    data = [Sample(image, reference=image) for image in images]
    return quality.Evaluation(model("super-resolution", value_range), data, teacher)


def test_the_teacher_is_perfect_against_itself_and_zeros_and_doubles_are_not(tmp_path):
    images = np.random.default_rng(0).uniform(0.2, 0.5, (5, 3, 16, 16)).astype(np.float32)
    judged = evaluation(tmp_path, images)
    own = quality.find(judged.figures(judged.teacher), "PSNR to the teacher").value
    assert own >= 90
    for name, wrong in (("zeros", np.zeros_like(images)), ("doubled", 2 * images)):
        np.save(tmp_path / f"{name}.npy", wrong)
        found = judged.figures(tmp_path / f"{name}.npy")
        assert quality.find(found, "PSNR to the reference").value < 15
        assert quality.find(found, "SSIM to the teacher").value < 0.9


def test_a_build_that_breaks_images_is_refused_whatever_its_drop_and_the_kinds_are_counted(tmp_path):
    images = np.random.default_rng(0).uniform(0.2, 0.5, (6, 3, 16, 16)).astype(np.float32)
    images[5] = 0.0  # black already in the teacher's: no fault of the build
    judged, broken = evaluation(tmp_path, images), images + np.float32(0.02)
    broken[0], broken[1], broken[2], broken[5] = 0.0, 0.4, np.inf, 0.0
    np.save(tmp_path / "broken.npy", broken)
    found = judged.figures(tmp_path / "broken.npy")
    bad = quality.find(found, "bad images")
    assert bad.value == 0.5 and bad.conditions["kinds"] == {"not finite": 1, "black": 1, "flat": 1}
    told = "3 of 6 images are bad where the teacher's are not (1 not finite, 1 black, 1 flat)"
    assert quality.spoilt(found) == f"{told}; of the teacher's own 16.67% are"
    gate = quality.gate(judged.model, labelled=False)
    build = Candidate("net", "onnxruntime", None, figures=found, drop=0.0)
    assert within(build, Budget(max_quality_drop=0.5), gate).startswith(told)
    assert not within(build, Budget(), gate)  # the baseline, which quality never refuses
    np.save(tmp_path / "lighter.npy", images + np.float32(0.02))
    found = judged.figures(tmp_path / "lighter.npy")
    assert not within(dataclasses.replace(build, figures=found), Budget(max_quality_drop=0.5), gate)
    assert quality.find(found, "brightness shift from the teacher").value == pytest.approx(5.1, abs=1e-3)
    assert quality.find(found, "colour shift from the teacher").value == pytest.approx(0.0, abs=1e-3)


def test_one_figure_alone_is_the_same_as_among_all(tmp_path):
    images = np.random.default_rng(0).uniform(0.2, 0.5, (5, 3, 16, 16)).astype(np.float32)
    judged = evaluation(tmp_path, images)
    np.save(tmp_path / "off.npy", images + 0.01)
    whole = judged.figures(tmp_path / "off.npy")
    assert len(whole) == 7
    for figure in whole:
        assert judged.figures(tmp_path / "off.npy", figure.name) == (figure,)


def test_every_figure_says_which_data_which_network_and_which_sampler(tmp_path):
    images = np.random.default_rng(0).uniform(0.2, 0.5, (2, 3, 16, 16)).astype(np.float32)
    judged = evaluation(tmp_path, images)
    net = dataclasses.replace(judged.model, origin={"kind": "builtin", "config": {"truncation": 0.7}})
    loop = {"name": "ddim", "steps": 4, "guidance": 2.0}
    for figure in dataclasses.replace(judged, model=net).figures(judged.teacher, "", loop):
        assert figure.conditions["config"] == {"truncation": 0.7} and figure.conditions["sampler"] == loop
        assert {"data", "file_format", "fit", "n", "seed"} <= figure.conditions.keys()
    beside = dataclasses.replace(judged, real=lambda: iter([images]))  # as every dataset of images has
    assert not any("real" in figure.conditions for figure in beside.figures(judged.teacher))
    assert not any("sampler" in figure.conditions for figure in judged.figures(judged.teacher))
    photos = SimpleNamespace(kind="images", name="photos", names=("a/0.PNG", "b.jpg"))
    told = conditions.of_data(dataclasses.replace(net, options={"scale": 4}), photos)
    assert (told["data"], told["file_format"]) == ("photos", ".jpg, .png") and "by 4" in told["fit"]
    told = conditions.of_data(model("unconditional"), photos, photos)
    assert told["file_format"] == "none" and told["real_file_format"] == ".jpg, .png"
    assert "cover 16 x 16" in told["reference_fit"]
    small = dataclasses.replace(model("image-to-image"), preprocessing=Preprocessing(resize=20, crop=(18, 18)))
    said = "shorter side to 20, centre crop 18 x 18, resized to cover 16 x 16"
    assert conditions.of_data(small, photos)["fit"].startswith(said)


def test_luminance_decides_where_the_model_says_so(tmp_path):
    images = np.random.default_rng(0).uniform(0.2, 0.5, (5, 3, 16, 16)).astype(np.float32)
    judged = evaluation(tmp_path, images)
    judged = dataclasses.replace(judged, model=dataclasses.replace(judged.model, options={"luminance": True}))
    gate = quality.gate(judged.model, labelled=False)
    assert gate.figure == "luminance PSNR to the reference"
    assert "luminance" not in quality.gate(model("super-resolution"), labelled=False).figure
    off = {"blue": images + np.float32([0, 0, 0.1]).reshape(3, 1, 1), "all": images + np.float32(0.1)}
    found = {}
    for name, wrong in off.items():
        np.save(tmp_path / f"{name}.npy", wrong)
        found[name] = quality.find(judged.figures(tmp_path / f"{name}.npy"), gate.figure).value
    # 0.1 of full range is 0.1 * 24.966 / 255 of Y for blue, 0.1 * 219 / 255 for grey
    assert found["blue"] == pytest.approx(-20 * math.log10(0.1 * 24.966 / 255), abs=1e-3)
    assert found["all"] == pytest.approx(-20 * math.log10(0.1 * 219 / 255), abs=1e-3)


def test_the_value_range_of_the_output_is_taken_out_before_comparing(tmp_path):
    images = np.random.default_rng(0).uniform(0, 255, (4, 3, 16, 16)).astype(np.float32)
    judged = evaluation(tmp_path, images, (0.0, 255.0))
    np.save(tmp_path / "off.npy", np.clip(images + 2.55, 0, 510))
    found = quality.find(judged.figures(tmp_path / "off.npy"), "PSNR to the reference").value
    assert found == pytest.approx(40.0, abs=0.3)  # an offset of 1/100 of the range


def test_outputs_are_collected_in_order_and_in_blocks(tmp_path):
    count = quality.CHUNK * 2 + 3
    data = [Sample(np.full((2,), i, np.float32)) for i in range(count)]
    seen = []

    def double(inputs):
        seen.append(len(inputs))
        return 2 * inputs

    out = quality.collect(double, data, tmp_path / "o.npy", lambda text, share: None)
    assert np.array_equal(np.load(out)[:, 0], 2 * np.arange(count))
    assert max(seen) == quality.CHUNK


def test_large_images_are_judged_few_at_a_time_and_in_pairs(tmp_path):
    """What SSIM and features need is many times an image."""
    large = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) * np.ones((1, 3, 640, 640), np.float32)
    np.save(tmp_path / "large.npy", large)
    blocks = list(quality.rows(tmp_path / "large.npy"))
    assert [len(block) for block in blocks] == [3, 2]
    pairs = [(a, b) for a, b in paired(iter(blocks), iter([large]))]
    assert [a[:, 0, 0, 0].tolist() for a, _ in pairs] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_gain_beyond_what_may_be_lost_is_told_and_refuses_nothing():
    said = quality.gained(-1.25, 0.5, "points of top-1 (asked: 0.1; one image of this data is 0.5)")
    assert said == "; it gains 1.25 points of top-1 on its teacher, more than the 0.5 that it may lose"
    for lost, allowed in ((-0.5, 0.5), (0.2, 0.5), (math.inf, 0.5), (-math.inf, 0.5), (None, 0.5), (-3.0, None)):
        assert quality.gained(lost, allowed, "dB") == ""
    better = Candidate("net", "onnxruntime", None, drop=-1.25)
    gate = quality.gate(model("classification"), labelled=True)
    assert not within(better, Budget(max_quality_drop=0.5), gate)


def gate_of(low, high):
    """The drop of a student whose KID changed by the middle of (low, high), with that interval."""
    change = Measurement(quality.KID_CHANGE, "", (low + high) / 2, (low, high))
    found = (Measurement("KID", "", 0.01), change)
    return quality.drop(model("unconditional"), quality.gate(model("unconditional"), labelled=False), (), found)


def test_the_kid_gate_looks_at_the_interval_in_both_directions():
    assert gate_of(-0.001, 0.003) == pytest.approx(3.0)
    assert gate_of(-0.03, 0.002) == pytest.approx(30.0)  # better than the teacher is a change too
    assert gate_of(-0.03, 0.03) > gate_of(-0.002, 0.002)  # too few images: not shown to be small


@pytest.mark.parametrize(("middle", "told"), [(0.014, "+14"), (-0.02, "-20"), (0.021, ""), (float("nan"), "")])
def test_too_few_samples_to_decide_are_said(middle, told):
    figures = (Measurement("KID", "", 0.01), Measurement(quality.KID_CHANGE, "", middle, (-0.07, 0.09)))
    said = quality.undecided(quality.gate(model("unconditional"), labelled=False), figures, 20.0)
    assert said.startswith(f" (the change itself is {told}: too few") if told else said == ""
    assert not quality.undecided(quality.gate(model("classification"), labelled=True), figures, 20.0)


def generated(tmp_path, shift):
    from edgegen.nn.features import FeatureExtractor

    rng = np.random.default_rng(0)
    features = FeatureExtractor("plain", "0" * 64, lambda x: ([x], x.reshape(len(x), -1)))
    teacher = rng.random((60, 3, 4, 4)).astype(np.float32)
    np.save(tmp_path / "teacher.npy", teacher)
    np.save(tmp_path / "student.npy", np.clip(teacher + np.float32(shift), 0, 1))
    real = rng.random((70, 3, 4, 4)).astype(np.float32)
    shape = (1, 3, 4, 4)
    made = (TensorSpec("y", shape, value_range=(0.0, 1.0)),)
    net = Model("m", "unconditional", (Stage("main", None, (TensorSpec("z", (1, 5)),), made),))
    return quality.Evaluation(net, [], tmp_path / "teacher.npy", 0, features, real=lambda: [real])


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 0.0, 1e-9), (0.002, 0.001, 20.0), (0.3, 20.0, 1e9)])
def test_a_generator_is_judged_by_its_change_from_the_teacher(tmp_path, shift, least, most):
    judged = generated(tmp_path, shift)
    own = judged.figures(judged.teacher)
    gate = quality.gate(judged.model, labelled=False)
    assert quality.drop(judged.model, gate, own, own) == 0.0
    found = judged.figures(tmp_path / "student.npy")
    assert least <= quality.drop(judged.model, gate, own, found) <= most
    named = {"KID", quality.KID_CHANGE, "PSNR to the teacher", *quality.FAULTS.values()}
    assert {m.name for m in found} == named


def test_select_and_test_share_no_real_image_and_no_fresh_latent(tmp_path):
    from edgegen import inputs
    from edgegen.request import Request

    shape = (1, 1, 32, 32)
    made = (TensorSpec("y", shape, value_range=(-1.0, 1.0)),)
    net = Model("m", "unconditional", (Stage("main", None, (TensorSpec("z", (1, 5)),), made),))
    images = np.random.default_rng(0).integers(0, 255, (20, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", x=np.concatenate([images, images[:6]]))  # six of them twice
    found = inputs.prepare(Request(model="m", data=tmp_path / "real.npz", samples=12), net)
    parts = (found.select, found.test)
    sides = [{image.tobytes() for batch in part.real_images() for image in batch} for part in parts]
    assert len(sides[0]) == len(sides[1]) == 10 and not sides[0] & sides[1]
    assert not found.select.keys() & found.test.keys()
    assert [len(part) for part in found.fresh] == [12, 12] and not found.fresh[0].keys() & found.fresh[1].keys()


def test_an_extractor_without_maps_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "outputs").mkdir()
    np.save(tmp_path / "outputs" / "teacher-select.npy", np.zeros((2, 3, 16, 16), np.float32))
    net = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())\n"
    (tmp_path / "mapless.py").write_text(net)
    plain = SimpleNamespace(artifact=tmp_path, verdict="", graph=SimpleNamespace(plan=PrecisionPlan()))
    request = SimpleNamespace(seed=0, features=f"{tmp_path / 'mapless.py'}:net")
    part = SimpleNamespace(select=[Sample(np.zeros(1))], test=[Sample(np.zeros(1))], fresh=None)
    run = SimpleNamespace(model=model("image-to-image"), data=part, request=request, folder=tmp_path)
    with pytest.raises(DataError, match=r"mapless\.py:net gives pooled features alone; give --features cifar"):
        teacher.evaluations(run, [plain])
