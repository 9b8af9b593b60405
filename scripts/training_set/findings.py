"""What is found while a training set is read: problems that refuse it, rows that are left out, things worth a note."""

from __future__ import annotations

from recipes.errors import InputError, Problem
from recipes.preparation import Skipped
from scripts.training_set.rows import RawRow

KEPT = 20  # problems shown, and line numbers kept per reason


class Unusable(ValueError):
    """This row refuses the set. `path` names the key inside the row; `line` counts from the row's first line."""

    def __init__(self, got: str, want: str, path: str = "", *, line: int = 1, column: int | None = None) -> None:
        super().__init__(got)
        self.got, self.want, self.path, self.line, self.column = got, want, path, line, column


class Findings:
    """Collects problems (the first 20 and a count), rows left out by reason, and tallies for notes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problem_count = 0
        self._problems: list[tuple[int, Problem]] = []
        self._skipped: dict[str, tuple[int, list[int]]] = {}
        self._notes: dict[str, tuple[int, list[int]]] = {}

    def refuse(self, raw: RawRow, error: Unusable) -> None:
        """Records one problem of a row."""
        path = ".".join(part for part in (raw.label, error.path) if part)
        self._add(raw.line, path, error)

    def refuse_line(self, line: int, error: Unusable) -> None:
        """Records one problem of what begins on `line`."""
        self._add(line, error.path, error)

    def skip(self, reason: str, line: int) -> None:
        """Records a row or an example that is left out."""
        _count(self._skipped, reason, line)

    def note(self, kind: str, line: int) -> None:
        """Counts something a person should know about."""
        _count(self._notes, kind, line)

    def noted(self, kind: str) -> tuple[int, list[int]]:
        """How often `kind` was noted, and on which lines (the first 20)."""
        return self._notes.get(kind, (0, []))

    def skipped(self) -> tuple[Skipped, ...]:
        """Every reason with its count and first lines, most frequent first."""
        ordered = sorted(self._skipped.items(), key=lambda item: (-item[1][0], item[0]))
        return tuple(Skipped(reason=r, count=n, lines=tuple(lines)) for r, (n, lines) in ordered)

    def as_error(self) -> InputError:
        """Every problem found so far, in the order of the lines."""
        shown = [problem for _, problem in sorted(self._problems, key=lambda item: item[0])]
        more = self.problem_count - len(shown)
        if more:
            shown.append(Problem(self.name, f"{more} more problems", "correct these first"))
        return InputError(*shown)

    def _add(self, line: int, path: str, error: Unusable) -> None:
        self.problem_count += 1
        if len(self._problems) >= KEPT:
            return
        at = line + error.line - 1
        place = f"{self.name}:{at}" + (f":{error.column}" if error.column else "")
        self._problems.append((at, Problem(f"{place}: {path}" if path else place, error.got, error.want)))


def _count(table: dict[str, tuple[int, list[int]]], key: str, line: int) -> None:
    count, lines = table.get(key, (0, []))
    table[key] = (count + 1, lines if len(lines) >= KEPT else [*lines, line])
