"""The tables of infra's READMEs, made from the Terraform files.

UPDATE_README=1 python -m pytest tests/infra/test_readmes.py   # writes them
"""

from __future__ import annotations

import re
from pathlib import Path

_BLOCK = re.compile(r'^(variable|output) "(\w+)" {\n(.*?)^}', re.DOTALL | re.MULTILINE)


def described(file: Path) -> dict[str, dict[str, str]]:
    """Name -> description, and default ("required" without one) for variables, in the order of the file."""
    found = {}
    for _, name, body in _BLOCK.findall(file.read_text()):
        description = re.search(r'^  description = "(.*)"$', body, re.MULTILINE)
        default = re.search(r"^  default +=(.*)$", body, re.MULTILINE)
        found[name] = {
            "description": description.group(1) if description else "",
            "default": f"`{default.group(1).strip()}`" if default else "required",
        }
    return found


def inputs_table(folder: Path) -> str:
    rows = described(folder / "variables.tf").items()
    lines = [f"| `{name}` | {row['description']} | {row['default']} |" for name, row in rows]
    return "\n".join(["| name | what | default |", "|---|---|---|", *lines])


def outputs_table(folder: Path) -> str:
    rows = described(folder / "outputs.tf").items()
    return "\n".join(["| name | what |", "|---|---|", *(f"| `{name}` | {row['description']} |" for name, row in rows)])


def with_section(text: str, heading: str, body: str) -> str:
    """The text with everything between this heading and the next one replaced."""
    pattern = re.compile(rf"(^{re.escape(heading)}\n).*?(?=^#|\Z)", re.DOTALL | re.MULTILINE)
    if not pattern.search(text):
        raise ValueError(f"no heading {heading!r}")
    return pattern.sub(lambda m: f"{m.group(1)}\n{body}\n\n", text).rstrip("\n") + "\n"


def examples(text: str) -> list[str]:
    """The HCL blocks of a README, in order."""
    return re.findall(r"^```hcl\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
