"""Every error message of the source, for errors.md: mkdocs calls `on_page_markdown`; run, it prints the page."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "<!-- MESSAGES -->"


def messages(package: Path = ROOT / "edgegen") -> dict[str, list[tuple[str, str]]]:
    """Error class -> (file, message) of every `raise` in the source; what is filled in at run time is in braces."""
    classes = {node.name for node in ast.parse((package / "errors.py").read_text(encoding="utf-8")).body
               if isinstance(node, ast.ClassDef)}  # fmt: skip
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            text = " ".join(_text(call.args[0]).split())
            if name in classes and text not in ("", "{...}"):
                found.setdefault(name, []).append((file.relative_to(package).as_posix(), text))
    return found


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}" if isinstance(node.value, ast.Name | ast.Attribute) else "{...}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{...}"


def table() -> str:
    """All messages as Markdown, by class."""
    parts = []
    for name, rows in sorted(messages().items()):
        listed = "\n".join(f"- `{text.replace('`', chr(39))}` ({file})" for file, text in rows)
        parts.append(f"### {name}: messages\n\n{listed}")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the list in the place of its mark."""
    return markdown.replace(MARK, table()) if MARK in markdown else markdown


if __name__ == "__main__":
    sys.stdout.write((ROOT / "docs" / "errors.md").read_text(encoding="utf-8").replace(MARK, table()))
