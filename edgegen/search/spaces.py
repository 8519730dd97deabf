"""Spaces are data: a TOML file of genes, each a list of choices for one option of one pass.

A candidate is a choice (a position in the list) for every gene; it is told as a recipe, so that every point of a front
can be made again by `edgegen compress`. The choices of a gene stand in order, from what changes the least to what saves
the most: the first ones together are the mildest candidate, the last ones the strongest.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgegen import files, recipe, registry
from edgegen.errors import UsageError

SCHEMA = 1
# Passes that only bring quality back, or prepare for a cut: without another pass there is nothing to do.
RECOVERY = (*recipe.ROUNDS, "reconstruct", "train_supernet")
Layers = Mapping[str, str]  # name of a layer -> name of its class
Choices = Mapping[str, int]  # gene -> position of its choice


class Gene(BaseModel):
    """One option of one pass, and the values it may take.

    off: with this value the pass is left out. layers, types: patterns of layer names, and classes; the value then holds
    for every layer that matches, and `option` takes a table from layers to values. ordered: neighbours are alike.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)
    name: str = Field(min_length=1)
    pass_name: str = Field(alias="pass")
    option: str
    choices: tuple[Any, ...] = Field(min_length=1)
    off: Any = None
    layers: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    ordered: bool = True

    @model_validator(mode="after")
    def _sound(self) -> Gene:
        told = [repr(choice) for choice in self.choices]
        if len(set(told)) < len(told):
            raise ValueError(f"gene {self.name}: choices must all differ, got {list(self.choices)}")
        if self.off is not None and self.off not in self.choices:
            raise ValueError(f"gene {self.name}: off must be one of its choices {list(self.choices)}, got {self.off!r}")
        return self

    @property
    def switch(self) -> bool:
        """Whether it only turns a pass on or off."""
        return self.off is not None and len(self.choices) == 2


class Space(BaseModel):
    """Genes, the order of the passes in the recipe, and options of passes that are the same for all candidates."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)
    version: int = Field(SCHEMA, alias="schema")
    description: str = ""
    order: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = {}
    genes: tuple[Gene, ...] = Field(min_length=1)

    @property
    def size(self) -> int:
        """How many candidates there are; some of them may be the same recipe."""
        return math.prod(len(gene.choices) for gene in self.genes)

    @property
    def key(self) -> str:
        """Identity of the space: workers of one study must have the same one."""
        return files.key(self.model_dump(mode="json", by_alias=True))


def load(name_or_path: str) -> Space:
    """A space by name, or from a TOML file (a path ending in .toml).

    Raises:
        UsageError: unknown name, unreadable file, or a field with an error: says what, what it got and what is allowed.
    """
    is_file = name_or_path.endswith(".toml")
    path = Path(name_or_path) if is_file else registry.path("spaces", name_or_path)
    return parse(registry.load_toml(path), path.name)


def parse(table: Mapping[str, Any], source: str) -> Space:
    """A checked space from a parsed TOML table.

    Raises:
        UsageError: as `load`.
    """
    try:
        space = Space.model_validate(table)
    except ValidationError as error:
        found = error.errors()  # a field that is written wrong goes before the field that is missing for it
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = [field.alias or name for name, field in (Gene if "genes" in where else Space).model_fields.items()]
            last = str(first["loc"][-1])
            raise UsageError(
                f"{source}: {where}: unknown field{registry.near(last, known)}; allowed: {', '.join(known)}"
            ) from error
        got = first.get("input")
        said = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] in ("value_error", "missing") else f", got {got!r}"
        raise UsageError(f"{source}: {where}{': ' if where else ''}{said}{shown}") from error
    _check(space, source)
    return space


def _check(space: Space, source: str) -> None:
    if space.version != SCHEMA:
        raise UsageError(f"{source}: space schema must be {SCHEMA}, got {space.version}")
    names = [gene.name for gene in space.genes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{source}: two genes are named {name!r}; give each its own name")
    used = tuple(dict.fromkeys(gene.pass_name for gene in space.genes))
    for name in (*space.order, *space.options):
        if name not in used:
            hint = registry.near(name, used)
            raise UsageError(
                f"{source}: {name!r} in order or options is the pass of no gene{hint}; genes are for: {', '.join(used)}"
            )
    for gene in space.genes:  # every choice has to be an option that its pass takes
        for choice in gene.choices:
            if choice != gene.off or gene.off is None:
                value = {"layer": choice} if gene.layers or gene.types else choice
                step = recipe.Step(name=gene.pass_name, options={gene.option: value})
                recipe.check(recipe.Recipe(steps=(step,)), f"{source}: gene {gene.name}")
    for name, options in space.options.items():
        recipe.check(recipe.Recipe(steps=(recipe.Step(name=name, options=options),)), f"{source}: options")


def fitted(space: Space, layers: Layers) -> tuple[Space, dict[str, str]]:
    """The space for one network, and gene -> why it was left out: a gene whose layers the network has not says nothing.

    Raises:
        UsageError: no gene is left.
    """
    left = {
        gene.name: f"no layer of the network matches {', '.join((*gene.layers, *gene.types))}"
        for gene in space.genes
        if (gene.layers or gene.types) and not matching(gene, layers)
    }
    genes = tuple(gene for gene in space.genes if gene.name not in left)
    if not genes:
        raise UsageError(f"the space fits the network nowhere: {'; '.join(f'{k}: {v}' for k, v in left.items())}")
    used = {gene.pass_name for gene in genes}
    order = tuple(name for name in space.order if name in used)
    options = {name: value for name, value in space.options.items() if name in used}
    return space.model_copy(update={"genes": genes, "order": order, "options": options}), left


def matching(gene: Gene, layers: Layers) -> list[str]:
    """The layers that the gene is about."""
    named = [
        name for name in layers
        if not gene.layers or any(fnmatch.fnmatchcase(name, pattern) for pattern in gene.layers)
    ]  # fmt: skip
    return [name for name in named if not gene.types or layers[name] in gene.types]


def values(space: Space, choices: Choices) -> dict[str, Any]:
    """Gene -> its value."""
    return {gene.name: gene.choices[choices[gene.name]] for gene in space.genes}


def to_recipe(space: Space, choices: Choices, layers: Layers) -> recipe.Recipe:
    """The recipe of a candidate: what changes nothing is left out, so that equal recipes are equal candidates."""
    chosen = values(space, choices)
    used = tuple(dict.fromkeys(gene.pass_name for gene in space.genes))
    steps = []
    for name in (*space.order, *(name for name in used if name not in space.order)):
        genes = [gene for gene in space.genes if gene.pass_name == name]
        if any(gene.off is not None and chosen[gene.name] == gene.off for gene in genes if not gene.layers):
            continue
        options: dict[str, Any] = dict(space.options.get(name, {}))
        tables: dict[str, dict[str, Any]] = {}
        for gene in genes:
            value = chosen[gene.name]
            if gene.layers or gene.types:
                table = tables.setdefault(gene.option, {})
                table |= dict.fromkeys(matching(gene, layers), value) if value != gene.off else {}
            else:
                options[gene.option] = value
        if tables and not any(tables.values()):
            continue
        steps.append(recipe.Step(name=name, options=options | tables))
    if all(step.name in RECOVERY for step in steps):
        steps = []
    elif all(step.name in (*RECOVERY, *recipe.PRECISION_PASSES) for step in steps):
        steps = [step for step in steps if step.name in recipe.PRECISION_PASSES]
    return recipe.Recipe(description="", steps=tuple(steps))


def candidate_key(made: recipe.Recipe) -> str:
    """Identity of a candidate within a study."""
    return files.key(recipe.to_toml(made))


def mildest(space: Space) -> dict[str, int]:
    """The first choice of every gene."""
    return {gene.name: 0 for gene in space.genes}


def extremes(space: Space) -> list[dict[str, int]]:
    """The mildest candidate, the strongest, and the strongest without each pass that is only on or off.

    What saves the most need not be fastest (INT8 is slower than float on some targets), hence the last ones; at most
    eight in all.
    """
    strongest = {gene.name: len(gene.choices) - 1 for gene in space.genes}
    switches = [gene for gene in space.genes if gene.switch][:6]
    return [mildest(space), strongest, *({**strongest, gene.name: 1 - strongest[gene.name]} for gene in switches)]


def neighbours(space: Space, choices: Choices) -> list[dict[str, int]]:
    """Candidates that differ in one gene by one place (by any other place where the choices have no order)."""
    found = []
    for gene in space.genes:
        here, count = choices[gene.name], len(gene.choices)
        places: Sequence[int] = (here - 1, here + 1) if gene.ordered else [p for p in range(count) if p != here]
        found += [{**choices, gene.name: place} for place in places if 0 <= place < count]
    return found


def everything(space: Space) -> itertools.product:
    """Every tuple of choices, in the order of the genes."""
    return itertools.product(*(range(len(gene.choices)) for gene in space.genes))
