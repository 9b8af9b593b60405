"""What of ours costs money at Runpod although nothing runs in it: found, priced by the month, and left alone. Pure.

forgotten(pods, volumes, endpoints, owned={"pod-id"})      # lists as REST v2 answers them
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from recipes.catalog import load_catalog

Json = dict[str, Any]

PREFIX = "lorry"
"Names of all that Terraform and launches make begin with it."
MONTH_HOURS = 730.0
VOLUME_USD_PER_GB = 0.07
"Network volume, standard, by the month; $0.05 beyond the first 1,000 GB. Runpod docs, 2026-08-20."
VOLUME_USD_PER_GB_BEYOND = 0.05
EXITED_DISK_USD_PER_GB = 0.20
"Volume disk of a Pod that is stopped; its container disk is gone."
_OFF = ("EXITED", "ERROR")


@dataclass(frozen=True)
class Forgotten:
    """One thing that a person should look at. usd_per_month: what it costs while it is left."""

    name: str
    reason: str
    usd_per_month: float


def forgotten(
    pods: Iterable[Json], volumes: Iterable[Json], endpoints: Iterable[Json], owned: Container[str]
) -> list[Forgotten]:
    """Exited Pods, Pods that have our name but not our mark, unused volumes and endpoints that never sleep.

    owned: ids of the Pods that are proved to be ours.
    """
    pods, endpoints = list(pods), list(endpoints)
    in_use = {m.get("volumeId") for p in pods for m in (p.get("mounts") or {}).get("network") or ()}
    in_use |= {volume for endpoint in endpoints for volume in endpoint.get("networkVolumes") or ()}
    found = [_pod(pod, owned) for pod in pods if _is_named_ours(pod)]
    found += [_endpoint(e) for e in endpoints if _is_named_ours(e)]
    found += [_volume(v) for v in volumes if _is_named_ours(v) and v.get("id") not in in_use]
    return [one for one in found if one is not None]


def _pod(pod: Json, owned: Container[str]) -> Forgotten | None:
    """Also of a cluster, of which some Pods may be off while others cost."""
    name, status = f"{'cluster' if 'compute' in pod else 'Pod'} {pod.get('name')} ({pod.get('id')})", pod.get("status")
    if status in _OFF and not pod.get("cost"):
        disk_gb = ((pod.get("mounts") or {}).get("persistent") or {}).get("size") or 0
        return Forgotten(name, f"it is {status}; its disk of {disk_gb} GB is kept", disk_gb * EXITED_DISK_USD_PER_GB)
    if status == "TERMINATED" or pod.get("id") in owned:
        return None
    hourly = float(pod.get("cost") or 0.0)
    return Forgotten(name, "its name is ours, but it carries no job and no deadline of ours", hourly * MONTH_HOURS)


def _volume(volume: Json) -> Forgotten:
    size = int(volume.get("size") or 0)
    usd = min(size, 1000) * VOLUME_USD_PER_GB + max(0, size - 1000) * VOLUME_USD_PER_GB_BEYOND
    return Forgotten(f"volume {volume.get('name')} ({volume.get('id')})", f"{size} GB that nothing uses now", usd)


def _endpoint(endpoint: Json) -> Forgotten | None:
    least = int((endpoint.get("workers") or {}).get("min") or 0)
    if not least:
        return None
    pools = (endpoint.get("gpu") or {}).get("pools") or ()
    count = int((endpoint.get("gpu") or {}).get("count") or 1)
    prices = [o.usd_per_hour for o in load_catalog().offers.values() if o.provider_type in pools]
    said = f"workers.min is {least}: that many workers never sleep"
    said += "" if prices or not pools else "; the price of its GPUs is not known"
    usd = max(prices, default=0.0) * count * least * MONTH_HOURS
    return Forgotten(f"endpoint {endpoint.get('name')} ({endpoint.get('id')})", said, usd)


def _is_named_ours(thing: Json) -> bool:
    name = str(thing.get("name") or "")
    return name == PREFIX or name.startswith(f"{PREFIX}-")
