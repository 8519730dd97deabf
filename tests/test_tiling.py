"""Tiled inference: exact where the network sees less than the overlap, smooth elsewhere, one line for faults."""

from __future__ import annotations

import numpy as np
import pytest

from edgegen.errors import DataError
from edgegen.tiling import run_tiled

torch = pytest.importorskip("torch")


def network(layers: int, scale: int = 2) -> torch.nn.Module:
    """3x3 convolutions (each sees one pixel more to a side), then enlargement by pixel shuffle."""
    torch.manual_seed(0)
    body = [part for _ in range(layers) for part in (torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Tanh())]
    return torch.nn.Sequential(*body, torch.nn.Conv2d(3, 3 * scale**2, 1), torch.nn.PixelShuffle(scale)).eval()


def engine(module: torch.nn.Module, tile: tuple[int, int] | None):
    """The network as an engine that takes one size."""

    def run(x: np.ndarray) -> np.ndarray:
        assert tile is None or x.shape == (1, 3, *tile)
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return run


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, height, width), np.float32)


@pytest.mark.parametrize(("size", "tile"), [((40, 52), (16, 20)), ((16, 20), (16, 20)), ((33, 17), (16, 16))])
@pytest.mark.parametrize(("overlap", "blend"), [(8, 0), (8, 2), (12, 6)])
def test_exact_where_the_network_sees_less_than_the_overlap(size, tile, overlap, blend):
    module, x = network(3), image(*size)  # sees 3 pixels to each side, (overlap - blend) / 2 or less
    tiled = run_tiled(engine(module, tile), x, tile, overlap=overlap, blend=blend)
    assert np.abs(tiled - engine(module, None)(x)).max() < 2e-6


def test_not_exact_where_it_sees_more():
    module, x = network(6), image(40, 40)
    whole = engine(module, None)(x)
    hard = np.abs(run_tiled(engine(module, (16, 16)), x, (16, 16), overlap=4, blend=0) - whole)
    assert hard.max() > 1e-4
    # and blending makes the seam less steep than a hard border does
    soft = np.abs(run_tiled(engine(module, (16, 16)), x, (16, 16), overlap=4, blend=4) - whole)
    assert np.abs(np.diff(soft, axis=3)).max() < np.abs(np.diff(hard, axis=3)).max()


def test_shares_of_all_tiles_sum_to_one():
    x = image(45, 61)
    same = run_tiled(lambda part: part, x, (16, 24), overlap=10, blend=7)
    assert np.abs(same - x).max() < 1e-6


def test_a_small_image_is_mirrored_up_to_a_tile():
    module, x = network(0, scale=4), image(5, 30)
    tiled = run_tiled(engine(module, (16, 16)), x, (16, 16), overlap=8, blend=4)
    assert tiled.shape == (1, 3, 20, 120)
    assert np.abs(tiled - engine(module, None)(x)).max() < 1e-6  # pointwise: what is beside a pixel does not matter


def test_several_images_and_aligned_tiles():
    module, x = network(2), np.concatenate([image(24, 40), image(24, 40)[:, :, ::-1]])
    starts = []

    def run(part: np.ndarray) -> np.ndarray:
        starts.append(part.shape)
        return engine(module, (16, 16))(part)

    tiled = run_tiled(run, x, (16, 16), overlap=6, blend=2, align=4)
    whole = np.concatenate([engine(module, None)(np.ascontiguousarray(one[None])) for one in x])
    assert np.abs(tiled - whole).max() < 2e-6
    assert len(starts) == 2 * 2 * 4  # steps of 8: 0 and 8 down, 0, 8, 16 and 24 across


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 16}, "overlap < tile"),
        ({"overlap": 4, "blend": 5}, "blend <= overlap"),
        ({"align": 0}, "align >= 1"),
        ({"overlap": 4, "blend": 0, "align": 7}, "no multiple of align 7"),
    ],
)
def test_what_cannot_be_is_one_line(options, message):
    with pytest.raises(DataError, match=message) as caught:
        run_tiled(lambda part: part, image(32, 32), (16, 16), **({"overlap": 8, "blend": 0} | options))
    assert "\n" not in str(caught.value)


def test_an_engine_of_another_shape_is_named():
    with pytest.raises(DataError, match="no whole enlargement"):
        run_tiled(lambda part: part[:, :, :-1], image(32, 32), (16, 16), overlap=8, blend=0)
    with pytest.raises(DataError, match="images must be"):
        run_tiled(lambda part: part, image(8, 8)[0], (4, 4), overlap=1, blend=0)
