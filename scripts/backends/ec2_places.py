"""Where machines may be asked for on EC2, best place first: types that would do, in the zones of our subnets. Pure.

places = choose_places(spec, load_catalog(), subnets, offered, spot_prices, scores)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.catalog import Catalog
from recipes.job import LaunchSpec
from scripts.backends.suitable import suitable
from scripts.errors import Problem, ProviderError, Refused

Json = Mapping[str, Any]
Pool = tuple[str, str]
"Instance type and availability zone."
LIKELY_SCORE = 7
"Of 1 to 10, as AWS scores a spot pool: below this it is likely to be refused or interrupted soon."


@dataclass(frozen=True)
class Place:
    """One type in one subnet. usd_per_hour: of one node, on demand from the dated catalog, spot as it is now."""

    offer: str
    instance_type: str
    subnet: str
    zone: str
    usd_per_hour: float


def choose_places(
    spec: LaunchSpec,
    catalog: Catalog,
    subnets: Sequence[Json],
    offered: Collection[Pool],
    spot_usd: Mapping[Pool, float] | None = None,
    scores: Mapping[Pool, int] | None = None,
) -> list[Place]:
    """Places at the quoted price or below. On demand by price, the planned type first; spot pools that are likely to
    last before those that are not, then by price.

    subnets: rows of DescribeSubnets. offered: where the region has which type. spot_usd: None on demand. Raises Refused
    when the region offers nothing that would do, ProviderError when spot is too dear everywhere now.
    """
    zones = {str(row["SubnetId"]): str(row["AvailabilityZone"]) for row in subnets}
    quoted = catalog.offers[spec.offer or ""].usd_per_hour
    found: list[Place] = []
    dear: list[Place] = []
    for name, offer in suitable(spec, catalog):
        for subnet, zone in zones.items():
            pool = (offer.provider_type, zone)
            usd = offer.usd_per_hour if spot_usd is None else spot_usd.get(pool)
            if pool in offered and usd is not None:
                (found if usd <= quoted else dear).append(Place(name, offer.provider_type, subnet, zone, usd))
    if not found and dear:
        cheapest = min(place.usd_per_hour for place in dear)
        said = f"spot costs ${cheapest:.2f} an hour at least, and the quote is ${quoted:.2f}"
        raise ProviderError(Problem("AWS EC2", said, "launch it again later, or on demand"))
    if not found:
        raise Refused(_not_offered(spec, catalog, zones.values(), offered))
    known = scores or {}

    def order(place: Place) -> tuple[bool, float, bool, str, str]:
        unlikely = known.get((place.instance_type, place.zone), 0) < LIKELY_SCORE  # AWS names the best, not all
        return unlikely, place.usd_per_hour, place.offer != spec.offer, place.zone, place.instance_type

    return sorted(found, key=order)


def spot_prices(history: Sequence[Json]) -> dict[Pool, float]:
    """The newest price of each pool in rows of DescribeSpotPriceHistory."""
    newest = sorted(history, key=lambda row: str(row["Timestamp"]))
    return {(str(row["InstanceType"]), str(row["AvailabilityZone"])): float(row["SpotPrice"]) for row in newest}


def _not_offered(spec: LaunchSpec, catalog: Catalog, zones: Collection[str], offered: Collection[Pool]) -> Problem:
    wanted = catalog.offers[spec.offer or ""].provider_type
    here = ", ".join(sorted(set(zones))) or "no zone: LORRY_EC2_SUBNETS names no subnet of this region"
    elsewhere = sorted({zone for name, zone in offered if name == wanted})
    step = f"a subnet in {', '.join(elsewhere)}" if elsewhere else "another region, or another offer (hardware.gpu)"
    return Problem("AWS EC2", f"{wanted} is not offered in {here}", step)
