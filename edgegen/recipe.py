"""Recipes: an ordered list of passes with their options, as TOML in and TOML out.

The options of a pass are the keyword-only parameters of its function. Names, defaults and kinds of values are read from
the file's syntax tree, so that a recipe is checked (with near matches) before anything heavy is imported.
"""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgegen import errors, registry

SCHEMA = 1
# Passes that write a precision plan; all others change the network itself.
PRECISION_PASSES = ("quantize", "cast")
# Passes after which a network is as good as it gets: a group ends there, after the rounds of training that follow.
ENDS = ("distill", "distill_gan", "distill_steps", "tune_sampler", "cache_steps")
ROUNDS = ("distill", "distill_gan")
# Those among them that train the network, and so bring back what the passes before them took.
TRAINS = (*ROUNDS, "distill_steps")
# Those that learn from a teacher, which may be another network than the original.
TAUGHT = ("distill", "quantize_aware")
# Those that do nothing else: without a change before them there is no use in them.
RECOVERS = ("reconstruct", *ROUNDS)
# Passes that change nothing but how well the network stands INT8: judged by INT8 builds, beside those without them.
PREPARING_PASSES = ("equalize", "correct_bias", "round_adaptively", "quantize_aware")


class Step(BaseModel):
    """One pass with its options; `keep` keeps it even when it does not pay (the report says so).

    teacher: another network than the original to learn from, as --model takes it, with its weights file where it ships
    none; for the passes in TAUGHT.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)
    name: str = Field(alias="pass")
    options: dict[str, Any] = {}
    keep: bool = False
    teacher: str = ""
    teacher_weights: str = ""

    @property
    def taught_by(self) -> dict[str, str]:
        """The fields that name a teacher, where the step states them."""
        own = {"teacher": self.teacher, "teacher_weights": self.teacher_weights}
        return {key: value for key, value in own.items() if value}

    @property
    def told(self) -> dict[str, Any]:
        """All that the step states, by name: its options, and whom it learns from."""
        return self.options | self.taught_by


class Recipe(BaseModel):
    """Ordered steps; `description` is for people, `schema` is the version of this format."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)
    version: int = Field(SCHEMA, alias="schema")
    description: str = ""
    steps: tuple[Step, ...] = ()


@cache
def _parameters(name: str) -> tuple[tuple[ast.arg, ast.expr | None], ...]:
    """The keyword-only parameters of a pass, each with its default, read without importing it."""
    tree = ast.parse(registry.path("passes", name).read_text(encoding="utf-8"))
    function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    if function is None:
        raise errors.RecipeError(f"the file of pass {name!r} defines no function {name!r}")
    return tuple(zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True))


@cache
def options_of(name: str) -> dict[str, Any]:
    """Option name -> default of a pass, read without importing it. A default that is not a literal reads as None."""
    values = {}
    for argument, default in _parameters(name):
        try:
            values[argument.arg] = ast.literal_eval(default) if default is not None else None
        except ValueError:
            values[argument.arg] = None
    return values


def check(recipe: Recipe, source: str) -> Recipe:
    """Check every pass name, option name, and the kind of every value: what its parameter is annotated with.

    Raises:
        RecipeError: another schema version, an unknown pass or an unknown option (names the near match), or a value of
            another kind, such as a text where a number is wanted.
    """
    if recipe.version != SCHEMA:
        raise errors.RecipeError(f"{source}: recipe schema must be {SCHEMA}, got {recipe.version}")
    for step in recipe.steps:
        registry.check("passes", step.name)
        if step.taught_by and step.name not in TAUGHT:
            raise errors.RecipeError(
                f"{source}: pass {step.name} takes no teacher of its own; these do: {', '.join(TAUGHT)}"
            )
        if step.teacher_weights and not step.teacher:
            raise errors.RecipeError(f"{source}: pass {step.name}: teacher_weights says no network; give teacher too")
        known = {argument.arg: argument.annotation for argument, _ in _parameters(step.name)}
        for option, value in step.options.items():
            if option not in known:
                hint = registry.near(option, tuple(known))
                allowed = ", ".join(known) or "none"
                raise errors.RecipeError(
                    f"{source}: pass {step.name} has no option {option!r}{hint}; it has: {allowed}"
                )
            kind = known[option]
            if kind is not None and not _fits(value, kind):
                raise errors.RecipeError(f"{source}: pass {step.name}: {option} must be {_told(kind)}, got {value!r}")
    return recipe


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_WORDS = {"int": ("a whole number", "whole numbers"), "float": ("a number", "numbers"),
          "bool": ("true or false", "true or false"), "str": ("a text", "texts")}  # fmt: skip


def _fits(value: Any, kind: ast.expr) -> bool:
    """Whether a value is of the kind that an annotation names. A text is no list, true is no number."""
    match kind:
        case ast.BinOp(left=left, right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="Mapping"), slice=ast.Tuple(elts=[key, item])):
            return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
        case ast.Subscript(slice=item):
            return isinstance(value, (list, tuple)) and all(_fits(v, item) for v in value)
        case ast.Name(id=name):
            return isinstance(value, _TYPES[name]) and (name == "bool" or not isinstance(value, bool))
    return value is None


def _told(kind: ast.expr, several: bool = False) -> str:
    """An annotation in words; None is what an option is where it is left out, so it is not named."""
    match kind:
        case ast.BinOp(left=left, right=ast.Constant()):
            return _told(left)
        case ast.BinOp(left=left, right=right):
            return f"{_told(left)} or {_told(right)}"
        case ast.Subscript(value=ast.Name(id="Mapping"), slice=ast.Tuple(elts=[_, item])):
            return f"a table of {_told(item, True)}"
        case ast.Subscript(slice=item):
            return f"{'lists' if several else 'a list'} of {_told(item, True)}"
        case ast.Name(id=name):
            return _WORDS[name][several]
    return "left out"


def load(name_or_path: str) -> Recipe:
    """A recipe by preset name, or from a TOML file (a path ending in .toml).

    Raises:
        RecipeError: unknown name, unreadable file, or a field with an error (named).
    """
    is_file = name_or_path.endswith(".toml")
    path = Path(name_or_path) if is_file else registry.path("recipes", name_or_path)
    try:
        table = registry.load_toml(path)
        return check(Recipe.model_validate(table), str(name_or_path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise errors.RecipeError(f"{path.name}: {where}: {first['msg']}, got {first.get('input')!r}") from error
    except errors.RecipeError:
        raise
    except errors.UsageError as error:
        raise errors.RecipeError(str(error)) from error


def with_kept(recipe: Recipe, kept: tuple[str, ...]) -> Recipe:
    """The recipe with `keep` set on the named passes.

    Raises:
        RecipeError: a name that is not a pass of this recipe.
    """
    present = tuple(step.name for step in recipe.steps)
    for name in kept:
        if name not in present:
            raise errors.RecipeError(
                f"--keep {name}: not a pass of this recipe{registry.near(name, present)}; it has: {', '.join(present)}"
            )
    steps = tuple(step.model_copy(update={"keep": step.keep or step.name in kept}) for step in recipe.steps)
    return recipe.model_copy(update={"steps": steps})


def groups(recipe: Recipe) -> list[tuple[Step, ...]]:
    """The structural steps in the units in which they are judged: up to and including the `distill` steps that follow.

    Pruning alone costs quality that recovery brings back, so the two are kept or undone together. What prepares for
    INT8 is a group of its own.
    """
    result: list[tuple[Step, ...]] = []
    open_group: list[Step] = []
    for step in recipe.steps:
        if step.name in PRECISION_PASSES:
            continue
        prepares = step.name in PREPARING_PASSES
        other = bool(open_group) and (open_group[-1].name in PREPARING_PASSES) != prepares
        if other or (open_group and open_group[-1].name in ENDS and step.name not in ROUNDS):
            result.append(tuple(open_group))
            open_group = []
        open_group.append(step)
    return result + ([tuple(open_group)] if open_group else [])


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML text that `load` reads back to an equal recipe."""
    lines = [f"schema = {recipe.version}"]
    if recipe.description:
        lines.insert(0, f"description = {json.dumps(recipe.description)}")
    for step in recipe.steps:
        lines += ["", "[[steps]]", f"pass = {json.dumps(step.name)}"]
        if step.options:
            lines.append(f"options = {_value(step.options)}")
        if step.keep:
            lines.append("keep = true")
        lines += [f"{key} = {json.dumps(value)}" for key, value in step.taught_by.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    # JSON and TOML agree on strings, numbers, booleans and lists; only tables are written with `=`.
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return json.dumps(value)
