"""Commands about the product itself and the places it runs in."""

from __future__ import annotations

import argparse
import json

from recipes.recipe import Recipe
from scripts.cli.command import Command, add_json
from scripts.settings import Settings


def _schema(arguments: argparse.Namespace, settings: Settings) -> int:
    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


COMMANDS = (Command("schema", "print the JSON Schema of a recipe, for editors and the web app", add_json, _schema),)
