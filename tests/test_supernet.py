"""Supernets: what is cut out computes what the supernet computes with that choice; training, statistics, ranks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from edgegen import architecture, graph
from edgegen.models import cifar_resnet, cyclegan, dcgan
from edgegen.passes import _free_widths
from edgegen.passes import _supernet as supernet
from edgegen.passes.slice_widths import slice_widths
from edgegen.passes.train_supernet import train_supernet
from edgegen.search import spaces
from edgegen.search import supernet as searched
from edgegen.search.store import DONE, Figures, Row
from edgegen.types import Job, Model, Stage, Target, TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = Target("testbed", "", (), channel_multiple={"int8": 1})


def _chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.LeakyReLU(0.1), nn.Conv2d(12, 3, 3, padding=1),
    )  # fmt: skip


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return cyclegan.create(width=8, blocks=2)


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet.create(widths=(4, 6, 8), blocks=1)


def _dcgan() -> nn.Module:
    torch.manual_seed(0)
    return dcgan.create(latent=6, width=4)


CASES = {
    "chain": (_chain, (2, 3, 10, 10), ()),
    "resnet generator": (_resnet, (1, 3, 16, 16), ("model.10", "model.11")),
    "dcgan": (_dcgan, (2, 6), ()),
    "classifier": (_classifier, (2, 3, 16, 16), ()),
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
    widths = {w.name: w for w in _free_widths.chain(_resnet())}
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


@pytest.mark.parametrize("name", CASES)
def test_sorted_channels_compute_the_same_and_the_first_matter_most(name: str) -> None:
    make, shape, _ = CASES[name]
    module, images = _warm(make()), torch.randn(shape)
    widths = _free_widths.chain(module)
    found = supernet.sort_channels(module, widths).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(images), module(images), rtol=1e-4, atol=1e-5)
    only = next(width for width in widths if len(width.writers) == len(width.readers) == 1)
    parts = [found.get_submodule(path) for path in (only.writers[0], only.readers[0])]
    sums = [part.weight.detach().abs().transpose(0, supernet._axis(part, writes)).flatten(1).sum(1)
            for part, writes in zip(parts, (True, False))]  # fmt: skip
    score = sum(one / one.mean() for one in sums)
    assert torch.equal(score, score.sort(descending=True).values)


def test_a_convolution_that_is_used_twice_is_not_free() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.tail = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tail(self.body(self.body(self.head(x))))

    assert _free_widths.chain(Twice()) == []


def test_code_that_looks_at_its_tensors_is_left_as_it_is() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else x

    result = slice_widths(_model(Looks()), Job(TARGET))
    assert result.changed == {}
    assert "cannot be traced" in result.skipped["a"]


def _model(module: nn.Module) -> Model:
    image = TensorSpec("input", (1, 3, 10, 10), value_range=(0.0, 1.0))
    return Model("net", "image-to-image", (Stage("main", module.eval(), (image,), (image,)),))


def test_a_slice_of_the_pass_is_the_supernet_with_its_own_statistics() -> None:
    model = _model(_warm(_chain()))
    module = model.stage.module
    result = slice_widths(model, Job(TARGET, threads=1), ratio=0.5, ratios={"3": 0.25}, samples=32)
    small = result.model.stage.module
    assert (small[0].out_channels, small[3].in_channels, small[3].out_channels, small[6].in_channels) == (4, 4, 9, 9)
    assert torch.equal(small[3].weight, module[3].weight[:9, :4])
    assert not torch.allclose(small[1].running_mean, module[1].running_mean[:4]), "taken anew"
    assert result.notes["macs_after"] == graph.cost(small, graph.example_inputs(model.stage)).macs
    assert (result.changed["0"], result.needs_recovery) == ("weight 8x3x3x3 -> 4x3x3x3", True)
    again = architecture.rebuild(_chain(), architecture.describe(small, module))
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


def test_training_serves_every_slice_and_the_widest_stays_good() -> None:
    model = _model(_warm(_chain()))
    job = Job(TARGET, teacher=model, threads=1, seed=1)
    options = {"steps": 60, "batch": 4, "lr": 3e-3, "shares": (0.5, 1.0), "precision": "fp32", "samples": 32}
    trained = train_supernet(model, job, **options)
    plain = train_supernet(model, job, **{**options, "steps": 0})
    images = [graph.example_inputs(model.stage, seed=100 + i, batch=4) for i in range(4)]

    def lost(found: Model, ratio: float) -> float:
        small = slice_widths(found, job, ratio=ratio, samples=32).model.stage.module
        return sum(float((graph.outputs(small, x)[0] - graph.outputs(model.stage.module, x)[0]).abs().mean())
                   for x in images)  # fmt: skip

    assert lost(trained.model, 0.5) < 0.7 * lost(plain.model, 0.5)
    assert lost(trained.model, 0.0) < 0.7 * lost(plain.model, 0.5)
    assert lost(plain.model, 0.0) < 1e-4
    assert plain.notes["widths"] == {"0": [4, 8], "3": [6, 12]}
    assert trained.notes["steps"] == 60


def test_statistics_are_those_of_the_batches() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(2)).eval()
    batches = [torch.randn(8, 2, 5, 5) + 3 for _ in range(3)]
    supernet.estimate(norm, [(batch,) for batch in batches])
    torch.testing.assert_close(norm[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    assert not norm[0].training
    assert norm[0].momentum == 0.1


def test_rank_correlation_is_kendalls() -> None:
    assert searched.kendall([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert searched.kendall([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert searched.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # one of six pairs is swapped
    with pytest.raises(ValueError, match="same length"):
        searched.kendall([1.0], [1.0])


def test_ranks_are_of_slices_and_of_networks_trained_alone() -> None:
    module = _warm(_chain())
    space = supernet.elastic(module, (0.25, 0.5, 1.0))
    choices = [supernet.narrowest(space), supernet.Choice({"0": 4, "3": 6}), supernet.widest(space)]

    def size(network: nn.Module) -> float:
        return float(sum(p.numel() for p in network.parameters()))

    batches = [(torch.randn(4, 3, 10, 10),)]
    found = searched.ranks(module, space, choices, batches, lambda one: supernet.cut(module, space, one), size)
    assert found.slices == found.alone
    assert found.tau == pytest.approx(1.0)
    seen = iter([1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
    turned = searched.ranks(module, space, choices, batches, lambda one: module, lambda network: next(seen))
    assert (turned.slices, turned.alone, turned.tau) == ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), pytest.approx(-1.0))


SPACE = spaces.load("supernet")


def test_both_ways_to_the_extremes_are_candidates_and_the_better_one_is_told() -> None:
    ways = searched.ways(SPACE)
    assert [one.name for one in ways] == ["strongest", "mildest"]
    made = [spaces.to_recipe(SPACE, way, {}) for one in ways for way in (one.slice, one.direct)]
    names = [[step.name for step in one.steps] for one in made]
    assert names[0] == names[1] == ["train_supernet", "prune_blocks", "slice_widths", "distill", "quantize"]
    assert names[2] == names[3] == ["train_supernet", "slice_widths", "distill"]
    assert [one.steps[0].options["steps"] for one in made] == [1000, 0, 1000, 0]
    drops = [0.5, 0.4, 0.1, 0.2]
    rows = [Row(spaces.candidate_key(one), i, i, {}, DONE, figures=Figures(1.0, 0.5, drop, 10))
            for i, (one, drop) in enumerate(zip(made, drops))]  # fmt: skip
    said = searched.compared(SPACE, {}, rows)
    assert said[0].endswith("0.4 by direct distillation; direct distillation is kept")
    assert said[1].endswith("0.2 by direct distillation; the supernet's slice is kept")
    assert searched.compared(SPACE, {}, rows[:1]) == []
    assert searched.ways(spaces.load("recipe")) == []


def test_a_supernet_alone_is_no_candidate() -> None:
    nothing = {**spaces.mildest(SPACE), "supernet": 1, "training": 2}
    assert spaces.to_recipe(SPACE, nothing, {}).steps == ()


def test_classes_learn_softened_outputs() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert float(supernet.distance(logits, logits)) == pytest.approx(0.0, abs=1e-6)
    assert float(supernet.distance(logits, -logits)) > 0.1
    assert float(supernet.distance(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))) == 1.0
