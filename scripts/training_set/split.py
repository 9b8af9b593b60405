"""Which groups of conversations are held out for validation. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def held_out_groups(groups: Iterable[tuple[int, int]], conversations: int, fraction: float) -> Iterator[int]:
    """The roots to hold out, from (root, size) in shuffled order; the sizes sum to `conversations`.

    Takes whole groups in order while they fit into `fraction` of all conversations, rounded. Where none fits, takes
    the first of the smallest. The train side keeps something: a single group is never held out.
    """
    if fraction <= 0:
        return
    wanted = int(fraction * conversations + 0.5)
    taken = 0
    smallest = (conversations, 0)
    for root, size in groups:
        smallest = min(smallest, (size, root), key=lambda group: group[0])
        if taken + size <= wanted and taken + size < conversations:
            taken += size
            yield root
    if not taken and smallest[0] < conversations:
        yield smallest[1]
