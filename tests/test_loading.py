"""Names and files become a `Model` with everything stated, or are refused with one line that says what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgegen import loading, origins, records, registry, weights
from edgegen.errors import ModelError
from edgegen.loading import ModelOptions, load_model
from edgegen.types import Preprocessing

ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"
GREY = ModelOptions(task="restoration", input_shape=(1, 8, 8), value_range=(0, 1), mean=(), std=(), output_range=(0, 1))


CODE = '''
import torch
from torch import nn
from dataclasses import dataclass

RECORD = {
    "task": "image-to-image",
    "input": {"shape": [1, 3, 8, 8], "value_range": [0, 255], "mean": [], "std": []},
    "output": {"shape": [1, 3, 8, 8], "value_range": [0, 255]},
    "licence": "BSD-3-Clause",
}
RECORDS = {
    "trained": {**RECORD, "weights": "factory"},
    "classes": {"task": "classification", "input": RECORD["input"]},
    "typo": {**RECORD, "licens": "MIT"},
    "off": {**RECORD, "output": {"shape": [1, 3, 16, 16], "value_range": [0, 1]}},
    "twice": {"task": "super-resolution", "input": RECORD["input"], "output": {"value_range": [0, 255]}},
    "wrong": {**RECORD, "input": {"shape": [1, 3, 8, -8]}},
}

@dataclass
class Size:
    width: int = 4

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, 3, 1)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))

def create(width=4):
    return Net(Size(width).width)

trained = off = typo = wrong = create

def raises():
    raise RuntimeError("first line\\nsecond line")

def quits():
    raise SystemExit(3)

def number():
    return 3

def pair():
    class Two(Net):
        def forward(self, x):
            return x, x
    return Two(4)

def nans():
    class Nan(Net):
        def forward(self, x):
            return x / x
    return Nan(4)

def classes():
    return nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def twice():
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2))

def bare():
    return nn.Conv2d(1, 1, 1)
'''


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A user's file, and weights for its `create`."""
    file = tmp_path / "mine.py"
    file.write_text(CODE, encoding="utf-8")
    torch.manual_seed(3)
    weights.save_state(origins.call(origins.factory(file, "create"), {}, "x"), tmp_path / "mine.safetensors")
    return file


def _refused(spec: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_and_factory_with_weights(code: Path, tmp_path: Path) -> None:
    model = load_model(f"{code}:create", weights=tmp_path / "mine.safetensors")
    assert (model.name, model.task, model.provenance.licence) == ("mine", "image-to-image", "BSD-3-Clause")
    assert model.stage.inputs[0].shape == model.stage.outputs[0].shape == (1, 3, 8, 8)
    assert model.stage.inputs[0].value_range == model.stage.outputs[0].value_range == (0, 255)
    assert model.preprocessing == Preprocessing(value_range=(0, 255))
    assert model.provenance.weights_sha256 == weights.state_hash(model.stage.module)
    stored = weights.read_state(tmp_path / "mine.safetensors")
    assert torch.equal(model.stage.module.a.weight, stored["a.weight"])
    assert not model.stage.module.training and all(p.requires_grad for p in model.stage.module.parameters())
    assert loading.capabilities(model) == {"train"}
    again = origins.create(model.origin)
    assert type(again).__name__ == "Net"


def test_factory_takes_config_and_options_go_before_the_record(code: Path) -> None:
    options = ModelOptions(input_shape=(3, 12, 16), value_range=(-1, 1), config={"width": 6})
    model = load_model(f"{code}:trained", options=options)
    assert model.stage.inputs[0].shape == model.stage.outputs[0].shape == (1, 3, 12, 16)
    assert model.stage.inputs[0].value_range == (-1, 1) and model.stage.outputs[0].value_range == (0, 255)
    assert model.stage.module.a.out_channels == 6 and model.origin["config"] == {"width": 6}


def test_untrained_file_is_refused_unless_latency_only(code: Path) -> None:
    message = _refused(f"{code}:create")
    assert "--weights FILE" in message and "--latency-only" in message and "'weights': 'factory'" in message
    model = load_model(f"{code}:create", latency_only=True)
    assert model.options["latency_only"] is True
    assert load_model(f"{code}:trained").options == {}


def test_latency_only_weights_are_seeded_and_norms_random(code: Path) -> None:
    def loaded(seed: int) -> nn.Module:
        return load_model(f"{code}:create", options=ModelOptions(seed=seed), latency_only=True).stage.module

    before = torch.random.get_rng_state()
    first = loaded(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert weights.state_hash(first) == weights.state_hash(loaded(1)) != weights.state_hash(loaded(2))
    scale = first.norm.weight.detach()
    assert 0.5 <= float(scale.min()) < float(scale.max()) <= 1.5


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("craete", r"has no factory 'craete', did you mean 'create'\?; it has: .*create"),
        ("raises", r"raises failed: RuntimeError: first line \(mine\.py, line \d+\)$"),
        ("quits", "quits failed: SystemExit: 3"),
        ("number", r"number must return a torch nn\.Module, got int"),
        ("pair", "must give one float tensor, got tuple"),
        ("nans", "gives NaN or infinity"),
        ("typo", "typo: licens: Extra inputs are not permitted, got 'MIT'"),
        ("wrong", r"wrong: input\.shape \(--input-shape\): Input should be greater than 0, got '-8'"),
        ("off", r"has shape \(1, 3, 8, 8\), the record says \(1, 3, 16, 16\)"),
    ],
)
def test_bad_factories_are_one_line(code: Path, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(f"{code}:{factory}", latency_only=True)
    assert "\n" not in _refused(f"{code}:{factory}", latency_only=True)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    assert "no such file" in _refused(tmp_path / "none.py:create")
    assert "name the function" in _refused(tmp_path / "mine.py")
    bad = {"def (": "SyntaxError", "import nowhere_at_all": "ModuleNotFoundError", "1/0": "line 1"}
    for text, message in bad.items():
        (tmp_path / "bad.py").write_text(text, encoding="utf-8")
        assert message in _refused(f"{tmp_path / 'bad.py'}:create")
    (tmp_path / "bad.py").write_text("RECORD = 3\ndef create(): pass", encoding="utf-8")
    assert "RECORD must be a dict, got int" in _refused(f"{tmp_path / 'bad.py'}:create")


def test_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_d1.py").write_text("WIDTH = 5", encoding="utf-8")
    text = CODE.replace("def create(width=4)", "from neighbour_d1 import WIDTH\ndef create(width=WIDTH)")
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    assert load_model(f"{tmp_path / 'mine.py'}:trained").stage.module.a.out_channels == 5


def test_nothing_is_guessed_and_everything_missing_is_named_at_once(code: Path) -> None:
    code.write_text("from torch import nn\ndef bare(): return nn.Conv2d(1, 1, 1)", encoding="utf-8")
    spec = f"{code}:bare"
    assert "give --task, --input-shape" in _refused(spec, latency_only=True)
    asked = ModelOptions(task="restoration", input_shape=(1, 8, 8))
    message = _refused(spec, options=asked, latency_only=True)
    assert "give --value-range, --mean, --std, --output-range ('none' for no normalisation)" in message
    model = load_model(spec, options=GREY, latency_only=True)
    assert model.preprocessing.colour == "L" and model.preprocessing.mean == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "segmentation"}, r"task \(--task\): .*, got 'segmentation'"),
        ({"value_range": (1, 0)}, "goes from low to high"),
        ({"mean": (0.5,), "std": ()}, "mean has 1 values and std 0"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "2 values for 1 channels"),
        ({"mean": (0.5,), "std": (0.0,)}, r"input\.std \(--std\)"),
        ({"input_shape": (2, 1, 8, 8)}, "batch, which must be 1"),
        ({"input_shape": (8, 8)}, "is 1,C,H,W, got 8,8"),
        ({"input_shape": (3, 8, 8)}, "the forward pass on zeros of shape .*check --input-shape"),
        ({"task": "classification"}, r"a classifier gives \(1, classes\), got \(1, 1, 8, 8\)"),
        ({"colour": "BGR"}, r"input\.colour \(--colour\)"),
        ({"resize": 0}, r"input\.resize \(--resize\)"),
        ({"task": "super-resolution", "scale": 2}, "stated scale 2"),
        ({"task": "super-resolution", "scale": 0}, "--scale must be"),
    ],
)
def test_wrong_options_name_their_flag(code: Path, change: dict[str, Any], message: str) -> None:
    code.write_text(CODE.replace("    \"twice\"", "    \"bare\": {},\n    \"twice\""), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load_model(f"{code}:bare", options=dataclasses.replace(GREY, **change), latency_only=True)


def test_super_resolution_scale_is_read_from_the_network(code: Path) -> None:
    assert load_model(f"{code}:twice", latency_only=True).options["scale"] == 2
    model = load_model(f"{code}:classes", options=ModelOptions(mean=(), std=()), latency_only=True)
    assert model.stage.outputs[0].shape == (1, 10) and model.stage.outputs[0].value_range is None


@pytest.mark.parametrize("name", ["edsr", "dcgan", "cifar_resnet"])
def test_built_in_models_load(name: str) -> None:
    if name not in registry.names("models"):
        pytest.skip(f"models/{name}.py is not there")
    model = load_model(name, latency_only=True)
    spec = model.stage.outputs[0]
    assert spec.shape == tuple(registry.module("models", name).RECORD["output"]["shape"])
    assert model.origin == {"kind": "builtin", "name": name, "config": {}}
    assert isinstance(origins.create(model.origin), type(model.stage.module))


def test_unknown_names_get_their_near_match(tmp_path: Path) -> None:
    assert "unknown model 'edrs', did you mean 'edsr'?" in _refused("edrs")
    assert "unknown timm model 'resnet19', did you mean 'resnet" in _refused("timm:resnet19")
    assert "unknown timm model 'hf-hub:someone/net'" in _refused("timm:hf-hub:someone/net")
    assert "FILE.py:FACTORY with --weights FILE" in _refused(tmp_path / "weights.pth")


def test_built_in_without_shipped_weights_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = registry.folder("models")
    monkeypatch.setattr(registry, "folder", lambda kind: tmp_path if kind == "models" else models)
    assert "edsr comes without trained weights: give --weights FILE" in _refused("edsr")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "efficientformer_l1"])
def test_timm_networks_load_for_latency_and_are_refused_otherwise(name: str) -> None:
    assert "--weights FILE, or --latency-only" in _refused(f"timm:{name}")
    model = load_model(f"timm:{name}", latency_only=True)
    assert (model.name, model.task, model.provenance.licence) == (name, "classification", "apache-2.0")
    assert model.stage.inputs[0].shape == (1, 3, 224, 224) and model.stage.outputs[0].shape == (1, 1000)
    size = {"deit_tiny_patch16_224": 249, "efficientformer_l1": 236}[name]
    given = model.preprocessing
    assert (given.resize, given.crop, given.mean) == (size, (224, 224), (0.485, 0.456, 0.406))
    scales = [p for n, p in model.stage.module.named_parameters() if "norm" in n and n.endswith("weight")]
    assert scales and all(float(p.detach().std()) > 0.1 for p in scales)


def test_timm_weights_and_config(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    trained = timm.create_model("resnet10t", num_classes=4)
    weights.save_state(trained, tmp_path / "w.safetensors")
    options = ModelOptions(config={"num_classes": 4}, input_shape=(3, 64, 64))
    model = load_model("timm:resnet10t", weights=tmp_path / "w.safetensors", options=options)
    assert weights.state_hash(model.stage.module) == weights.state_hash(trained)
    assert "failed: TypeError" in _refused("timm:resnet10t", options=ModelOptions(config={"nub": 4}), latency_only=True)


def test_a_real_network_through_file_and_factory(tmp_path: Path) -> None:
    if not ASSETS.is_dir():
        pytest.skip("../shared/assets is not here")
    (tmp_path / "wrap.py").write_text(
        "from torch import nn\n"
        "RECORD = {'task': 'restoration', 'output': {'value_range': [0, 1]},\n"
        "          'input': {'shape': [1, 1, 16, 16], 'value_range': [0, 1], 'mean': [], 'std': []}}\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        wide = [m for _ in range(15) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]\n"
        "        first, last = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 1, 3, padding=1)\n"
        "        self.model = nn.Sequential(first, nn.ReLU(), *wide, last)\n"
        "    def forward(self, x):\n"
        "        return x - self.model(x)\n"
        "def dncnn():\n"
        "    return Net()\n",
        encoding="utf-8",
    )
    model = load_model(f"{tmp_path / 'wrap.py'}:dncnn", weights=ASSETS / "dncnn" / "dncnn_25.pth")
    torch.manual_seed(0)
    noise = torch.randn(1, 1, 16, 16) * 25 / 255
    with torch.no_grad():
        cleaned = model.stage.module(0.5 + noise) - 0.5
    assert float(cleaned.std()) < 0.4 * float(noise.std())
    message = _refused(f"{tmp_path / 'wrap.py'}:dncnn", weights=ASSETS / "resnet20-cifar10.th")
    assert "missing [model.0.weight" in message and "unexpected [conv1.weight" in message


def test_the_schema_of_records_knows_every_flag() -> None:
    fields = {f"input.{name}" for name in records.InputRecord.model_fields}
    assert fields <= set(records._FLAGS) | {"output.shape"}
