"""What coremltools says when it fails, as problems with operator, layer and cure."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from edgegen.runtimes import _coreml_support
from edgegen.types import Problem

RANK = 'coreml: cannot convert net: Core ML only supports tensors with rank <= 5. Layer "{}", with type "reshape", {}'
SIX = "outputs a rank 6 tensor."


@pytest.fixture(scope="module")
def source() -> Any:
    """A program whose `windows` cuts an image into windows, six axes in between."""
    import torch

    class Windows(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.view(1, 2, 4, 2, 4, 3).transpose(2, 3)

    network = torch.nn.Sequential()
    network.add_module("windows", Windows())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch meets its own deprecations
        return torch.export.export(network.eval(), (torch.zeros(1, 8, 8, 3),)).run_decompositions({})


@pytest.mark.parametrize("name", ["view", "view_cast_fp16", "view_cast_fp32"])
def test_too_many_axes_name_operator_and_layer(name: str, source: Any) -> None:
    found = _coreml_support._stumbled(source, RANK.format(name, SIX))
    assert found == Problem("reshape", "windows", f"split it: at most five axes, {name} has 6")


def test_operation_that_the_program_does_not_have_is_named_itself(source: Any) -> None:
    assert _coreml_support._stumbled(source, RANK.format("x_7", SIX)).layer == "x_7"


def test_other_messages_name_the_operation_at_which_it_was(source: Any) -> None:
    found = _coreml_support._stumbled(source, "coreml: cannot convert net at 'view': no such thing")
    assert (found.op, found.layer) == ("view", "windows")
    assert found.rewrite.endswith("(no such thing)")
    assert _coreml_support._stumbled(source, "coreml: cannot convert net: broken").op == "graph"
