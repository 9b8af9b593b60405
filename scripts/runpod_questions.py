"""What the documents of Runpod leave open and one Pod can answer. Pure but for `prices` and the knock at v1.

answers(seen, settlement)[0].asked, answers(seen, settlement)[0].seen
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from scripts.backends.runpod_api import RunpodApi
from scripts.cost import Settlement
from scripts.surprises import Surprise

V1 = "https://rest.runpod.io/v1/pods"
_PRICED = ("RTX PRO 6000", "L40S", "H200")


@dataclass
class Seen:
    """What one run saw. prices: (USD an hour Secure, Community) by GPU id; 0 where it is not offered."""

    is_real: bool
    prices: Mapping[str, tuple[float, float]]
    has_pages: bool
    gpu: str = ""
    pod_usd_per_hour: float = 0.0
    created_at: float = 0.0
    began_at: float | None = None
    ended_itself_after: float | None = None
    last_words: list[str] = field(default_factory=list)


def prices(api: RunpodApi) -> dict[str, tuple[float, float]]:
    """USD an hour by GPU id: Secure and Community, as the catalog has them now."""
    rows = {str(row["id"]): row.get("price") or {} for row in api.gpus()}
    return {gpu: (float(row.get("secure") or 0), float(row.get("community") or 0)) for gpu, row in rows.items()}


def answers(seen: Seen, settlement: Settlement | None) -> list[Surprise]:
    """The open questions that this run could answer."""
    found = [
        Surprise("May a Pod end itself with the key it is given?", _self_end(seen)),
        Surprise("Is the list of Pods cut into pages?", "yes" if seen.has_pages else "no pagination in the answer"),
        Surprise("Does a Pod cost what the catalog says?", _price(seen)),
        Surprise("What do GPUs cost whose price was not known?", _prices(seen)),
    ]
    if seen.began_at is not None:
        text = f"{seen.began_at - seen.created_at:.0f} s from the create to the first word of the container"
        found.append(Surprise("How long does a Pod take to start?", text))
    if settlement is not None:
        found.append(Surprise("When does the bill name a Pod, and what does it say?", _bill(settlement)))
    if seen.is_real:
        found.append(Surprise("Is REST v1 switched off?", _knock(V1)))
    return found


def _self_end(seen: Seen) -> str:
    if seen.ended_itself_after is not None:
        return f"yes: it was gone {seen.ended_itself_after:.0f} s after its job"
    said = [line for line in seen.last_words if "could not end itself" in line]
    return "no: it had to be ended from outside" + (f"; it said: {said[-1]}" if said else "")


def _price(seen: Seen) -> str:
    shown = seen.prices.get(seen.gpu, (0.0, 0.0))[0]
    return f"{seen.gpu}: ${shown:.2f} an hour in the catalog, ${seen.pod_usd_per_hour:.2f} on the Pod"


def _prices(seen: Seen) -> str:
    told = [
        f"{gpu} Secure ${secure:.2f}, Community ${community:.2f}"
        for gpu, (secure, community) in sorted(seen.prices.items())
        if any(name in gpu for name in _PRICED)
    ]
    return "; ".join(told) or "none of them is in the catalog"


def _bill(settlement: Settlement) -> str:
    minutes = (settlement.settled_at - settlement.ended_at) / 60
    if settlement.source != "bill":
        return f"not yet {minutes:.0f} min after the end; hours x price is ${settlement.usd:.4f}"
    return f"within {minutes:.0f} min of the end: ${settlement.usd:.4f}, quoted at most ${settlement.quote_usd:.2f}"


def _knock(url: str) -> str:
    """The status of a request without a key: 401 from a door that is there, 410 from one that is gone."""
    try:
        return f"without a key it answers {httpx.get(url, timeout=10.0).status_code}"
    except httpx.HTTPError as error:
        return f"no answer: {type(error).__name__}"
