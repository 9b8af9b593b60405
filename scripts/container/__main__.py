"""python -m scripts.container: the command of every rented machine."""

from __future__ import annotations

from scripts.container.run import main

raise SystemExit(main())
