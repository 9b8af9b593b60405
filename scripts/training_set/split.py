"""Which groups of conversations are held out for validation. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def choose_held_out(groups: Sequence[tuple[int, int]], fraction: float) -> list[int]:
    """The roots to hold out, from (root, conversations) in shuffled order.

    Takes whole groups in order while they fit into `fraction` of all conversations, rounded and at least one. Where
    none fits, takes the smallest. The train side keeps at least one group, so a single group is never held out.
    """
    if fraction <= 0 or len(groups) < 2:
        return []
    wanted = max(1, int(fraction * sum(size for _, size in groups) + 0.5))
    chosen: list[int] = []
    taken = 0
    for root, size in groups:
        if taken + size <= wanted and len(chosen) < len(groups) - 1:
            chosen.append(root)
            taken += size
    return chosen or [min(groups, key=lambda group: group[1])[0]]
