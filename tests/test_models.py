"""The built-in networks: what they say of themselves is so, their shipped weights do their work, training resumes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from edgegen import registry  # noqa: E402
from edgegen.errors import ModelError  # noqa: E402
from edgegen.nn import encoders  # noqa: E402

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "assets"
NAMES = ("cifar_resnet", "dcgan", "edsr", "pix2pix_paint", "sagan_cifar")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/assets is not here")


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(name: str) -> nn.Module:
    """The built-in network with its shipped weights, read without the loader under test elsewhere."""
    module = registry.module("models", name).create()
    state = load_file(registry.PACKAGE / "models" / "weights" / f"{name}.safetensors")
    module.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return module.eval().requires_grad_(False)


def psnr(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    return float(-10 * torch.log10((reference - candidate).square().mean()))


@pytest.mark.parametrize("name", NAMES)
def test_record_tells_the_shapes_and_the_weights_fit(name: str):
    record = registry.module("models", name).RECORD
    given = torch.randn(*record["input"]["shape"], generator=torch.Generator().manual_seed(0))
    output = trained(name)(given)
    assert list(output.shape) == record["output"]["shape"]
    assert torch.isfinite(output).all()
    path = registry.PACKAGE / "models" / "weights" / f"{name}.safetensors"
    assert path.stat().st_size < 4_000_000


@pytest.mark.parametrize("name", NAMES)
def test_record_satisfies_the_schema_that_users_files_must_satisfy(name: str):
    records = pytest.importorskip("edgegen.records")
    record = records.complete(registry.module("models", name).RECORD, records.ModelOptions(), name)
    assert record.task and record.paper and record.licence != "unknown" and record.source


@pytest.mark.parametrize("name", [*NAMES, "ddpm_unet", "mnist_encoder"])
def test_the_recorded_run_made_the_shipped_file(name: str):
    from edgegen import files

    run = json.loads((ROOT / "benchmarks" / "results" / f"train-{name}.json").read_text(encoding="utf-8"))
    weights = ROOT / run["weights"]["file"]
    assert files.sha256(weights) == run["weights"]["sha256"]
    assert run["curve"][-1]["step"] == run["steps"]


def test_the_denoiser_makes_digits():
    from edgegen import loading, samplers
    from edgegen.nn import diffusion

    pytest.importorskip("diffusers")
    model = loading.load_model("ddpm_unet")
    settings = samplers.of({**model.options, "sampler": {"name": "ddim", "steps": 10}})
    latents = np.random.default_rng(5).standard_normal((16, 1, 32, 32), dtype=np.float32)
    run = diffusion.runner(model.stage.module)
    made = torch.from_numpy(samplers.generate(settings, run, latents)).clamp(-1, 1) / 2 + 0.5

    def digits(images: torch.Tensor) -> float:
        """Share with a black border, some ink, and a digit that the encoder is sure of."""
        border = torch.cat((images[:, 0, :3].flatten(1), images[:, 0, -3:].flatten(1)), 1).mean(1)
        with torch.no_grad():
            sure = encoders.create("mnist").classify(images).softmax(1).amax(1)
        return float(((border < 0.02) & (images.mean((1, 2, 3)) > 0.03) & (sure > 0.9)).float().mean())

    assert digits(made) > 0.4  # 0.73 of 2,000 images of 50 steps were sure: benchmarks/results/train-ddpm_unet.json
    assert digits(torch.from_numpy(latents).clamp(-1, 1) / 2 + 0.5) == 0
    assert (registry.PACKAGE / "models" / "weights" / "ddpm_unet.safetensors").stat().st_size < 4_000_000


@pytest.mark.parametrize("name", ["cifar_resnet", "dcgan", "edsr"])
def test_pruning_follows_the_channels(name: str):
    pruning = pytest.importorskip("torch_pruning")
    module = registry.module("models", name).create()
    shape = registry.module("models", name).RECORD["input"]["shape"]
    last = {"edsr": "tail", "dcgan": "up3", "cifar_resnet": "head"}[name]
    before, example = sum(p.numel() for p in module.parameters()), torch.randn(*shape)
    expected = module.eval()(example).shape
    pruner = pruning.pruner.MagnitudePruner(
        module, example, pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[module.get_submodule(last)],
    )
    pruner.step()
    assert module(example).shape == expected
    assert sum(p.numel() for p in module.parameters()) < 0.4 * before


def test_untrained_edsr_is_a_bilinear_enlargement():
    edsr = registry.module("models", "edsr").create(channels=8, blocks=2)
    x = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
    assert torch.allclose(edsr(x), expected, atol=1e-6)


def test_edsr_is_clearly_better_than_bicubic_on_a_photo_it_never_saw():
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    high = data.astronaut()[:256, 96:352]
    low = Image.fromarray(high).resize((64, 64), Image.Resampling.BICUBIC)
    large = np.asarray(low.resize((256, 256), Image.Resampling.BICUBIC))
    reference, bicubic, x = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 for image in (high, large, low)
    )
    gain = psnr(reference, trained("edsr")(x).clamp(0, 1)) - psnr(reference, bicubic)
    assert gain > 1.5  # dB


def test_dcgan_draws_every_digit_and_draws_them_clearly():
    z = torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    images = trained("dcgan")(z)
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    encoder = encoders.create("mnist")
    sure, digit = encoder.classify((images + 1) / 2).softmax(1).max(1)
    assert float((sure > 0.9).float().mean()) > 0.4
    assert int(torch.bincount(digit, minlength=10).min()) >= 8  # 40 expected of each
    noise = torch.rand(400, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    unsure = encoder.classify(noise).softmax(1).max(1)
    assert len(torch.bincount(unsure.indices).nonzero()) < 5  # the check above can fail: noise is not ten digits


def test_the_colour_generator_draws_the_class_that_is_asked_for():
    model, encoder = trained("sagan_cifar"), encoders.create("cifar")
    z = torch.randn(500, 138, generator=torch.Generator().manual_seed(3))
    z[:, 128:] = F.one_hot(torch.arange(500) % 10, 10)

    def seen(images: torch.Tensor) -> float:
        """Share in which the classifier sees the class asked for."""
        found = trained("cifar_resnet").head(encoder(images)[1]).argmax(1)
        return float((found == torch.arange(500) % 10).float().mean())

    images = (model(z) + 1) / 2
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert seen(images) > 0.6  # 0.68 of 5,000: benchmarks/results/train-sagan_cifar.json
    assert seen(images.roll(1, 0)) < 0.3  # with the classes of the neighbours


@needs_shared
def test_cifar_resnet_on_images_it_never_saw():
    archive = np.load(SHARED / "cifar10-test.npz")
    module, given = trained("cifar_resnet"), registry.module("models", "cifar_resnet").RECORD["input"]
    mean, std = (torch.tensor(given[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = (torch.from_numpy(archive["x"][::16]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    found = torch.cat([module(part) for part in x.split(250)]).argmax(1).numpy()
    assert float((found == archive["y"][::16]).mean()) > 0.84


@needs_shared
def test_mnist_encoder_knows_digits():
    archive = np.load(SHARED / "mnist-test.npz")
    x = F.pad(torch.from_numpy(archive["x"][::10].reshape(-1, 1, 28, 28)).float() / 255, (2, 2, 2, 2))
    found = encoders.create("mnist").classify(x).argmax(1).numpy()
    assert float((found == archive["y"][::10]).mean()) > 0.98


@pytest.mark.parametrize(("name", "widths"), [("cifar", [16, 64, 128]), ("mnist", [16, 32, 64, 64])])
@pytest.mark.parametrize("size", [(32, 32), (48, 65)])
def test_encoders_give_maps_and_a_vector_for_any_size(name: str, widths: list[int], size: tuple[int, int]):
    maps, pooled = encoders.create(name)(torch.rand(2, 3, *size))
    assert [m.shape[1] for m in maps] == widths
    assert maps[0].shape[2:] == size
    assert pooled.shape == (2, widths[-1])
    assert torch.allclose(pooled, maps[-1].mean((2, 3)))


def test_encoders_take_grey_as_colour_and_colour_as_grey():
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    cifar, mnist = encoders.create("cifar"), encoders.create("mnist")
    assert torch.allclose(cifar(grey)[1], cifar(grey.repeat(1, 3, 1, 1))[1], atol=1e-5)
    colour = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(mnist(colour)[1], mnist(colour.mean(1, keepdim=True))[1], atol=1e-5)
    assert not torch.allclose(cifar(colour)[1], cifar(colour.mean(1, keepdim=True))[1], atol=1e-2)


def test_the_cifar_encoder_is_the_classifiers_body():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder, classifier = encoders.create("cifar"), trained("cifar_resnet")
    logits = classifier((x - encoder.mean) / encoder.std)
    assert torch.allclose(classifier.head(encoder(x)[1]), logits, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 2, 32, 32), (3, 32, 32)])
def test_encoders_refuse_what_they_cannot_see(shape: tuple[int, ...]):
    with pytest.raises(ModelError, match="at least 32"):
        encoders.create("mnist")(torch.rand(shape))


def test_unknown_encoder_names_the_near_match():
    with pytest.raises(ModelError, match="did you mean 'mnist'"):
        encoders.weights_path("minst")
    assert encoders.weights_path("mnist").stat().st_size < 300_000


@pytest.fixture
def training(monkeypatch):
    """The training scripts' folder on the path, as when one of them runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "train"))
    kept = {name: sys.modules.pop(name, None) for name in ("common", "edsr", "cifar", "encoder", "dcgan", "paint")}
    yield importlib.import_module
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_the_painting_filter_takes_the_mean_of_the_calmest_square(training):
    paint = training("paint")
    flat = np.full((9, 12, 3), (10, 200, 90), np.uint8)
    assert np.array_equal(paint.painted(flat), flat)
    edge = flat.copy()
    edge[:, 6:] = (250, 20, 30)
    assert np.array_equal(paint.painted(edge), edge)  # a blur of any kind would mix the two colours
    noisy = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    squares = [noisy[y:y + 3, x:x + 3].reshape(9, 3).astype(float) for y in (6, 8) for x in (5, 7)]  # around (8, 7)
    calmest = min(squares, key=lambda square: (square @ (0.299, 0.587, 0.114)).var())
    assert np.array_equal(paint.painted(noisy, 2)[8, 7], calmest.mean(0).round())
    data = [[(noisy.repeat(10, 0).repeat(10, 1), noisy.repeat(10, 0).repeat(10, 1))]]
    photos, paintings = paint.batch(data, 0, 3)
    assert photos.shape == (16, 3, 128, 128) and torch.equal(photos, paintings)  # cut and turned alike
    assert torch.equal(paint.batch(data, 0, 3)[0], photos) and not torch.equal(paint.batch(data, 0, 4)[0], photos)


def test_the_painter_comes_much_nearer_to_a_painting_than_the_photo_is(training):
    data = pytest.importorskip("skimage.data")
    paint = training("paint")
    photo = paint.fitted(data.rocket(), 128)[:, :128]  # learnt from others
    painting = torch.from_numpy(paint.painted(photo).copy()).float() / 255
    made = torch.from_numpy(paint.made(trained("pix2pix_paint"), photo))
    before, after = (psnr(painting, image) for image in (torch.from_numpy(photo.copy()).float() / 255, made))
    assert after > before + 2, (before, after)  # dB


def test_a_stopped_training_ends_with_the_same_bits(training, tmp_path: Path, capsys):
    common = training("common")

    def run(stop: int | None, checkpoint: Path) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        state = common.Run("test", 20, 5, checkpoint, {"model": model, "optimizer": optimizer})

        def step(index: int) -> dict[str, float]:
            if index == stop:
                state.save()
                raise KeyboardInterrupt
            x = torch.from_numpy(common.generator(5, index).standard_normal((8, 4), dtype=np.float32))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        common.train(state, step, evaluate=dict, every=10)
        return model.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        run(10, tmp_path / "stopped.pt")
    assert torch.equal(run(None, tmp_path / "stopped.pt"), run(None, tmp_path / "whole.pt"))


def test_average_moves_towards_the_source_and_copies_buffers(training):
    common = training("common")
    source = nn.BatchNorm1d(2)
    average = common.Average(source, 0.9)
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(5.0)
    average.update(source, 1000)
    assert torch.allclose(average.module.weight, torch.full((2,), 0.9 * 1 + 0.1 * 3))
    assert torch.equal(average.module.running_mean, torch.full((2,), 5.0))


def test_kid_of_two_points_in_closed_form(training):
    pytest.importorskip("PIL")
    kid = training("dcgan").kid
    first, second = np.array([[1.0], [2.0]]), np.array([[0.0], [0.0]])
    # kernel (xy + 1)^3: within first 3^3, within second 1, across 1
    assert kid(first, second) == pytest.approx(27 + 1 - 2)


@needs_shared
def test_no_evaluation_photo_is_trained_on(training):
    pytest.importorskip("skimage")
    script = training("edsr")
    held = list(script.evaluation_photos().values())
    photos = [photo for photo, _ in script.training_photos()]
    assert len(photos) == 34
    assert not any(np.array_equal(photo, other) for photo in photos for other in held)


@needs_shared
def test_batches_are_a_function_of_seed_and_step(training):
    script = training("edsr")
    rng = np.random.default_rng(0)
    data = [[script.pair(rng.integers(0, 256, (160, 200, 3), dtype=np.uint8))] for _ in range(3)]
    first, again, other = (script.batch(data, 0, step)[1] for step in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    low, high = script.batch(data, 0, 4)
    reduced = F.interpolate(high, scale_factor=0.25, mode="bicubic", antialias=True)
    assert psnr(reduced[:, :, 4:-4, 4:-4], low[:, :, 4:-4, 4:-4]) > 45  # the pair shows the same place, turned alike
