"""Recipes: checked before anything heavy is imported, and the same after a round trip through TOML."""

import ast
from pathlib import Path

import pytest

from edgegen import recipe, registry
from edgegen.errors import RecipeError
from edgegen.recipe import Recipe, Step

FOLDER = Path(__file__).parents[1] / "benchmarks" / "recipes"


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


@pytest.mark.parametrize(
    ("name", "option", "allowed", "got"),
    [
        ("prune_channels", "heads = 'no'", "true or false", "'no'"),
        ("factorize_cp", "stable = 0", "true or false", "0"),
        ("distill", "steps = 10.5", "a whole number", "10.5"),
        ("distill", "steps = true", "a whole number", "True"),
        ("distill", "lr = '1e-3'", "a number", "'1e-3'"),
        ("prune_channels", "round_to = '8'", "a whole number", "'8'"),
        ("distill", "crop = '64'", "a whole number", "'64'"),
        ("slim_to_latency", "max_latency = '5ms'", "a number", "'5ms'"),
        ("prune_channels", "ratios = 0.5", "a table of numbers", "0.5"),
        ("prune_channels", "ratios = { a = 'b' }", "a table of numbers", "{'a': 'b'}"),
        ("distill", "losses = 3", "a list of texts or a table of numbers", "3"),
        ("prune_channels", "layers = 'conv1'", "a list of texts", "'conv1'"),
        ("prune_channels", "importance = 2", "a text", "2"),
        ("replace_attention", "blocks = 4", "a text or a list of texts", "4"),
        ("share_weights", "groups = ['a']", "a list of lists of texts", "['a']"),
        ("tune_sampler", "rhos = [1, 'b']", "a list of numbers", "[1, 'b']"),
    ],
)
def test_a_value_of_another_kind_is_one_line(name, option, allowed, got, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(f"schema = 1\n[[steps]]\npass = '{name}'\noptions = {{ {option} }}")
    with pytest.raises(RecipeError) as caught:
        recipe.load(str(file))
    assert str(caught.value) == f"{file}: pass {name}: {option.split(' =')[0]} must be {allowed}, got {got}"


@pytest.mark.parametrize("name", registry.names("passes"))
def test_the_default_of_every_option_is_of_its_own_kind(name):
    for argument, default in recipe._parameters(name):
        recipe._told(argument.annotation)  # a kind without words would be a KeyError
        try:
            value = ast.literal_eval(default)
        except ValueError:
            continue
        assert recipe._fits(value, argument.annotation), argument.arg


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_the_recipes_of_the_benchmarks_read(file):
    assert recipe.load(str(file)).steps


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


def test_a_teacher_of_its_own_is_for_passes_that_learn_from_one(tmp_path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("schema = 1\n[[steps]]\npass = 'distill'\nteacher = 'timm:resnet50'\nteacher_weights = 'w.pth'\n")
    loaded = recipe.load(str(file))
    assert (loaded.steps[0].teacher, loaded.steps[0].teacher_weights) == ("timm:resnet50", "w.pth")
    assert loaded.steps[0].told == {"teacher": "timm:resnet50", "teacher_weights": "w.pth"}
    file.write_text(recipe.to_toml(loaded))
    assert recipe.load(str(file)) == loaded
    for text, told in (("pass = 'prune_blocks'\nteacher = 'edsr'", "prune_blocks takes no teacher of its own"),
                       ("pass = 'distill'\nteacher_weights = 'w.pth'", "says no network; give teacher too")):
        file.write_text(f"schema = 1\n[[steps]]\n{text}\n")
        with pytest.raises(RecipeError, match=told):
            recipe.load(str(file))
