"""Recipes: checked before anything heavy is imported, and the same after a round trip through TOML."""

import pytest

from edgegen import recipe, registry
from edgegen.errors import RecipeError
from edgegen.recipe import Recipe, Step


@pytest.mark.parametrize("name", registry.names("recipes"))
def test_every_preset_loads_and_survives_a_round_trip(name, tmp_path):
    loaded = recipe.load(name)
    file = tmp_path / "again.toml"
    file.write_text(recipe.to_toml(loaded))
    assert recipe.load(str(file)) == loaded


def test_options_of_every_kind_survive_a_round_trip(tmp_path):
    options = {"ratio": 0.25, "importance": 'l"1', "skip": ["a.b", "c"], "losses": {"output": 1.0, "reference": 0.5}}
    steps = (Step(name="prune_channels", options={k: options[k] for k in ("ratio", "importance", "skip")}, keep=True),)
    file = tmp_path / "r.toml"
    file.write_text(recipe.to_toml(Recipe(description="two\nlines", steps=steps)))
    assert recipe.load(str(file)).steps == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema = 1\n[[steps]]\npass = 'prune_chanels'", "did you mean 'prune_channels'"),
        ("schema = 1\n[[steps]]\npass = 'prune_channels'\noptions = { ration = 0.5 }", "did you mean 'ratio'"),
        ("schema = 9\n", "schema must be 1, got 9"),
        ("schema = 1\n[[steps]]\npas = 'distill'", "steps.0"),
        ("schema = 1\nspeed = 3", "speed"),
        ("schema = ", "not a readable TOML file"),
    ],
    ids=["unknown pass", "unknown option", "other schema", "misspelt key", "unknown key", "not TOML"],
)
def test_an_error_in_a_recipe_is_one_line_that_names_the_place(text, message, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.load(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_gets_the_near_match():
    with pytest.raises(RecipeError, match="did you mean 'balanced'"):
        recipe.load("balancd")


def test_keep_takes_only_passes_of_the_recipe():
    balanced = recipe.load("balanced")
    assert [s.keep for s in recipe.with_kept(balanced, ("quantize",)).steps] == [False, False, True]
    with pytest.raises(RecipeError, match="did you mean 'quantize'"):
        recipe.with_kept(balanced, ("quantise",))


def test_steps_are_judged_up_to_the_next_distillation_and_precision_passes_apart():
    names = ("prune_channels", "distill", "quantize", "prune_channels", "prune_channels", "distill", "prune_channels")
    groups = recipe.groups(Recipe(steps=tuple(Step(name=n) for n in names)))
    assert [[s.name for s in g] for g in groups] == [
        ["prune_channels", "distill"],
        ["prune_channels", "prune_channels", "distill"],
        ["prune_channels"],
    ]


def test_several_rounds_of_distillation_are_judged_together() -> None:
    names = ("prune_blocks", "reconstruct", "distill", "distill", "prune_channels", "distill")
    groups = recipe.groups(Recipe(steps=tuple(Step(name=n) for n in names)))
    assert [[s.name for s in g] for g in groups] == [
        ["prune_blocks", "reconstruct", "distill", "distill"], ["prune_channels", "distill"],
    ]  # fmt: skip
