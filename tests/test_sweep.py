"""Every pass on every built-in network, in a small size: it applies, or it says why not; the input stays as it was."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="passes need the extra `torch`")

from test_passes import QUICK, equal, facts, state  # noqa: E402

from edgegen import graph, loading, registry  # noqa: E402
from edgegen.errors import PassError  # noqa: E402
from edgegen.records import ModelOptions  # noqa: E402
from edgegen.types import Model  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import generators  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = generators.CASES | {
    "cifar_resnet": generators.Case(()),
    "vit": generators.Case((), {"width": 48, "depth": 3}),
}
SHORT = QUICK | {
    "distill_steps": {"train": 2, "batch": 2, "steps": 2},
    "tune_sampler": {"images": 2, "nfe": 4},
    "cache_steps": {"images": 2},
    "replace_attention": {"steps": 2, "joint_steps": 2, "batch": 2, "samples": 2},
    "prune_blocks": {"ratio": 0.5, "samples": 2},
    "reconstruct": {"samples": 2},
    "dilate": {"samples": 2},
    "factorize_tucker": {"samples": 2},
    "factorize_cp": {"samples": 2, "sweeps": 3},
}


@functools.cache
def loaded(name: str) -> Model:
    """A built-in network by name, with its own weights or random ones."""
    case = CASES[name]
    options = ModelOptions(config=case.config, input_shape=case.shape, seed=0)
    return loading.load_model(name, options=options, latency_only=name not in generators.SHIPPED)


def test_every_built_in_network_has_a_case():
    assert set(CASES) == set(registry.names("models"))


@pytest.mark.parametrize("name", registry.names("passes"))
@pytest.mark.parametrize("network", sorted(CASES))
def test_a_pass_applies_or_says_why_not(network: str, name: str):
    model = loaded(network)
    module = model.stage.module
    before, before_facts = state(module), facts(module)
    try:
        result = getattr(registry.module("passes", name), name)(model, generators.job(model), **SHORT.get(name, {}))
    except (ValueError, PassError) as refused:
        assert str(refused) and "\n" not in str(refused)
        return
    finally:
        assert equal(state(module), before) and facts(module) == before_facts
    assert result.changed or result.skipped
    accounted = set(result.changed) | set(result.skipped)
    assert set(graph.layers(module)) <= accounted or accounted == {"sampler"}  # a pass over the steps of a denoiser
    assert all(isinstance(reason, str) and reason for reason in [*result.changed.values(), *result.skipped.values()])
    json.dumps(result.notes)
    given = generators.inputs_of(model, 1)[0]
    was, now = (graph.outputs(stage.module, given) for stage in (model.stage, result.model.stage))
    assert [out.shape for out in now] == [out.shape for out in was]
    assert all(torch.isfinite(out).all() for out in now)
