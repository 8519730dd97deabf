"""distill with `views`: the teacher runs once for each view, and the student learns the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="passes need the extra `torch`")

from test_distill import Photos, job, noisy, quick  # noqa: E402

from edgegen import graph  # noqa: E402
from edgegen.passes import _lessons, _views  # noqa: E402
from edgegen.types import Model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(model: Model) -> tuple[Model, list[int]]:
    """The model, and the sizes of the batches that it was run on."""
    seen: list[int] = []

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = graph.clone(model.stage.module)

        def forward(self, x: Any) -> Any:
            seen.append(len(x))
            return self.inner(x)

        def __deepcopy__(self, memo: Any) -> Counting:
            return Counting()

    return model.with_module(Counting().eval()), seen


def apart(a: Model, b: Model) -> float:
    """The largest difference of a weight."""
    pairs = zip(a.stage.module.parameters(), b.stage.module.parameters(), strict=True)
    return max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)


def test_a_view_is_the_same_whenever_it_comes():
    data = Photos(4)
    at = _lessons.from_data(data, 4, 7, 12, views=2)
    by_view: dict[int, Any] = {}
    for step in range(20):
        batch = at(step)
        for view, image, reference in zip(batch["view"].tolist(), batch["input"][0], batch["reference"], strict=True):
            first = by_view.setdefault(view, (image, reference))
            assert torch.equal(first[0], image) and torch.equal(first[1], reference)
    assert set(by_view) == set(range(8)), "each of two views of four images comes"
    images = [image for image, _ in by_view.values()]
    assert len({image.numpy().tobytes() for image in images}) > 4, "the views of an image differ"
    assert "view" not in _lessons.from_data(data, 4, 7, 12)(0)


def test_the_teacher_runs_once_for_each_view(residual: Model):
    teacher, seen = counted(residual)
    student = noisy(residual)
    plain = quick(student, job(teacher, data=Photos(6)))
    every = sum(seen)
    seen.clear()
    kept = quick(student, job(teacher, data=Photos(6)), views=3)
    assert every >= 40 * 4 and sum(seen) <= 6 * 3 + 16, seen  # beside the checks of shapes before training
    assert kept.notes["loss_last"] < 0.5 * kept.notes["loss_first"]
    assert kept.notes["loss_last"] < 1.5 * plain.notes["loss_last"]


def test_it_learns_what_it_would_with_the_teacher_at_every_step(residual: Model, monkeypatch: pytest.MonkeyPatch):
    student, work = noisy(residual), job(residual, data=Photos(6))
    kept = quick(student, work, views=2)
    monkeypatch.setattr(_views.Kept, "of", lambda self, views, teach: tuple(teach(slice(None))))
    exact = quick(student, work, views=2)
    assert apart(kept.model, exact.model) < 1e-2  # 16 bits
    monkeypatch.setattr(_views.Kept, "of", lambda self, views, teach: tuple(0 * out for out in teach(slice(None))))
    wrong = quick(student, work, views=2)
    assert apart(wrong.model, exact.model) > 2e-2, "the comparison can fail"


def test_what_is_kept_is_what_was_given_and_stays_for_the_next_run(tmp_path: Path):
    asked: Counter[int] = Counter()

    def teach_of(views: torch.Tensor) -> Any:
        def teach(rows: torch.Tensor) -> list[torch.Tensor]:
            asked.update(views[rows].tolist())
            return [views[rows].float()[:, None] * torch.tensor([1.0, 0.5])]

        return teach

    first = _views.Kept(tmp_path, 10, [(2,)])
    views = torch.tensor([3, 9, 3])
    (out,) = first.of(views, teach_of(views))
    assert out.tolist() == [[3.0, 1.5], [9.0, 4.5], [3.0, 1.5]]
    first.close()
    views = torch.tensor([9, 1])
    (out,) = _views.Kept(tmp_path, 10, [(2,)]).of(views, teach_of(views))
    assert out.tolist() == [[9.0, 4.5], [1.0, 0.5]] and asked[9] == 1 and asked[1] == 1
    with pytest.raises(ValueError, match="16 bits hold 65504"):
        first.of(torch.tensor([0]), lambda rows: [torch.full((1, 2), 1e6)])
    with pytest.raises(ValueError, match=r"10000000000 of them need 400.0 GB"):
        _views.Kept(tmp_path / "other", 10_000_000_000, [(20,)])
    own = _views.Kept(None, 2, [(1,)])
    assert (place := Path(own._own.name)).is_dir()
    own.close()
    assert not place.exists()


def test_a_run_that_was_cut_off_ends_with_the_same_weights(residual: Model, tmp_path: Path):
    student, work = noisy(residual), job(residual, data=Photos(6))

    class Cut(Exception):
        pass

    def stop(text: str, share: float) -> None:
        if share > 0.4:
            raise Cut

    whole = quick(student, dataclasses.replace(work, checkpoints=tmp_path / "a"), views=2)
    place = dataclasses.replace(work, checkpoints=tmp_path / "b")
    with pytest.raises(Cut):
        quick(student, dataclasses.replace(place, progress=stop), views=2)
    again = quick(student, place, views=2)
    assert apart(whole.model, again.model) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": -1}, "views must not be negative"),
        ({"views": 2, "losses": ["output", "features"]}, "views keep the teacher's outputs alone: .* features"),
        ({"views": 2, "losses": ["reference"]}, "no loss asks for them"),
    ],
)
def test_what_cannot_be_is_one_line(residual: Model, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        quick(residual, job(residual, data=Photos(6)), **options)
    with pytest.raises(ValueError, match="views are of the samples of a data set"):
        quick(residual, job(residual), views=2)


def test_held_out_losses_are_of_other_views(residual: Model):
    data = Photos(6)
    result = quick(noisy(residual), job(residual, data=data), views=1, every=20)
    assert np.isfinite([score for _, score in result.notes["scores"]]).all()
