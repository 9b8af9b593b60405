"""Commands about the product itself and the places it runs in."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from recipes.recipe import Recipe
from scripts.cli.command import Command, actor, add_json
from scripts.settings import Settings


def _schema(arguments: argparse.Namespace, settings: Settings) -> int:
    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


def _capacity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("type", metavar="TYPE", help="an EC2 type such as p5.48xlarge")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines in the block (default: 1)")
    parser.add_argument("--hours", type=int, default=24, metavar="H", help="whole days, or weeks (default: 24)")
    parser.add_argument("--buy", metavar="OFFERING", help="buy this offer; you are shown the fee and asked to type it")
    add_json(parser)


def _capacity(arguments: argparse.Namespace, settings: Settings) -> int:
    from scripts.backends.aws import aws_client
    from scripts.capacity import Book, block_of, blocks_text, buy, find_blocks
    from scripts.store import open_store

    client = aws_client("ec2")
    blocks = find_blocks(client, arguments.type, arguments.nodes, arguments.hours)
    if arguments.buy:
        block = block_of(blocks, arguments.buy)
        print(blocks_text([block], time.time()), end="", file=sys.stderr)
        print(f"To buy it, type: {block.words}", file=sys.stderr, flush=True)
        book = Book(open_store(settings.store), actor(os.environ), time.time())
        reservation = buy(client, block, sys.stdin.readline(), book)
        about = {"LORRY_EC2_MARKET": "capacity-block", "LORRY_EC2_RESERVATION": reservation}
        print(json.dumps(about) if arguments.json else "\n".join(f"{k}={v}" for k, v in about.items()))
    elif arguments.json:
        print(json.dumps([block.model_dump() for block in blocks], indent=2))
    else:
        print(blocks_text(blocks, time.time()), end="")
    return 0


COMMANDS = (
    Command(
        "capacity", "show Capacity Blocks of AWS with their fee; buy one by typed words", _capacity_arguments, _capacity
    ),
    Command("schema", "print the JSON Schema of a recipe, for editors and the web app", add_json, _schema),
)
