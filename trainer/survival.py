"""How much of an adapter's change is still there after the merged weights were rounded, per target group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from recipes.catalog import Family
from recipes.job import Record
from recipes.merged import Survival


class Sums(Record):
    """Of one group: weights, |D|^2, <D', D> and |D' - D|^2 of the meant delta D and the delta D' that arrived."""

    weights: int = 0
    meant: float = 0.0
    arrived: float = 0.0
    wrong: float = 0.0


def added(sums: Sums, delta: Tensor, merged: Tensor, base: Tensor) -> Sums:
    """With one more matrix; merged and base in the target precision, so that the base's own rounding does not count."""
    meant, arrived = delta.double(), merged.double() - base.double()
    return Sums(
        weights=sums.weights + delta.numel(),
        meant=sums.meant + float(meant.square().sum()),
        arrived=sums.arrived + float((arrived * meant).sum()),
        wrong=sums.wrong + float((arrived - meant).square().sum()),
    )


def survival(per_file: Iterable[Mapping[str, Sums]]) -> tuple[Survival, ...]:
    """One row per group, over all files."""
    files, rows = list(per_file), []
    for group in sorted({group for sums in files for group in sums}):
        mine = [sums[group] for sums in files if group in sums]
        meant = sum(s.meant for s in mine)
        rows.append(
            Survival(
                group=group,
                weights=sum(s.weights for s in mine),
                share=sum(s.arrived for s in mine) / meant if meant else 1.0,
                relative_error=(sum(s.wrong for s in mine) / meant) ** 0.5 if meant else 0.0,
            )
        )
    return tuple(rows)


def group_of(name: str, family: Family) -> str:
    """The target group that a tensor of the model belongs to, in either layout of the experts."""
    if ".experts." in name:
        return "experts"
    layer = name.removesuffix(".weight")
    for group, members in family.groups.items():
        suffixes = (*members.linears, *(p.removesuffix(".weight") for p in members.parameters))
        if any(layer.endswith(f".{suffix}") for suffix in suffixes):
            return group
    return "other"
