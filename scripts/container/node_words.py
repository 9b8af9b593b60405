"""How a node that follows tells node 0 why it failed: otherwise node 0 would only see that nobody comes, or goes.

say(store, "job-1", NodeFailure(node=1, ...)); NodeWords(store, "job-1", node, 5.0, on_taken).failure(attempt=2)
"""

from __future__ import annotations

import time
from collections.abc import Callable

from recipes.job import NodeFailure
from scripts.container.nodes import Node
from scripts.container.verdict import Death
from scripts.errors import LorryError
from scripts.store import Store

LATE_CONTACTS = 3
"So many contacts may pass between the death that node 0 sees and the word of the node that caused it."
_SYMPTOMS = ("lost_rank", "no_progress", "unexpected")
"What node 0 calls the death of its own trainer when the fault was another node's."


def say(store: Store, job_id: str, failure: NodeFailure) -> None:
    """Writes the word of a node; a store that is silent does not hear it."""
    try:
        store.write(f"{job_id}/nodes/{failure.node}.json", failure.model_dump_json(indent=2).encode() + b"\n")
    except LorryError:
        return


class NodeWords:
    """What node 0 hears of the others. Words from before its own start are of machines that are gone.

    on_taken: called when the provider takes one of them back, since node 0 cannot go on alone.
    """

    def __init__(
        self, store: Store, job_id: str, node: Node, contact_seconds: float, on_taken: Callable[[], None]
    ) -> None:
        self._store, self._job_id, self._seconds, self._on_taken = store, job_id, contact_seconds, on_taken
        self._others = range(1, node.count)
        self._since, self._looked_at = time.time(), float("-inf")
        self._said: list[NodeFailure] = []

    def failure(self, attempt: int) -> NodeFailure | None:
        """The first node that failed in this attempt, or before it could join it."""
        if self._others and time.monotonic() - self._looked_at > self._seconds:
            self._looked_at = time.monotonic()
            self._said = self._heard()
            if self.has_taken:
                self._on_taken()
        return next((word for word in self._said if word.attempt in (0, attempt)), None)

    @property
    def has_taken(self) -> bool:
        """Whether the provider takes one of them back, as far as was heard."""
        return any(word.is_taken for word in self._said)

    def death(self, attempt: int, mine: Death, *, may_come: bool) -> Death:
        """What an attempt died of: the fault that another node names, where ours is only what follows from one.

        may_come: its word may be on its way still.
        """
        if not self._others or mine.cause not in _SYMPTOMS or "signal" in mine.detail:
            return mine
        give_up = time.monotonic() + (LATE_CONTACTS * self._seconds if may_come else 0.0)
        while (word := self.failure(attempt)) is None and time.monotonic() < give_up:
            time.sleep(min(1.0, self._seconds))
        return Death(word.cause, f"node {word.node}: {word.sentence}".removesuffix(": ")) if word else mine

    def _heard(self) -> list[NodeFailure]:
        try:
            said = [self._store.read(f"{self._job_id}/nodes/{node}.json") for node in self._others]
            words = [NodeFailure.model_validate_json(data) for data in said if data is not None]
        except (LorryError, ValueError):  # a word that cannot be read is none
            return self._said
        return [word for word in words if word.at >= self._since]
