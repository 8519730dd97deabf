"""The model card: a header that YAML reads, the figures of the report, and nothing that was not measured."""

from __future__ import annotations

from typing import Any

import pytest
from test_report import sample

from edgegen.model_card import card
from edgegen.report.schema import normalise


def header(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_header_is_what_the_hub_reads() -> None:
    told = header(card(normalise(sample()), "openvino"))
    assert (told["license"], told["pipeline_tag"], told["library_name"]) == ("apache-2.0", "image-to-image", "openvino")
    (entry,) = told["model-index"]
    (metric,) = entry["results"][0]["metrics"]
    assert (metric["name"], metric["value"]) == ("PSNR (dB)", 27.843)


def test_the_figures_are_those_of_the_report() -> None:
    text = card(normalise(sample() | {"stamps": ["not for accuracy"]}), "openvino")
    for expected in ("35.5 ms", "16.0 ms", "27.84 dB (27.60 to 28.10)", "504 kB", "not for accuracy", "not measured",
                     "1,200 held-out samples (photos)", "prune_channels, quantize", "16.0 ms (15.9 to 16.1)",
                     "cpu (2 threads, batch 1)"):  # fmt: skip
        assert expected in text, expected


def test_the_card_names_the_data_that_quality_was_judged_on_and_no_other() -> None:
    report = normalise(sample() | {"data_source": "train: photos; evaluation: out/eval"})
    metadata = header(card(report, "openvino"))["model-index"][0]["results"][0]
    assert metadata["dataset"]["name"] == "out/eval"
    assert "held-out samples (out/eval)" in card(report, "openvino")
    report["result"]["quality"] = []
    assert "Quality was not measured." in card(report, "openvino")


def test_strange_names_do_not_break_the_header() -> None:
    report = sample() | {"model": 'a: "b"\n---\nx', "data_source": "| : #"}
    report["provenance"] = {"licence": "ours: ask", "source": "s"}
    told = header(card(normalise(report), "coreml"))
    assert (told["license"], told["license_name"]) == ("other", "ours: ask")
    assert told["model-index"][0]["name"] == report["model"]
