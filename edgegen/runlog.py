"""The log of a run: what is finished is written once and replayed on resume, never measured or decided again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunLog:
    """Append-only JSON lines {"key": ..., "value": ...}; each line is on the disk before the run goes on.

    A line cut off by a kill is dropped when the log is opened again: that step simply runs again. `resumed`: whether
    there was finished work when it was opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._values: dict[str, Any] = {}
        if path.exists():
            self._read()
        self.resumed = bool(self._values)

    def _read(self) -> None:
        good = 0
        data = self.path.read_bytes()
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        if good < len(data):
            with self.path.open("r+b") as handle:
                handle.truncate(good)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The logged value of `key`, or `compute()` (a JSON value), logged."""
        if key not in self._values:
            value = json.loads(json.dumps(compute()))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"key": key, "value": value}) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
            self._values[key] = value
        return self._values[key]
