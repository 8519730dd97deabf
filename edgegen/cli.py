"""The command line: argument parsing and rendering only. Heavy modules are imported inside the commands."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgegen import (
    cli_compare,
    cli_compress,
    cli_device,
    cli_doctor,
    cli_ending,
    cli_evaluate,
    cli_export,
    cli_lint,
    cli_options,
    cli_probe,
    cli_profile_device,
    cli_search,
    cli_train,
    errors,
    registry,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress image generators and vision backbones for edge devices, and prove it with measurements.",
)
LISTED = (
    "models", "passes", "targets", "runtimes", "metrics", "calibration", "recipes", "rewrites", "samplers", "spaces",
)  # fmt: skip
Bundle = Annotated[Path, typer.Argument(help="A bundle's folder.")]


# The base class of what typer raises for wrong arguments; its own name is private to typer.
_WrongUsage: type[Any] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point: errors are one line on stderr; exit code 2 for bad input, 1 for what failed in the work."""
    cli_ending.listen()
    try:
        raise SystemExit(_only(sys.argv[1:])(standalone_mode=False) or 0)
    except _WrongUsage as error:
        cli_ending.say(_usage(error))
        raise SystemExit(2) from None
    except errors.EdgegenError as error:
        cli_ending.say(" ".join(str(error).split()))
        raise SystemExit(2 if isinstance(error, errors.UsageError) else 1) from None
    except OSError as error:  # a full disk, a folder that went away: not bad input, and no traceback either
        cli_ending.say(f"{error}; finished steps are kept: mend it, and run again with --resume")
        raise SystemExit(129 if cli_ending.unheard(error) else 1) from None
    except (KeyboardInterrupt, cli_ending.Ended) as error:
        line, code = cli_ending.told(error, sys.argv[1:])
        cli_ending.say(line)
        raise SystemExit(code) from None
    except Exception as error:  # noqa: BLE001 - the last resort: nothing of ours may reach the user as a traceback
        from edgegen import faults

        cli_ending.say(faults.told(error))
        raise SystemExit(1) from None


def _only(arguments: list[str]) -> typer.Typer:
    """The program with the wanted command alone: typer reads the signatures of all it knows, a tenth of a second."""
    wanted = [c for c in app.registered_commands if arguments[:1] == [_name(c)]]
    program = copy.copy(app)
    program.registered_commands = wanted or app.registered_commands
    return program


def _name(command: Any) -> str:
    return str(command.name or command.callback.__name__.replace("_", "-"))


def _usage(error: Any) -> str:
    name = getattr(error, "option_name", "")
    if name:
        flags = [flag for parameter in error.ctx.command.params for flag in parameter.opts] if error.ctx else []
        return f"unknown option {name!r}{registry.near(name, flags)}; see {error.ctx.command_path} --help"
    where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
    return " ".join(error.format_message().split()).rstrip(".") + where


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from edgegen import __version__

        print(__version__)
        raise typer.Exit


app.command()(cli_compress.compress)  # here, because the help lists commands in this order


@app.command()
def verify(bundle: Bundle) -> None:
    """Check a bundle: every file's hash, and the golden outputs in its runtime.

    Example: edgegen verify out/edsr-cpu
    """
    from edgegen import checking

    findings = checking.verify(bundle)
    for finding in findings:
        print(f"edgegen: {bundle}: {finding}", file=sys.stderr)
    if findings:
        raise SystemExit(1)
    print(f"{bundle}: every file matches its hash; golden outputs within tolerance")


@app.command()
def reproduce(
    bundle: Bundle,
    out: Annotated[Path | None, typer.Option(help="Folder of the new bundle; default BUNDLE-again.")] = None,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
) -> None:
    """Run a bundle's own request again and compare recipe, weights and graph with the original.

    Example: edgegen reproduce out/edsr-cpu
    """
    cli_options.need_torch("to compress")
    from edgegen import checking
    from edgegen.report import terminal

    home = bundle.resolve()  # "." has no name
    with terminal.progress(quiet=quiet) as progress:
        findings = checking.reproduce(bundle, out or home.with_name(home.name + "-again"), progress)
    for finding in findings:
        print(f"edgegen: {finding}", file=sys.stderr)
    if findings:
        raise SystemExit(1)
    print(f"{bundle}: reproduced; recipe, weights and graph are the same")


@app.command(name="list")
def list_(kind: Annotated[str, typer.Argument(help=", ".join(LISTED), autocompletion=lambda: LISTED)]) -> None:
    """List what there is of one kind.

    Example: edgegen list models
    """
    if kind not in LISTED:
        raise errors.UsageError(f"unknown kind {kind!r}{registry.near(kind, LISTED)}; there are: {', '.join(LISTED)}")
    names = registry.names(kind)
    width = max(map(len, names), default=0)
    for name in names:
        print(f"{name:<{width}}  {registry.summary(kind, name)}")


@app.command()
def cache(clean: Annotated[bool, typer.Option(help="Remove everything in it.")] = False) -> None:
    """Show where finished steps are kept and how much they take; --clean removes them.

    Example: edgegen cache
    """
    import shutil

    from edgegen import files

    folder = files.cache_folder()
    for name in sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []:
        count, size = files.tree_size(folder / name)
        print(f"{name:<12} {count:>6} files {size / 1e6:>10.1f} MB")
    count, size = files.tree_size(folder)
    print(f"{folder}: {count} files, {size / 1e6:.1f} MB")
    if clean:
        for name in files.CACHED:  # not the folder itself: $EDGEGEN_CACHE may name one that holds other things too
            shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        print("removed")


@app.command()
def run(
    bundle: Bundle,
    source: Annotated[Path | None, typer.Argument(help="An image, or .npy network inputs; none for latents.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the image, or .npy outputs.")] = Path("output.png"),
    seed: Annotated[int, typer.Option(help="Of everything that is drawn at random.", min=0)] = 0,
) -> None:
    """Run a bundle on an image (or on sampled latents), with its own pre- and post-processing.

    Example: edgegen run out/edsr-cpu photo.png --out sharper.png
    """
    from edgegen import checking

    print(checking.run_sample(bundle, source, out, seed))


# Commands in files of their own; importing them puts them on `app`.
app.command()(cli_export.export)
app.command()(cli_compare.compare)
app.command()(cli_doctor.doctor)
app.command(name="lint-calibration")(cli_lint.lint_calibration)
app.command()(cli_device.profile)
app.command(name="profile-device")(cli_profile_device.profile_device)
app.command()(cli_probe.probe)
app.command()(cli_search.search)
app.command()(cli_train.train)
app.command()(cli_evaluate.evaluate)


if __name__ == "__main__":
    main()
