"""Recipes: what to do to a model, in a YAML file or in Python."""

from slimdown.recipe.document import write_document as write_document
from slimdown.recipe.entries import iterate as iterate
from slimdown.recipe.reading import complete as complete
from slimdown.recipe.reading import dump_recipe as dump_recipe
from slimdown.recipe.reading import load_recipe as load_recipe
from slimdown.recipe.reading import make_recipe as make_recipe
from slimdown.recipe.spec import STAGES as STAGES
from slimdown.recipe.spec import Recipe as Recipe
from slimdown.recipe.spec import recipe_schema as recipe_schema
from slimdown.recipe.spec import recipe_to_json as recipe_to_json
