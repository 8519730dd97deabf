"""Dataclasses survive JSON as they were, and what does not fit is refused with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgegen import errors, serial, targets
from edgegen.types import (
    Artifact,
    Graph,
    Inspection,
    Measurement,
    PrecisionPlan,
    Preprocessing,
    Problem,
    Target,
    TensorSpec,
)

SPEC = TensorSpec("x", ("N", 3, 8, 8), value_range=(0.0, 1.0))
PLAN = PrecisionPlan("int8", "u8s8", "fp16", ("conv1",), ("MatMul",))
VALUES = [
    SPEC,
    PLAN,
    Preprocessing((0.0, 255.0), (1.0,), (2.0,), None, (224, 224), "L"),
    Graph("net", Path("a/b.onnx"), (SPEC,), (SPEC, SPEC), PLAN, 5, 7, "ff"),
    Artifact("openvino", Path("m.xml"), (Path("m.xml"), Path("m.bin")), PLAN, 12, (SPEC,), (), {"threads": 2}, {}),
    Inspection({"conv": "int8"}, 0.5, 1.0),
    Problem("Conv", "conv1", "none"),
    Measurement("latency", "ms", 1.5, (1.0, 2.0), (1.5, 1.5), conditions={"n": 2, "rounds": [1.0], "on": True}),
    targets.load("jetson"),
]


def there_and_back(value: Any) -> Any:
    return serial.from_json(type(value), json.loads(json.dumps(serial.to_json(value), allow_nan=False)))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_type_comes_back_equal_through_json_text(value: Any) -> None:
    assert there_and_back(value) == value


def test_numbers_that_are_not_finite_come_back_and_the_text_stays_json() -> None:
    found = there_and_back(Measurement("m", "", math.nan, (-math.inf, math.inf), status="not measured", reason="why"))
    assert math.isnan(found.value)
    assert found.interval == (-math.inf, math.inf)


def test_numpy_scalars_become_numbers_and_arrays_are_refused() -> None:
    scalars = {"a": np.float32(0.5), "b": np.int64(3), "c": (np.bool_(True),)}
    assert serial.to_json(scalars) == {"a": 0.5, "b": 3, "c": [True]}
    with pytest.raises(errors.UsageError, match="a ndarray has no JSON form; allowed"):
        serial.to_json({"a": np.zeros(3)})


def test_fields_with_a_default_may_be_missing() -> None:
    assert serial.from_json(TensorSpec, {"name": "x", "shape": [1]}) == TensorSpec("x", (1,))


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (TensorSpec, {"name": "x"}, r"TensorSpec lacks the field 'shape'; got: name"),
        (TensorSpec, {"name": "x", "shape": [1], "shap": 2}, r"TensorSpec has no field 'shap'; allowed: name, shape"),
        (TensorSpec, {"name": 3, "shape": [1]}, r"TensorSpec\.name must be str, got '3'"),
        (TensorSpec, {"name": "x", "shape": [1, 2.5]}, r"TensorSpec\.shape\[1\] must be str, got '2.5'"),
        (TensorSpec, {"name": "x", "shape": [True]}, r"TensorSpec\.shape\[0\] must be"),
        (TensorSpec, {"name": "x", "shape": 3}, r"TensorSpec\.shape must be a list, got '3'"),
        (TensorSpec, {"name": "x", "shape": [], "value_range": [1]}, r"TensorSpec\.value_range must be"),
        (Target, [], r"Target must be an object"),
        (Inspection, {"layers": {"a": 1}, "int8_weight_share": 0, "int8_macs_share": 0},
         r"Inspection\.layers\['a'\] must be str"),
        (Measurement, {"name": "m", "unit": "", "value": "1.0"}, r"Measurement\.value must be a number"),
        (Measurement, {"name": "m", "unit": "", "value": True}, r"Measurement\.value must be a number"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(kind: type, data: Any, message: str) -> None:
    with pytest.raises(errors.UsageError, match=message):
        serial.from_json(kind, data)


def test_annotations_work_without_a_dataclass() -> None:
    assert serial.from_json(list[Path], ["a"]) == [Path("a")]
    assert serial.from_json(Mapping[str, tuple[int, ...]], {"a": [1, 2]}) == {"a": (1, 2)}
