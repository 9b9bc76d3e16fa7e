"""The recipes: a training is described by the nearest one and the numbers that differ."""

import pytest
from msgspec.structs import replace

from utils.recipes import RECIPES, nearest_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_nearest_to_itself(name):
    assert nearest_recipe(RECIPES[name].with_defense()) == (name, {})


@pytest.mark.parametrize(
    ("name", "changed"),
    [("one-cycle", {"epochs": 30, "average": 0.999}), ("robust", {"lr": 0.025, "shift": 2}), ("long", {"lr": 0.1})],
)
def test_the_numbers_that_differ_are_named(name, changed):
    assert nearest_recipe(replace(RECIPES[name].with_defense(), **changed)) == (name, changed)
