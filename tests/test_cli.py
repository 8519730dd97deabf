"""The command line starts fast, imports nothing heavy, and lists what is there."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgegen import cli, registry

HEAVY = ("torch", "openvino", "onnxruntime", "nncf", "timm", "numpy", "onnx")
EDGEGEN = Path(sys.executable).with_name("edgegen")


def seconds(*arguments, enough):
    """The least wall time of five starts, or of twenty where five are not below `enough`: what the program takes,
    without what else the machine does.

    Python's compiled files are kept, as users have it: where they are forbidden, each start compiles our modules anew.
    """
    times, environment = [], {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    while len(times) < 5 or (min(times) >= enough and len(times) < 20):
        began = time.perf_counter()
        subprocess.run([str(EDGEGEN), *arguments], check=True, capture_output=True, env=environment)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.alone
@pytest.mark.skipif(not EDGEGEN.exists(), reason="the command `edgegen` is not installed beside this Python")
def test_help_takes_less_than_three_tenths_of_a_second():
    assert seconds("--help", enough=0.3) < 0.3


@pytest.mark.alone
@pytest.mark.skipif(not EDGEGEN.exists(), reason="the command `edgegen` is not installed beside this Python")
@pytest.mark.parametrize("kind", cli.LISTED)
def test_listing_takes_less_than_half_a_second(kind):
    assert seconds("list", kind, enough=0.5) < 0.5


def test_only_the_command_that_is_asked_for_is_read():
    known = cli.app.registered_commands
    names = [cli._name(command) for command in known]
    assert {"compress", "list", "lint-calibration", "profile-device"} <= set(names)
    for name, command in zip(names, known, strict=True):
        assert cli._only([name, "--help"]).registered_commands == [command]
    for arguments in ([], ["--help"], ["--version", "list"], ["lst"]):  # the help and the near match need all of them
        assert cli._only(arguments).registered_commands == known
    assert cli.app.registered_commands is known


@pytest.mark.parametrize("arguments", [["--help"], ["list", "models"], ["list", "passes"], ["list", "targets"]])
def test_help_and_listing_import_nothing_heavy(arguments):
    code = (
        "import sys; sys.argv[1:] = " + repr(arguments) + "\n"
        "from edgegen import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    pass\n"
        f"print('HEAVY', [n for n in {HEAVY!r} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout


@pytest.mark.parametrize("kind", cli.LISTED)
def test_every_name_is_listed_with_a_line_about_it(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["edgegen", "list", kind])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert [line.split()[0] for line in lines] == list(registry.names(kind))
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_the_cache_shows_its_place_and_is_emptied(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "steps").mkdir(parents=True)
    (tmp_path / "cache" / "steps" / "a").write_bytes(bytes(3_000_000))
    for arguments, words in ((["cache"], "3.0 MB"), (["cache", "--clean"], "removed")):
        monkeypatch.setattr(sys, "argv", ["edgegen", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        shown = capsys.readouterr().out
        assert words in shown
        assert str(tmp_path / "cache") in shown
    assert not os.path.exists(tmp_path / "cache")


def test_clean_removes_every_folder_that_edgegen_makes_in_its_cache():
    from edgegen import files

    made = set()
    for file in files.Path(files.__file__).parent.rglob("*.py"):
        made |= set(re.findall(r'cache_folder\(\) / "(\w+)"', file.read_text(encoding="utf-8")))
    assert made == set(files.CACHED)


def test_a_command_of_one_process_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgegen import cli_options, errors

    cli_options.need_one_process("compress")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(errors.UsageError, match="torchrun started 2"):
        cli_options.need_one_process("compress")


def test_every_argument_and_option_has_a_help_text():
    import typer

    group = typer.main.get_command(cli.app)
    silent = [f"{name} {parameter.name}" for name, command in group.commands.items() for parameter in command.params
              if parameter.name != "help" and not getattr(parameter, "help", "")]  # fmt: skip
    assert len(group.commands) > 15
    assert silent == []
