"""The program that goes to a device: plain Python, what it reads there, what it keeps."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from edgegen import on_device
from edgegen.devices import _runner


def test_the_runner_is_python_38_of_the_standard_library_alone() -> None:
    text = on_device.RUNNER.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 8))
    plain = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported = {alias.name.split(".")[0] for alias in plain}
    imported |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names) | {"__future__"}
    assert "edgegen" not in imported
    newer = {"removeprefix", "removesuffix", "pairwise", "file_digest", "cache"}  # of str and the library since 3.9
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & newer


def write(root: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_facts_and_state_are_read_from_the_device_tree_and_sysfs(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "etc/os-release": 'PRETTY_NAME="Debian 12"\n',
            "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000\n",
            "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2400000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "61250\n",
            "sys/class/thermal/thermal_zone1/type": "broken\n",
            "sys/class/thermal/thermal_zone1/temp": "-256000\n",
            "sys/class/hwmon/hwmon1/name": "ina3221\n",
            "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",  # mV
            "sys/class/hwmon/hwmon1/curr1_input": "1200\n",  # mA
            "sys/class/hwmon/hwmon2/name": "other\n",
            "sys/class/hwmon/hwmon2/power1_input": "2500000\n",  # microwatts
        },
    )
    facts, state = _runner.facts(str(tmp_path)), _runner.state(str(tmp_path), programs=False)
    assert facts["model"] == "Raspberry Pi 5 Model B Rev 1.0" and facts["os"].startswith("Debian 12, Linux")
    assert state["mhz"] == {"policy0": 1500.0, "policy0 max": 2400.0, "17000000.gpu": 918.0}
    assert state["governor"] == "ondemand" and state["celsius"] == {"cpu-thermal": 61.25}
    assert state["watts"] == {"ina3221 VDD_IN": 6.0, "other 1": 2.5}


def test_a_line_that_was_cut_off_is_not_a_finished_part(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"kind": "round", "item": 0}\n{"kind": "rou')
    log = _runner.Log(str(file))
    assert log.lines == [{"kind": "round", "item": 0}]
    log.add("round", item=1)
    assert _runner.Log(str(file)).of("round", 1) == [{"kind": "round", "item": 1}]
