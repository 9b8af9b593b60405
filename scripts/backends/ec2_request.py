"""The request for the machines of a job on EC2, and the launch file each of them reads. Pure, and without a secret.

request = ec2_request(spec, read_ec2_settings(os.environ)); body = placed(request, spec, place, deadline, token)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from scripts.backends.base import long_store, machine_name
from scripts.backends.ec2_places import Place
from scripts.errors import InputError, Problem, Refused
from scripts.job_token import KEYS_SECONDS, client_of, door_variables

Json = dict[str, Any]
Market = Literal["on-demand", "spot", "reservation", "capacity-block"]
_TAG_CHARACTERS = 256
_ROOM = "run `lorry env` on the applied AWS room, such as infra/live/prod/aws, and set what it says"


@dataclass(frozen=True)
class Ec2Settings:
    """What the AWS room says about itself, and how a person wants to rent."""

    template: str = ""
    role_id: str = ""
    "First half of the name of a machine's launch folder."
    subnets: tuple[str, ...] = ()
    group: str = ""
    "Security group of the machines."
    market: Market = "on-demand"
    reservation: str = ""
    placement_group: str = ""
    max_hours: float = 0.0
    "After this the template's machines end themselves; 0 when it was not said."
    trainer_role: str = ""
    session_policy: str = ""
    front_door: str = ""
    token_secret: str = field(default="", repr=False)


def read_ec2_settings(environment: Mapping[str, str]) -> Ec2Settings:
    """Settings from LORRY_EC2_TEMPLATE, _ROLE_ID, _SUBNETS, _GROUP, _MARKET, _RESERVATION, _PLACEMENT_GROUP and
    _MAX_HOURS, LORRY_TRAINER_ROLE, LORRY_SESSION_POLICY, LORRY_PUBLIC_URL, LORRY_TOKEN_SECRET. Raises InputError."""
    reservation = environment.get("LORRY_EC2_RESERVATION", "")
    market = environment.get("LORRY_EC2_MARKET") or ("reservation" if reservation else "on-demand")
    hours, problems = environment.get("LORRY_EC2_MAX_HOURS") or "0", []
    if market not in get_args(Market):
        problems.append(Problem("LORRY_EC2_MARKET", repr(market[:40]), "one of " + ", ".join(get_args(Market))))
    if (market in ("reservation", "capacity-block")) != bool(reservation):
        got = f"{market} with reservation {reservation or 'none'}"
        problems.append(Problem("LORRY_EC2_RESERVATION", got, "its id (cr-...), for these two markets and no other"))
    if not hours.replace(".", "", 1).isdecimal():
        problems.append(Problem("LORRY_EC2_MAX_HOURS", repr(hours[:40]), "hours, such as 24"))
    problems += _policy_problems(environment.get("LORRY_SESSION_POLICY", ""))
    if problems:
        raise InputError(*problems)
    return Ec2Settings(
        template=environment.get("LORRY_EC2_TEMPLATE", ""),
        role_id=environment.get("LORRY_EC2_ROLE_ID", ""),
        subnets=tuple(environment.get("LORRY_EC2_SUBNETS", "").replace(",", " ").split()),
        group=environment.get("LORRY_EC2_GROUP", ""),
        market=market,  # type: ignore[arg-type]
        reservation=reservation,
        placement_group=environment.get("LORRY_EC2_PLACEMENT_GROUP", ""),
        max_hours=float(hours),
        trainer_role=environment.get("LORRY_TRAINER_ROLE", ""),
        session_policy=environment.get("LORRY_SESSION_POLICY", ""),
        front_door=environment.get("LORRY_PUBLIC_URL", "").rstrip("/"),
        token_secret=environment.get("LORRY_TOKEN_SECRET", ""),
    )


def _policy_problems(text: str) -> list[Problem]:
    try:
        sound = not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        sound = False
    want = "the JSON of trainer_session_policy: `lorry env` prints it"
    return [] if sound else [Problem("LORRY_SESSION_POLICY", repr(text[:40]), want)]


def ec2_request(spec: LaunchSpec, settings: Ec2Settings) -> Json:
    """The arguments of RunInstances without what only the moment of asking knows: place, deadline and client token.

    Image and user data stand in the launch template. Raises Refused with every reason why the job cannot run there.
    """
    problems = _problems(spec, settings)
    if problems:
        raise Refused(*problems)
    body: Json = {
        "LaunchTemplate": {"LaunchTemplateId": settings.template, "Version": "$Default"},
        "InstanceType": load_catalog().offers[spec.offer or ""].provider_type,
        "MinCount": spec.nodes,
        "MaxCount": spec.nodes,  # all of them or none
        "InstanceInitiatedShutdownBehavior": "terminate",
    }
    if settings.reservation:
        target = {"CapacityReservationTarget": {"CapacityReservationId": settings.reservation}}
        body["CapacityReservationSpecification"] = target
    if settings.market == "capacity-block":
        body["InstanceMarketOptions"] = {"MarketType": "capacity-block"}
    if settings.market == "spot":
        once = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        body["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": once}
    if spec.nodes > 1 and settings.market != "capacity-block":  # a block places its machines itself
        body["Placement"] = {"GroupName": settings.placement_group}
    return body


def placed(
    request: Mapping[str, Any], spec: LaunchSpec, settings: Ec2Settings, place: Place, deadline: int, token: str
) -> Json:
    """The request for one place. deadline: unix seconds after which anybody may end the machines; token: makes the
    same request twice give the same machines."""
    tags = {
        "Name": machine_name(spec.job_id),
        "lorry_job": spec.job_id,
        "lorry_store": spec.store,
        "lorry_usd_per_hour": f"{place.usd_per_hour:.6f}",
        "expires_at": datetime.fromtimestamp(deadline, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    listed = [{"Key": key, "Value": value} for key, value in tags.items()]
    body: Json = {
        **request,
        "InstanceType": place.instance_type,
        "NetworkInterfaces": _interfaces(spec, settings, place),
        "TagSpecifications": [{"ResourceType": kind, "Tags": listed} for kind in ("instance", "volume")],
        "ClientToken": token,
    }
    if settings.market == "spot":
        most = load_catalog().offers[spec.offer or ""].usd_per_hour
        options = {**request["InstanceMarketOptions"]["SpotOptions"], "MaxPrice": f"{most:.4f}"}
        body["InstanceMarketOptions"] = {**request["InstanceMarketOptions"], "SpotOptions": options}
    return body


def launch_file(
    spec: LaunchSpec, settings: Ec2Settings, deadline: int, keys: Mapping[str, str], node: int, addresses: Sequence[str]
) -> str:
    """launch.env of one node: NAME=value lines. keys: of the store, from `key_variables`. addresses: of all nodes."""
    variables = {
        "LORRY_STORE": spec.store,
        "LORRY_JOB": spec.job_id,
        "LORRY_DEADLINE": str(deadline),
        "LORRY_MACHINE": "ec2",
        "LORRY_MODELS": "/scratch/models",
        "LORRY_MODELS_FROM": "/".join(spec.store.split("/")[:3]) + "/models",
        "LORRY_FRONT_DOOR": settings.front_door,
        **keys,
    }
    if len(addresses) > 1:
        variables |= {"NODES": str(len(addresses)), "NODE_RANK": str(node), "MASTER_ADDR": addresses[0]}
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def key_variables(
    settings: Ec2Settings, job_id: str, token: str, session: Mapping[str, Any] | None, region: str
) -> dict[str, str]:
    """How a machine comes by keys of the store: from the front door with its token, else the session as it is."""
    if token:
        return {"AWS_DEFAULT_REGION": region, **door_variables(settings.front_door, job_id, token)}
    assert session is not None
    return {
        "AWS_DEFAULT_REGION": region,
        "AWS_ACCESS_KEY_ID": session["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": session["SecretAccessKey"],
        "AWS_SESSION_TOKEN": session["SessionToken"],
    }


def has_door(spec: LaunchSpec, settings: Ec2Settings) -> bool:
    """Whether the front door renews the keys of this job's machine."""
    return bool(settings.front_door and settings.token_secret and client_of(spec.store))


def _interfaces(spec: LaunchSpec, settings: Ec2Settings, place: Place) -> list[Json]:
    """Card 0 carries ordinary traffic; between nodes each card carries EFA too, card 0 as its second device."""
    common = {"SubnetId": place.subnet, "Groups": [settings.group], "DeleteOnTermination": True}
    cards = load_catalog().offers[place.offer].efa_cards if spec.nodes > 1 else 0
    efa = [
        {"DeviceIndex": 0 if card else 1, "NetworkCardIndex": card, "InterfaceType": "efa-only", **common}
        for card in range(cards)
    ]
    return [{"DeviceIndex": 0, "NetworkCardIndex": 0, **common}, *efa]


def _problems(spec: LaunchSpec, settings: Ec2Settings) -> list[Problem]:
    offer, found = load_catalog().offers.get(spec.offer or ""), long_store(spec.store, _TAG_CHARACTERS)
    if offer is None or offer.backend != "ec2":
        found.append(Problem("offer", f"{spec.offer} is no offer of ec2", "plan the recipe for ec2"))
    wanted = {"LORRY_EC2_TEMPLATE": settings.template, "LORRY_EC2_ROLE_ID": settings.role_id}
    wanted |= {"LORRY_EC2_SUBNETS": settings.subnets, "LORRY_EC2_GROUP": settings.group}  # type: ignore[dict-item]
    found += [Problem(name, "not set", _ROOM) for name, value in wanted.items() if not value]
    if spec.nodes > 1 and settings.market != "capacity-block" and not settings.placement_group:
        want = "the room with ec2.cluster = { placement_group = true }, so that the nodes stand close together"
        found.append(Problem("LORRY_EC2_PLACEMENT_GROUP", f"not set, and hardware.nodes is {spec.nodes}", want))
    if settings.max_hours and spec.deadline_seconds > settings.max_hours * 3600:
        got = f"{spec.deadline_seconds / 3600:.1f} h, and the template ends its machines after {settings.max_hours:g}"
        found.append(Problem("deadline", got, "a larger ec2.max_hours in the AWS room, or limits.max_hours within it"))
    return found + _key_problems(spec, settings)


def _key_problems(spec: LaunchSpec, settings: Ec2Settings) -> list[Problem]:
    if has_door(spec, settings):
        return []
    if not settings.trainer_role or not settings.session_policy:
        want = f"LORRY_PUBLIC_URL and LORRY_TOKEN_SECRET, or LORRY_TRAINER_ROLE and LORRY_SESSION_POLICY: {_ROOM}"
        return [Problem("store", f"a machine would have no key for {spec.store}", want)]
    if spec.deadline_seconds > KEYS_SECONDS:
        want = "the front door, which renews them (LORRY_PUBLIC_URL, LORRY_TOKEN_SECRET), or limits.max_hours: 12"
        got = f"{spec.deadline_seconds / 3600:.1f} h, and keys without a front door last 12"
        return [Problem("deadline", got, want)]
    return []
