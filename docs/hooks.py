"""Every error message of the source, for errors.md, and every command's help, for commands.md.

mkdocs calls `on_page_markdown`; run, it prints errors.md with its list.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "<!-- MESSAGES -->"
COMMANDS = "<!-- COMMANDS -->"


BESIDE = {
    "ValueError": ("passes", "models", "nn", "training", "samplers", "metrics", "search"),
    "Refused": ("devices",),
}
"""What is raised by another name, and in which folders it reaches the user."""


def messages(package: Path = ROOT / "edgegen") -> dict[str, list[tuple[str, str]]]:
    """Error or warning -> (file, message) of the whole source; what is filled in at run time is in braces."""
    classes = {node.name for node in ast.parse((package / "errors.py").read_text(encoding="utf-8")).body
               if isinstance(node, ast.ClassDef)}  # fmt: skip
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name, text = _said(node)
            text = " ".join(text.split())
            known = name in classes or place.split("/")[0] in BESIDE.get(name, ())
            if known and text not in ("", "{...}"):
                found.setdefault(name, []).append((place, text))
    return found


def _said(node: ast.AST) -> tuple[str, str]:
    """(class, message) of a `raise` or of `warnings.warn`; ("", "") of anything else."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        name, given = _name(node.exc.func), node.exc.args
        if name == "MissingExtra":
            package, why, extra = (_text(one) for one in given)
            return name, f"{package} is not installed; it is needed {why}: pip install 'edgegen[{extra}]'"
        return name, _text(given[0])
    if isinstance(node, ast.Call) and _name(node.func) == "warn" and len(node.args) > 1:
        return _name(node.args[1]), _text(node.args[0])
    return "", ""


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


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
        parts.append(f"### {name}: messages\n\n[What to do](#{name.lower()}).\n\n{listed}")
    return "\n\n".join(parts)


def commands() -> str:
    """The help of every command as Markdown."""
    import click
    import typer

    from edgegen import cli

    group: Any = typer.main.get_command(cli.app)
    parts = []
    for name, command in sorted(group.commands.items()):
        context = click.Context(command, info_name=f"edgegen {name}", max_content_width=100, terminal_width=100)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs: the lists in the place of their marks."""
    for mark, made in ((MARK, table), (COMMANDS, commands)):
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


if __name__ == "__main__":
    sys.stdout.write(on_page_markdown((ROOT / "docs" / "errors.md").read_text(encoding="utf-8")))
