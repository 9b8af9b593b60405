"""The same command line as `python -m scripts.cli`, where the `lorry` command is not on the path."""

import sys

from scripts.cli import main

sys.exit(main())
