"""What a kernel takes by its work: least squares that stay positive, full blocks of channels, groups of kernels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgegen import operator_base
from edgegen.operator_base import Sample
from edgegen.operators import Kernel


def conv(out: int, **more: int) -> Kernel:
    """A 1x1 convolution of 16 channels at 10x10."""
    return Kernel("conv1x1", 1600 * out, 6400, 64 * out, 400 * out, 16, out, 10, 10, **more)


@pytest.mark.parametrize("seed", range(5))
def test_the_active_set_finds_the_best_of_all_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=20)
    found = operator_base._non_negative(a, b, np.zeros(6))
    best = np.inf
    for size in range(7):
        for chosen in itertools.combinations(range(6), size):
            x = np.zeros(6)
            x[list(chosen)] = np.linalg.lstsq(a[:, list(chosen)], b, rcond=None)[0] if chosen else []
            if (x >= 0).all():
                best = min(best, float(((a @ x - b) ** 2).sum()))
    assert (found >= 0).all()
    assert float(((a @ found - b) ** 2).sum()) == pytest.approx(best, rel=1e-3)


def test_a_column_that_would_have_to_be_negative_is_zero() -> None:
    a = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert operator_base._non_negative(a, np.array([2.0, -1.0]), np.zeros(2)) == pytest.approx([2.0, 0.0], abs=1e-3)


def test_channels_count_in_full_blocks_but_for_groups() -> None:
    assert operator_base.columns(conv(17))[1] == 1600 * 32
    assert operator_base.columns(conv(32))[1] == 1600 * 32
    grouped = Kernel("grouped", 1000, channels_out=17, groups=2)
    assert operator_base.columns(grouped)[1] == 1000


def test_windows_without_fast_kernels_are_groups_of_their_own() -> None:
    def group(kind: str, window: int, stride: int) -> str:
        return operator_base.group(Kernel(kind, kernel=(window, window), stride=stride))

    assert group("conv3x3", 3, 1) == "conv3x3"
    assert group("conv3x3", 3, 2) == "conv"
    assert group("depthwise", 5, 2) == "depthwise"
    assert group("depthwise", 7, 1) == "depthwise, wide"


def test_whole_networks_count_more_where_they_are_trusted_more() -> None:
    """Twelve networks of the same kernel: small ones say 1 ms, whole ones 2."""
    many = [Sample((Kernel("run"), conv(32)), 1.0)] * 8 + [Sample((Kernel("run"), conv(32)), 2.0, 0.0, True)] * 4

    def rate(trust: float) -> float:
        found = operator_base.rates(many, trust)
        return operator_base.base(conv(32), found) + operator_base.base(Kernel("run"), found)

    assert 1.0 <= rate(1.0) < rate(3.0) <= 2.0


def test_one_network_alone_does_not_set_the_price_of_a_byte_of_weights() -> None:
    """Its only transposed convolution was slow; one with 60 times the weights and as many MACs is not slower still."""
    def transposed(into: int, out: int, size: int) -> Kernel:
        weights = 16 * into * out
        return Kernel("transposed", weights * size**2, 4 * into * size**2, 4 * weights, 16 * out * size**2, into, out,
                      size, size, (4, 4), 2)  # fmt: skip

    rng = np.random.default_rng(0)
    nets = [(Kernel("run"), *(conv(int(out)) for out in rng.integers(16, 512, 4))) for _ in range(40)]
    many = [Sample(net, 0.01 + sum(4e-9 * k.macs + 7e-9 * k.bytes_moved for k in net[1:])) for net in nets]
    slow, large = transposed(8, 16, 64), transposed(256, 32, 8)
    assert large.bytes_weights > 60 * slow.bytes_weights and large.macs == slow.macs
    found = operator_base.rates([*many, Sample((Kernel("run"), slow), 1.0)])
    assert operator_base.base(large, found) < 1.5 * operator_base.base(slow, found)


def test_curved_elements_cost_the_same_in_every_kind() -> None:
    rng = np.random.default_rng(0)
    nets = [(Kernel("run"), *(Kernel(kind, bytes_in=int(size), bytes_out=int(size), curved=int(size) * curved)
                              for kind, size, curved in zip(("activation", "softmax"), rng.integers(1e5, 1e6, 2),
                                                            rng.integers(0, 2, 2)))) for _ in range(30)]  # fmt: skip
    cost = [0.01 + sum(1e-6 * k.bytes_moved + 5e-6 * k.curved for k in net) for net in nets]
    found = operator_base.rates([Sample(net, ms) for net, ms in zip(nets, cost)])
    assert found["activation"][-1] == found["softmax"][-1] == pytest.approx(5e-6, rel=0.1)
