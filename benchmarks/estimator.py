"""How well does the sum of a device's operators tell the latency of whole networks that the fit has never seen?

    python benchmarks/estimator.py --build-only          # exports and builds: may be done on a busy machine
    python benchmarks/estimator.py [--minutes 20]        # profile, fit, time whole networks, compare

For every runtime that runs here: its operator table (targets/operators/host.json, `edgegen profile-device`) is
measured, then NETWORKS are timed in turns and compared with their estimates. An estimate is made twice: from the small
networks alone, which are drawn from a seed, and with the whole networks of all other families beside them. The errors
of the second are those of the table, as it keeps the whole networks: one that a user brings is of no family here.
Results: benchmarks/results/estimator.json (samples, machine, versions, date) and .md; the errors go into the table,
where they stand beside every estimate. Resumable: a second call measures what is missing. Refuses while the machine is
busy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgegen import errors, files, loading, operator_fit, operator_table, operators, probes, profiling, profiling_builds
from edgegen.devices import local
from edgegen.types import Graph, Model, Target

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "estimator.json"
TABLE = ROOT / "targets" / "operators" / "host.json"
# Those whose workers start quickly first: what they leave of their minutes is for the others.
PAIRS = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("ncnn", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8"),
         ("litert", "fp32"), ("executorch", "fp32"))  # fmt: skip
OURS = ROOT / "benchmarks" / "networks"
NETWORKS = (
    "edsr", "dcgan", "cifar_resnet", f"{OURS}/style.py:style", f"{OURS}/taef2.py:decoder", f"{OURS}/rlfn.py:rlfn",
    f"{OURS}/resnet_cifar.py:resnet20", f"{OURS}/mobilenet_v2.py:mobilenet_v2", "timm:resnet18", "timm:resnet26",
    "timm:mobilenetv2_050", "timm:mobilenetv3_small_050", "timm:mobilenetv3_large_100", "timm:mobilenetv4_conv_small",
    "timm:efficientnet_lite0", "timm:regnetx_002", "timm:repvgg_a0", "timm:ghostnet_050", "timm:fasternet_t0",
    "timm:convnext_atto", "timm:deit_tiny_patch16_224", "timm:vit_tiny_patch16_224", "timm:starnet_s1",
    "timm:densenet121", "timm:mobileone_s0", "timm:edgenext_xx_small", "timm:efficientvit_b0", "timm:hardcorenas_a",
    "timm:selecsls42b", "timm:repvit_m0_9",
)  # fmt: skip
# Networks so alike that one must not be estimated with the help of the other.
FAMILIES = (
    ("deit_tiny_patch16_224", "vit_tiny_patch16_224"), ("mobilenet_v2", "mobilenetv2_050"),
    ("mobilenetv3_small_050", "mobilenetv3_large_100", "hardcorenas_a"), ("resnet18", "resnet26"),
    ("resnet20", "cifar_resnet"),
)  # fmt: skip
HOST = Target("cpu", "this host", ("onnxruntime",), is_host=True,
              precisions=("fp32", "fp16", "bf16", "int8"), threads=local.cores())  # fmt: skip


def name_of(spec: str) -> str:
    """`style` of `.../style.py:style`."""
    return spec.rpartition(":")[2]


def load(spec: str) -> Model:
    """A network with its own or random weights: only its latency matters."""
    return loading.load_model(spec, latency_only=True)


def graph_of(spec: str, runtime: str) -> Graph:
    """The exported network; what was exported is kept."""
    folder = profiling_builds.home() / f"whole-{name_of(spec)}"
    return profiling_builds.export(lambda: load(spec).stage, folder, [runtime])


def rows() -> list[dict[str, Any]]:
    """Networks timed so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["networks"] if RESULTS.is_file() else []


def whole(
    pair: tuple[str, str], specs: Sequence[str], how: profiling.Settings, build_only: bool
) -> Iterator[dict[str, Any]]:
    """A row for every network that is not done yet: its kernels and its latency."""
    runtime, precision = pair
    plan = profiling.plan_of(runtime, precision, HOST)
    with profiling_builds.building(runtime, HOST, how.limits) as build:
        for start in range(0, len(specs), how.batch):
            made = []
            for spec in specs[start : start + how.batch]:
                row: dict[str, Any] = {"network": name_of(spec), "runtime": runtime, "precision": precision}
                row["status"] = "not measured"
                try:
                    graph = dataclasses.replace(graph_of(spec, runtime), plan=plan)
                    out = graph.onnx.parent / f"{runtime}-{files.key(dataclasses.asdict(plan))}"
                    kernels = [operators.to_row(kernel) for kernel in operators.kernels(graph.onnx, runtime, plan)]
                    made.append((row | {"kernels": kernels, "macs": graph.macs}, graph, build(graph, out)))
                except errors.EdgegenError as error:
                    yield row | {"reason": " ".join(str(error).split())[:300]}
            if build_only or not made:
                continue
            feeds = [profiling_builds.feeds_of(graph) for _, graph, _ in made]
            times = profiling.time_them([artifact for *_, artifact in made], feeds, HOST, how)
            for (row, _, artifact), latency in zip(made, times, strict=True):
                version = profiling.version_of(runtime, artifact.versions)
                yield row | {"version": version, "date": time.strftime("%Y-%m-%d")} | profiling.told(latency)


def validate(pairs: Sequence[tuple[str, str]], how: profiling.Settings, only: Sequence[str], build_only: bool) -> None:
    """Time the networks that are missing, and write results after each batch."""
    specs = [spec for spec in NETWORKS if not only or name_of(spec) in only]
    for pair in pairs:
        done = {row["network"] for row in rows() if (row["runtime"], row["precision"]) == pair and not row.get("busy")}
        left = [spec for spec in specs if name_of(spec) not in done]
        for row in whole(pair, left, how, build_only):
            said = f"{row['ms']:.3f} ms" if row["status"] == "measured" else f"not measured: {row.get('reason')}"
            print(f"{pair[0]} {pair[1]} {row['network']}: {said}", flush=True)
            if not build_only:
                same = ("network", "runtime", "precision")
                kept = [old for old in rows() if any(old[name] != row[name] for name in same)]
                write([*kept, row])


def write(found: list[dict[str, Any]]) -> None:
    """Results with the machine, samples included."""
    files.write_json(RESULTS, {"machine": local.probe(), "threads": HOST.threads, "networks": found})


def compared(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """"runtime precision" -> error figures; rows gain their estimates, and the table the whole networks."""
    found, figures = rows(), {}
    table["entries"] = [entry for entry in table["entries"] if entry["probe"]["layers"]]
    for pair in list(operator_table.pairs_of(table)):
        mine = [r for r in found if (r["runtime"], r["precision"]) == pair and r["status"] == "measured"]
        small = operator_table.samples(table, *pair)
        if len(small) < operator_fit.LEAST or not mine:
            continue
        whole = [entry_of(row) for row in mine]
        estimate(mine, small, operator_table.samples({"entries": whole}, *pair))
        alone = operator_table.errors_of([(row["small_only_ms"], row["ms"]) for row in mine])
        told = operator_table.errors_of([(row["estimate_ms"], row["ms"]) for row in mine])
        busy = any(row.get("busy") for row in mine) or any(
            e.get("busy") for e in table["entries"] if (e["runtime"], e["precision"]) == pair)  # fmt: skip
        figures[" ".join(pair)] = told | {"probes": len(small), "date": time.strftime("%Y-%m-%d"), "busy": busy,
                                          "small_only_within20": alone["within20"]}  # fmt: skip
        table["entries"] += whole
        print(f"{' '.join(pair)}: {told['within20']:.0%} within 20%", flush=True)
    if found:
        write(found)
    return figures


def entry_of(row: dict[str, Any]) -> dict[str, Any]:
    """A whole network as an entry of the table, which tells it by its empty list of layers; samples stay behind."""
    kept = {name: row[name] for name in ("runtime", "precision", "kernels", "status", "ms", "round_medians", "date")}
    return {**kept, "busy": bool(row.get("busy")), "probe": {"name": row["network"], "input": [], "layers": []}}


def estimate(mine: list[dict[str, Any]], small: list[operator_fit.Sample], whole: list[operator_fit.Sample]) -> None:
    """Every row's estimates: from small networks alone, and with the whole ones of other families beside them."""
    alone = operator_fit.fit(small)
    fits: dict[Sequence[str], operator_fit.Fit] = {}
    for row in mine:
        family = next((names for names in FAMILIES if row["network"] in names), (row["network"],))
        if family not in fits:
            others = [sample for other, sample in zip(mine, whole, strict=True) if other["network"] not in family]
            fits[family] = operator_fit.fit([*small, *others], alone.shape)
        kernels = [operators.from_row(kernel) for kernel in row["kernels"]]
        row["small_only_ms"] = float(operator_fit.predict(alone, kernels).sum())
        row["estimate_ms"] = float(operator_fit.predict(fits[family], kernels).sum())


def report(figures: dict[str, dict[str, Any]]) -> str:
    """Errors by runtime, then every network."""
    head = json.loads(RESULTS.read_text(encoding="utf-8"))
    machine = head["machine"]
    lines = [
        f"Whole networks against the sum of their operators, on {machine['cpu_model']}, {head['threads']} threads.", "",
        "From small networks and the whole ones of other families; last column: from small networks alone.", "",
        "| runtime | small | whole, not seen | median error | p90 | within 10% | within 20% | bias | small alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, told in figures.items():
        note = " (busy machine)" if told["busy"] else ""
        shares = " | ".join(f"{told[key]:.0%}" for key in ("median", "p90", "within10", "within20"))
        counts = f"{told['probes']} | {told['networks']}"
        bias, alone = f"{told['bias']:+.0%}", f"{told['small_only_within20']:.0%} within 20%"
        lines.append(f"| {name}{note} | {counts} | {shares} | {bias} | {alone} |")
    lines += ["", "| network | runtime | measured ms | estimated ms | error |", "|---|---|---|---|---|"]
    for row in sorted(head["networks"], key=lambda row: (row["runtime"], row["precision"], row["network"])):
        runtime = f"{row['runtime']} {row['precision']}"
        if row["status"] != "measured":
            lines.append(f"| {row['network']} | {runtime} | not measured: {row.get('reason', '')[:160]} | | |")
        elif "estimate_ms" in row:
            off = row["estimate_ms"] / row["ms"] - 1
            lines.append(f"| {row['network']} | {runtime} | {row['ms']:.3f} | {row['estimate_ms']:.3f} | {off:+.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Profile, fit, validate; or build only, or only the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="for the operator tables of all runtimes together")
    parser.add_argument("--operators", type=int, default=150, help="most small networks a runtime and precision")
    parser.add_argument("--pair", nargs="*", default=[" ".join(pair) for pair in PAIRS], help='such as "openvino int8"')
    parser.add_argument("--only", nargs="*", default=[], help="networks")
    parser.add_argument("--build-only", action="store_true", help="export and build, time nothing")
    parser.add_argument("--while-busy", action="store_true", help="measure on a busy machine: a trial, marked as such")
    parser.add_argument("--report", action="store_true", help="only fit, compare and write the tables")
    options = parser.parse_args()
    pairs = [tuple(pair.split()) for pair in options.pair]
    if wrong := [pair for pair in pairs if pair not in PAIRS]:
        parser.error(f"--pair must be among {', '.join(' '.join(pair) for pair in PAIRS)}, got {' '.join(wrong[0])!r}")
    how = profiling.Settings(minutes=1e4 if options.build_only else options.minutes, count=options.operators)
    if not options.report:
        wanted = probes.sample(options.operators)
        profiling.profile(HOST, pairs, TABLE, wanted, how, lambda text, share: print(f"{text} {share:.0%}", flush=True),
                          build_only=options.build_only, while_busy=options.while_busy)  # fmt: skip
        validate(pairs, dataclasses.replace(how, seconds=0.15, warm_seconds=0.3), options.only, options.build_only)
    if options.build_only or not TABLE.is_file():
        return
    table = operator_table.load(TABLE)
    figures = compared(table)
    table["validation"] = {name: told for name, told in figures.items() if not told["busy"]}
    operator_table.save(table, TABLE)
    if RESULTS.is_file():
        text = report(figures)
        RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    try:
        main()
    except errors.EdgegenError as error:
        raise SystemExit(f"estimator: {error}") from None
