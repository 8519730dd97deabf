"""How well does the sum of a device's operators tell the latency of whole networks that the fit has never seen?

    python benchmarks/estimator.py --build-only          # exports and builds: may be done on a busy machine
    python benchmarks/estimator.py [--minutes 20]        # profile, time whole networks, fit, compare

For every runtime that runs here: its operator table (targets/operators/host.json, `edgegen profile-device`) is
measured, then NETWORKS are timed in turns and compared with their estimates. Every network is timed in two passes of
separate processes, in a third where those disagree by over 10%, and the quickest pass counts: a machine that is shared
with others loses time for minutes, never gains any. An estimate is made twice: from the small
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
from edgegen.operator_base import Sample
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
    f"{OURS}/resnet_cifar.py:resnet20", f"{OURS}/mobilenet_v2.py:mobilenet_v2", *(f"timm:{name}" for name in (
        "resnet18", "resnet26", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv3_large_100",
        "mobilenetv4_conv_small", "efficientnet_lite0", "regnetx_002", "repvgg_a0", "ghostnet_050", "fasternet_t0",
        "convnext_atto", "deit_tiny_patch16_224", "vit_tiny_patch16_224", "starnet_s1", "densenet121", "mobileone_s0",
        "edgenext_xx_small", "efficientvit_b0", "hardcorenas_a", "selecsls42b", "repvit_m0_9",
        "lcnet_050", "mnasnet_small", "levit_128s", "resnet10t", "regnety_002", "efficientvit_m0", "repghostnet_050",
        "mobilenetv1_100", "pvt_v2_b0", "hgnetv2_b0", "tinynet_e", "dla46_c", "mobilevit_xxs", "fbnetc_100",
        "pit_ti_224", "gernet_s", "inception_next_atto", "mambaout_femto", "efficientnet_b0", "cs3darknet_focus_s",
        "xcit_nano_12_p16_224", "shvit_s1", "skresnet18", "visformer_tiny", "mixer_s32_224", "rexnet_100",
        "ese_vovnet19b_slim_dw", "fastvit_t8", "efficientformerv2_s0",
    )),
)  # fmt: skip
# Networks so alike that one must not be estimated with the help of the other.
FAMILIES = (
    ("deit_tiny_patch16_224", "vit_tiny_patch16_224", "pit_ti_224"), ("mobilenet_v2", "mobilenetv2_050"),
    ("mobilenetv3_small_050", "mobilenetv3_large_100", "hardcorenas_a"),
    ("resnet18", "resnet26", "resnet10t", "skresnet18"), ("resnet20", "cifar_resnet"), ("regnetx_002", "regnety_002"),
    ("efficientnet_lite0", "efficientnet_b0", "tinynet_e"), ("mnasnet_small", "fbnetc_100"),
    ("ghostnet_050", "repghostnet_050"), ("convnext_atto", "inception_next_atto"),
)  # fmt: skip
TIMED = ("ms", "interval", "load", "busy", "round_medians", "samples", "n", "deviation", "date")
PASSES = 2  # over all networks, each in processes of its own
PARTS = 10  # of the families; each is estimated from the others
APART = 0.1  # two passes whose medians lie farther apart ask for a third
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


def built(pair: tuple[str, str], spec: str) -> bool:
    """Whether the network is exported and built, so that timing need not wait for it."""
    plan = profiling.plan_of(*pair, HOST)
    name = f"{pair[0]}-{files.key(dataclasses.asdict(plan))}.json"
    return (profiling_builds.home() / f"whole-{name_of(spec)}" / name).is_file()


def whole(
    pair: tuple[str, str], specs: Sequence[str], how: profiling.Settings, build_only: bool, end: float
) -> Iterator[dict[str, Any]]:
    """A row for every network, until the end: its kernels and its latency in one more pass."""
    runtime, precision = pair
    plan = profiling.plan_of(runtime, precision, HOST)
    with profiling_builds.building(runtime, HOST, how.limits) as build:
        for start in range(0, len(specs), how.batch):
            if time.monotonic() > end:
                return
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
                told = {"version": version, "date": time.strftime("%Y-%m-%d %H:%M")} | profiling.told(latency)
                yield joined(next((old for old in rows() if same(old, row)), None), row | told)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of one network in one runtime and precision."""
    return all(one[name] == other[name] for name in ("network", "runtime", "precision"))


def joined(old: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A row with what earlier passes saw: its time is that of the quickest pass.

    What other tenants of the machine do only ever adds time, and lasts for minutes: rounds of one pass share it.
    """
    if row["status"] != "measured":
        return row if old is None or old["status"] != "measured" else old
    before = passes_of(old) if old and old.get("version") == row["version"] else []
    mine = {name: row[name] for name in TIMED if name in row}
    best = min([*before, mine], key=lambda one: (bool(one.get("busy")), one["ms"]))
    kept = {name: value for name, value in (row | best).items() if name != "samples"}
    return kept | {"passes": [*before, mine]}


def passes_of(row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What each pass saw of a network, on a machine that was not busy."""
    if row is None or row["status"] != "measured":
        return []
    found = row.get("passes") or [{name: row[name] for name in TIMED if name in row}]
    return [one for one in found if not one.get("busy")]


def wanted(row: dict[str, Any] | None) -> int:
    """How many passes a network is to have: a third where two disagree."""
    found = sorted(one["ms"] for one in passes_of(row))
    return PASSES + (len(found) >= PASSES and found[1] > (1 + APART) * found[0])


def validate(
    pairs: Sequence[tuple[str, str]], how: profiling.Settings, specs: Sequence[str], build_only: bool, ready: bool
) -> None:
    """Time the networks (ready: those that are built) in passes until the minutes are up; each batch is kept."""
    end = time.monotonic() + 60 * how.minutes
    for number in range(1, 2 if build_only else PASSES + 2):
        for pair in pairs:
            held = {row["network"]: row for row in rows() if (row["runtime"], row["precision"]) == pair}
            left = [spec for spec in specs if build_only or (
                len(passes_of(held.get(name_of(spec)))) < number <= wanted(held.get(name_of(spec)))
                and (built(pair, spec) or not ready))]  # fmt: skip
            for row in whole(pair, left, how, build_only, end):
                said = f"{row['ms']:.3f} ms" if row["status"] == "measured" else f"not measured: {row.get('reason')}"
                print(f"{pair[0]} {pair[1]} {row['network']}: {said}", flush=True)
                if not build_only:
                    write([*(old for old in rows() if not same(old, row)), row])


def write(found: list[dict[str, Any]]) -> None:
    """Results with the machine, samples included."""
    files.write_json(RESULTS, {"machine": local.probe(), "threads": HOST.threads, "networks": found})


def reread(found: list[dict[str, Any]]) -> None:
    """Kernels of rows or entries as they are read now, where their exports are still in the cache."""
    read: dict[tuple[str, str, str], list[Any]] = {}
    for row in found:
        pair, probe = (row["runtime"], row["precision"]), row.get("probe") or {}
        network = row.get("network") or probe["name"]
        name = files.key(probe["input"], probe["layers"]) if probe.get("layers") else f"whole-{network}"
        file = profiling_builds.home() / name / "model.onnx"
        if row["status"] != "measured" or not file.is_file():
            continue
        if (name, *pair) not in read:
            found_now = operators.kernels(file, pair[0], profiling.plan_of(*pair, HOST))
            read[name, *pair] = [operators.to_row(kernel) for kernel in found_now]
        row["kernels"] = read[name, *pair]


def compared(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """"runtime precision" -> error figures; rows gain their estimates, and the table the whole networks."""
    found, figures = rows(), {}
    table["entries"] = [entry for entry in table["entries"] if entry["probe"]["layers"]]
    reread([*table["entries"], *found])
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


def estimate(mine: list[dict[str, Any]], small: list[Sample], whole: list[Sample]) -> None:
    """Every row's estimates: from small networks alone, and with the whole ones of other families beside them.

    Families are left out a tenth at a time; how smooth the fit is, it finds in what is left.
    """
    alone = operator_fit.fit(small)
    family_of = {row["network"]: next((f for f in FAMILIES if row["network"] in f), (row["network"],)) for row in mine}
    families = sorted(set(family_of.values()))
    for part in range(PARTS):
        out = set(families[part::PARTS])
        asked = [row for row in mine if family_of[row["network"]] in out]
        if not asked:
            continue
        others = [sample for row, sample in zip(mine, whole, strict=True) if family_of[row["network"]] not in out]
        fitted = operator_fit.fit([*small, *others])
        for row in asked:
            kernels = [operators.from_row(kernel) for kernel in row["kernels"]]
            row["small_only_ms"] = float(operator_fit.predict(alone, kernels).sum())
            row["estimate_ms"] = float(operator_fit.predict(fitted, kernels).sum())


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
    parser.add_argument("--time-only", action="store_true", help="time, fit nothing; --report does that later")
    parser.add_argument("--ready", action="store_true", help="of whole networks, those that are built already")
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
        specs = [spec for spec in NETWORKS if not options.only or name_of(spec) in options.only]
        brief = dataclasses.replace(how, seconds=0.08, warm_seconds=0.2)
        validate(pairs, brief, specs, options.build_only, options.ready)
    if options.build_only or options.time_only or not TABLE.is_file():
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
