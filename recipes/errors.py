"""The base of every error a user may meet: a list of problems, a code for machines, an exit code for shells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    where: a file, line, path inside a file, or flag. got: what was found. want: what would be right.
    """

    where: str
    got: str
    want: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.got}" + (f"; {self.want}" if self.want else "")


class LorryError(Exception):
    """Something a user can act on. Never shown with a traceback.

    `code` is stable for machines, `exit_code` for shells; `problems` holds every fault found, not only the first.
    """

    code = "error"
    exit_code = 1

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = [p if isinstance(p, Problem) else Problem("lorry", p) for p in problems]
        super().__init__("\n".join(str(p) for p in self.problems))

    def as_json(self) -> dict[str, object]:
        """The same error for HTTP and `--json`: {"error": sentence, "code": code, "problems": [{where, got, want}]}."""
        return {"error": str(self), "code": self.code, "problems": [vars(p) for p in self.problems]}


class InputError(LorryError):
    """What the user wrote or sent cannot be used: a recipe, a training set, a flag."""

    code = "bad_input"
    exit_code = 2
