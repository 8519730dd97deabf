"""`edgegen profile-device`: the operator table of a device. `cli` registers it; heavy modules are imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgegen import cli_options, errors


def profile_device(
    target: Annotated[str, cli_options.named("targets", "Target that the device is: a name, or a .toml file.")],
    runtime: Annotated[list[str] | None, typer.Option(help="Runtime, repeatable; default: the target's.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Precision; repeat for several.")] = None,
    device: Annotated[str, typer.Option(help="local, ssh://user@host[:port] or adb[:serial].")] = "local",
    out: Annotated[Path | None, typer.Option(help="Table to write or continue; default operators-TARGET.json.")] = None,
    minutes: Annotated[float, typer.Option(help="Time for all of it; a second call goes on.", min=0.1)] = 20.0,
    operators: Annotated[int, typer.Option(help="Most small networks a runtime and precision.", min=1)] = 150,
    model: Annotated[list[str] | None, cli_options.named("models", "Time operators of this too; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)] = 0,
    build_only: Annotated[bool, typer.Option(help="Export and build, time nothing.")] = False,
    while_busy: Annotated[bool, typer.Option(help="Time on a busy machine: a trial that no estimate uses.")] = False,
) -> None:
    """Time operators on a device, for estimates of whole networks on it; stops when its minutes are up, and goes on.

    Example: edgegen profile-device --target cpu --runtime onnxruntime --minutes 5
    """
    cli_options.need_torch("to profile a device")
    from rich.console import Console

    from edgegen import probes, profiling, targets

    chosen, errs = targets.load(target), Console(stderr=True)
    file = out or Path(f"operators-{chosen.name}.json")
    pairs = [(name, kind) for name in runtime or chosen.runtimes for kind in precision or ("fp32",)]
    wanted = [*_of_models(model or [], operators), *probes.sample(operators, seed)][:operators]
    how = profiling.Settings(minutes=minutes, count=operators, device=device, seed=seed)
    with errs.status(f"{device}: begin") as status:
        table = profiling.profile(
            chosen, pairs, file, wanted, how, lambda text, share: status.update(f"{device}: {text} {share:.0%}"),
            build_only=build_only, while_busy=while_busy,
        )  # fmt: skip
    for line in _lines(table):
        typer.echo(line)
    if not build_only:
        typer.echo(f"{file}: put it into targets/operators/ to have it used; benchmarks/estimator.py validates it")


def _of_models(specs: list[str], most: int) -> list[dict[str, Any]]:
    """Probes of the models' operators, as many of each model; at most half of all probes."""
    import tempfile

    from edgegen import loading, onnx_graph, operators, probes

    found: list[dict[str, Any]] = []
    for spec in specs:
        model = loading.load_model(spec, latency_only=True)
        with tempfile.TemporaryDirectory() as folder:
            graph = onnx_graph.to_onnx(model.stage, Path(folder) / "model.onnx")
            found += probes.of_kernels(operators.kernels(graph.onnx, ""))[: max(1, most // 2 // len(specs))]
    return found


def _lines(table: dict[str, Any]) -> list[str]:
    """What each runtime and precision has, and how well a fit of it finds networks of the table that were left out."""
    from edgegen import operator_fit, operator_table

    lines = []
    for runtime, precision in operator_table.pairs_of(table):
        samples = operator_table.samples(table, runtime, precision)
        lost = sum((e["runtime"], e["precision"]) == (runtime, precision) for e in table["entries"]) - len(samples)
        text = f"{runtime} {precision}: {len(samples)} networks timed, {lost} not"
        try:
            middle, high = operator_fit.fit(samples).error
            text += f"; left out one at a time: error median {middle:.0%}, 90% below {high:.0%}"
        except errors.UsageError as error:
            text += f"; {error}"
        lines.append(text)
    return lines
