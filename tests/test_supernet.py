"""Supernets: what is cut out computes what the supernet computes with that choice; training, statistics, ranks."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from edgegen.models import cyclegan, dcgan
from edgegen.search import supernet


def _chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.LeakyReLU(0.1), nn.Conv2d(12, 3, 3, padding=1),
    )  # fmt: skip


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return cyclegan.create(width=8, blocks=2)


def _dcgan() -> nn.Module:
    torch.manual_seed(0)
    return dcgan.create(latent=6, width=4)


CASES = {
    "chain": (_chain, (2, 3, 10, 10), ()),
    "resnet generator": (_resnet, (1, 3, 16, 16), ("model.10", "model.11")),
    "dcgan": (_dcgan, (2, 6), ()),
}


def _warm(module: nn.Module) -> nn.Module:
    """Norms that are not trivial: a slice that forgets one of their tensors is seen."""
    for part in module.modules():
        for tensor in (getattr(part, "running_mean", None), getattr(part, "bias", None)):
            if tensor is not None and isinstance(part, nn.modules.batchnorm._BatchNorm):
                tensor.data.normal_(0, 0.3)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_var.uniform_(0.5, 1.5)
            part.weight.data.uniform_(0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_subnet_cut_out_is_the_supernet_with_that_choice(name: str) -> None:
    make, shape, blocks = CASES[name]
    module, images = _warm(make()), torch.randn(shape)
    space = supernet.elastic(module, (0.25, 0.4, 0.75, 1.0), blocks=blocks)
    draw = random.Random(0)
    choices = [supernet.widest(space), supernet.narrowest(space), *(supernet.drawn(space, draw) for _ in range(8))]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    sizes = set()
    for choice in choices:
        small = supernet.cut(module, space, choice).eval()
        with torch.no_grad(), supernet.chosen(module, space, choice):
            whole = module(images)
        with torch.no_grad():
            alone = small(images)
        torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
        sizes.add(sum(p.numel() for p in small.parameters()))
    assert len(sizes) > 4
    assert max(sizes) == sum(p.numel() for p in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_the_comparison_sees_a_wrong_slice() -> None:
    module, images = _warm(_chain()), torch.randn(2, 3, 10, 10)
    space = supernet.elastic(module, (0.5, 1.0))
    choice = supernet.narrowest(space)
    wrong = supernet.cut(module, space, choice).eval()
    wrong[1].running_mean[:] = module[1].running_mean[4:]
    with torch.no_grad(), supernet.chosen(module, space, choice):
        whole = module(images)
    assert not torch.allclose(wrong(images), whole, rtol=1e-4, atol=1e-5)


def test_the_free_widths_of_a_resnet_generator_tie_its_stream_together() -> None:
    widths = {w.name: w for w in supernet.chain(_resnet())}
    assert list(widths) == ["model.1", "model.4", "model.7", "model.10.conv_block.1", "model.11.conv_block.1",
                            "model.12", "model.15"]  # fmt: skip
    assert widths["model.7"].writers == ("model.7", "model.10.conv_block.5", "model.11.conv_block.5")
    assert widths["model.7"].readers == ("model.10.conv_block.1", "model.11.conv_block.1", "model.12")
    assert widths["model.7"].full == 32


def test_a_network_without_free_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="no width of the network is free"):
        supernet.elastic(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="shares must lie in"):
        supernet.elastic(_chain(), (0.0,))


def test_training_serves_the_narrowest_and_the_widest_and_leaves_its_input() -> None:
    teacher = _warm(_chain())
    start = _warm(copy.deepcopy(teacher))
    space = supernet.elastic(start, (0.5, 1.0))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 10, 10, generator=generator) for _ in range(4)]
    before = {key: value.clone() for key, value in start.state_dict().items()}

    def lost(network: nn.Module, choice: supernet.Choice) -> float:
        small = supernet.estimate(supernet.cut(network, space, choice).eval(), batches)
        with torch.no_grad():
            return float(sum((small(b) - teacher(b)).abs().mean() for b in batches))

    trained, curve = supernet.train(start, teacher, space, lambda i: batches[i % 4], steps=40, lr=3e-3)
    again, _ = supernet.train(start, teacher, space, lambda i: batches[i % 4], steps=40, lr=3e-3)
    assert len(curve) == 40
    assert lost(trained, supernet.narrowest(space)) < 0.8 * lost(start, supernet.narrowest(space))
    assert all(torch.equal(value, before[key]) for key, value in start.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values()))


def test_statistics_are_those_of_the_batches() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(2)).eval()
    batches = [torch.randn(8, 2, 5, 5) + 3 for _ in range(3)]
    supernet.estimate(norm, batches)
    torch.testing.assert_close(norm[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    assert not norm[0].training
    assert norm[0].momentum == 0.1


def test_rank_correlation_is_kendalls() -> None:
    assert supernet.kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert supernet.kendall([1, 2, 3], [3, 2, 1]) == -1.0
    assert supernet.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # one of six pairs is swapped
    with pytest.raises(ValueError, match="same length"):
        supernet.kendall([1.0], [1.0])


def test_classes_learn_softened_outputs() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert float(supernet.distance(logits, logits)) == pytest.approx(0.0, abs=1e-6)
    assert float(supernet.distance(logits, -logits)) > 0.1
    assert float(supernet.distance(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))) == 1.0
