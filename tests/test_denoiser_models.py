"""The denoisers' records and networks: trained where sampling starts, and of the sizes that their papers state."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from edgegen import registry, samplers  # noqa: E402
from edgegen.models import sinddm  # noqa: E402

DENOISERS = [name for name in registry.names("models")
             if "sampler" in registry.module("models", name).RECORD.get("options", {})]  # fmt: skip


@pytest.mark.parametrize("name", DENOISERS)
def test_sampling_starts_where_training_ends_at_next_to_pure_noise(name: str):
    options = registry.module("models", name).RECORD["options"]
    bars = samplers.alpha_bars(options["schedule"], options["train_steps"])
    assert bars[-1] ** 0.5 < 0.1, "latents N(0, 1) are no input that the network was trained on"
    settings = samplers.of(options)
    assert settings is not None and samplers.levels(settings)[0].alpha < 0.1


def test_the_built_in_denoisers_are_found():
    assert {"ddpm_cifar", "ddpm_unet", "dit", "sinddm"} <= set(DENOISERS)
    assert samplers.alpha_bars("linear", 100)[-1] ** 0.5 > 0.5  # so that the test above can fail


@pytest.mark.parametrize("name", ["ddpm_unet", "dit"])
def test_the_record_follows_the_channels(name: str):
    record = registry.module("models", name).record
    grey, colour, latent = (record(channels=channels) for channels in (1, 3, 4))
    assert [one["output"].get("value_range") for one in (grey, colour, latent)] == [[-1, 1], [-1, 1], None]
    assert [samplers.of(one["options"])["clip"] for one in (grey, colour, latent)] == [1, 1, 0]
    assert grey["options"]["features"] == ("mnist" if name == "ddpm_unet" else "cifar")
    assert colour["options"]["features"] == "cifar"


def test_sinddm_has_the_papers_number_of_parameters():
    count = sum(parameter.numel() for parameter in sinddm.create().parameters())
    assert count == pytest.approx(1.1e6, rel=0.01)  # Kulikov et al., 2023


def test_sinddm_sees_33_pixels():
    net = sinddm.create(channels=1, width=4)
    x = torch.zeros(1, 1, 49, 49, requires_grad=True)
    net(x, torch.tensor([3.0]))[0, 0, 24, 24].backward()
    rows = torch.nonzero(x.grad[0, 0].abs().sum(1)).ravel().tolist()
    assert (rows[0], rows[-1]) == (24 - 16, 24 + 16)


def test_sinddm_tells_time_and_scale_apart():
    torch.manual_seed(0)
    net, x = sinddm.create(channels=1, width=8, blocks=2).eval(), torch.randn(1, 1, 8, 8)
    made = net(x, torch.tensor([3.0]))
    assert not torch.allclose(made, net(x, torch.tensor([60.0])), atol=1e-5)
    net.scale = 4.0
    assert not torch.allclose(made, net(x, torch.tensor([3.0])), atol=1e-5)


def test_a_network_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        sinddm.create(blocks=0)
