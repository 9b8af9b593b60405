"""Runs `lorry gateway` from its own room: python open_gateway.py --port N"""

import argparse
import os
import sys
from pathlib import Path

from scripts.cli.front_door import COMMANDS
from scripts.settings import read_settings

parser = argparse.ArgumentParser()
COMMANDS[0].arguments(parser)
sys.exit(COMMANDS[0].run(parser.parse_args(), read_settings(os.environ, Path.cwd())))
