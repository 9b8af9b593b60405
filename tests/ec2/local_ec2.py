"""A small EC2, S3 and STS behind real boto3 clients: botocore checks every request, then the answer comes from here.

account = Account(clock); backend = Ec2Backend(SETTINGS, now=clock.now, sleep=..., client=account.client)

It knows what moto does not: client tokens, want of capacity by zone, spot notices, the hour after which ended machines
are forgotten, the time between a create and its first listing, and what every machine did cost.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import boto3
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.exceptions import ReadTimeoutError

from scripts.fake_runpod.clock import Clock

Json = dict[str, Any]
BOOT_SECONDS, END_SECONDS, FORGET_SECONDS = 30.0, 20.0, 3600.0
PRICES = {"p5.48xlarge": 55.04, "p5.4xlarge": 6.88, "p5en.48xlarge": 63.296, "g6e.12xlarge": 10.49264}
BOTH = ("us-east-1a", "us-east-1b")
ZONES = {"subnet-a": ("us-east-1a", "use1-az1"), "subnet-b": ("us-east-1b", "use1-az2")}


@dataclass
class Machine:
    """One instance. ended_at: when its charges end."""

    row: Json
    created_at: float
    usd_per_hour: float
    ended_at: float | None = None
    noticed_at: float | None = None

    def usd(self, now: float) -> float:
        return ((self.ended_at or now) - self.created_at) / 3600 * self.usd_per_hour


@dataclass
class Fault:
    """The next `times` calls of this action fail. carried_out: they are done all the same; code "" is no answer."""

    action: str
    code: str
    times: int = 1
    carried_out: bool = False


@dataclass
class Account:
    """Everything one account has in one region. on_start: told of each new machine."""

    clock: Clock
    faults: list[Fault] = field(default_factory=list)
    no_capacity: set[tuple[str, str]] = field(default_factory=set)
    "(type, zone) that are full."
    spot_usd: dict[tuple[str, str], float] = field(default_factory=dict)
    scores: dict[str, int] = field(default_factory=dict)
    "By zone id."
    hidden_seconds: float = 0.0
    late_seconds: float = 0.0
    "By which each further node of a request is listed after the one before."
    on_start: Callable[[Machine], None] | None = None
    machines: dict[str, Machine] = field(default_factory=dict)
    tokens: dict[str, list[str]] = field(default_factory=dict)
    volumes: list[Json] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, Json]] = field(default_factory=list)
    offered: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: dict.fromkeys(PRICES, ("us-east-1a", "us-east-1b"))
    )

    def client(self, service: str) -> Any:
        """A boto3 client that never leaves this process; there is one of each service, for the account asked last."""
        _Wire.account = self
        return client_of_service(service)

    def __post_init__(self) -> None:
        self._numbers = random.Random(0)

    def answer(self, action: str, given: Json) -> tuple[AWSResponse, Json]:
        """The answer to one request that botocore found sound."""
        self.log.append((action, copy.deepcopy(given)))
        self.advance()
        fault = next((f for f in self.faults if f.action == action), None)
        if fault is not None:
            fault.times -= 1
            if fault.times <= 0:
                self.faults.remove(fault)
            if fault.carried_out:
                getattr(self, f"do_{action}")(given)
            if not fault.code:
                raise ReadTimeoutError(endpoint_url="https://ec2.us-east-1.amazonaws.com")
            return _refusal(fault.code)
        done = getattr(self, f"do_{action}")(given)
        if isinstance(done, str):
            return _refusal(done)
        return AWSResponse("", 200, {}, None), {**done, "ResponseMetadata": {"HTTPStatusCode": 200}}

    def advance(self) -> None:
        """What the clock alone brings about."""
        now = self.clock.now()
        for instance, machine in list(self.machines.items()):
            state = machine.row["State"]["Name"]
            if state == "pending" and now - machine.created_at >= BOOT_SECONDS:
                machine.row["State"] = {"Code": 16, "Name": "running"}
                if self.on_start is not None:
                    self.on_start(machine)
            if state == "running" and machine.noticed_at is not None and now - machine.noticed_at >= 120:
                self.end(instance, "Server.SpotInstanceTermination")
            if state == "shutting-down" and machine.ended_at is not None and now - machine.ended_at >= END_SECONDS:
                machine.row["State"] = {"Code": 48, "Name": "terminated"}
            if state == "terminated" and machine.ended_at is not None and now - machine.ended_at >= FORGET_SECONDS:
                machine.row["State"] = {"Code": 48, "Name": "forgotten"}

    def end(self, instance: str, code: str = "Client.UserInitiatedShutdown") -> None:
        """The machine ends, by itself, by us or by AWS."""
        machine, now = self.machines[instance], self.clock.now()
        if machine.ended_at is None:
            machine.ended_at = now
            stamp = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S GMT")
            reason = {"Code": code, "Message": code}
            machine.row |= {"State": {"Code": 32, "Name": "shutting-down"}, "StateReason": reason}
            machine.row["StateTransitionReason"] = f"User initiated ({stamp})"

    def alive(self) -> list[str]:
        return [i for i, m in self.machines.items() if m.ended_at is None]

    def total(self, instances: Any = None) -> float:
        """USD of these machines, or of all."""
        now = self.clock.now()
        return sum(m.usd(now) for i, m in self.machines.items() if instances is None or i in instances)

    def do_run_instances(self, given: Json) -> Json | str:
        token, kind = str(given["ClientToken"]), str(given["InstanceType"])
        if token in self.tokens:
            return self._reservation(self.tokens[token])
        subnet = given["NetworkInterfaces"][0]["SubnetId"]
        zone = ZONES[subnet][0]
        if zone not in self.offered.get(kind, ()):
            return "Unsupported"
        if (kind, zone) in self.no_capacity:
            return "InsufficientInstanceCapacity"
        market = given.get("InstanceMarketOptions", {})
        usd = PRICES[kind]
        if market.get("MarketType") == "spot":
            usd = self.spot_usd[kind, zone]
            if usd > float(market["SpotOptions"]["MaxPrice"]):
                return "SpotMaxPriceTooLow"
        asked = next(s["Tags"] for s in given["TagSpecifications"] if s["ResourceType"] == "instance")
        tags = [*asked, {"Key": "lorry", "Value": "lorry-dev"}]  # the last one stands in the launch template
        reservation = f"r-{self._numbers.getrandbits(64):016x}"
        ids = []
        for index in range(given["MinCount"]):
            instance, now = f"i-{self._numbers.getrandbits(64):017x}", self.clock.now()
            row = {
                "InstanceId": instance, "InstanceType": kind, "AmiLaunchIndex": index, "Tags": tags,
                "State": {"Code": 0, "Name": "pending"}, "LaunchTime": datetime.fromtimestamp(now, UTC),
                "Placement": {"AvailabilityZone": zone}, "PrivateIpAddress": f"10.0.0.{len(self.machines) + 10}",
                "ReservationId": reservation,
            }  # fmt: skip
            if market.get("MarketType") == "spot":
                row["InstanceLifecycle"] = "spot"
            self.machines[instance] = Machine(row, now, usd)
            ids.append(instance)
        self.tokens[token] = ids
        return self._reservation(ids)

    def do_describe_instances(self, given: Json) -> Json:
        wanted = {f["Name"]: f["Values"] for f in given.get("Filters", ())}
        now, rows = self.clock.now(), []
        for machine in self.machines.values():
            row = machine.row
            tags = {tag["Key"]: tag["Value"] for tag in row["Tags"]}
            hidden = self.hidden_seconds + row["AmiLaunchIndex"] * self.late_seconds
            seen = row["State"]["Name"] != "forgotten" and now - machine.created_at >= hidden
            for name, values in wanted.items():
                if name == "tag-key":
                    seen = seen and any(value in tags for value in values)
                elif name.startswith("tag:"):
                    seen = seen and tags.get(name.removeprefix("tag:")) in values
                else:
                    field_of = {"instance-state-name": row["State"]["Name"], "instance-id": row["InstanceId"]}
                    seen = seen and field_of[name] in values
            if seen:
                rows.append(row)
        found: dict[str, list[Json]] = {}
        for row in rows:
            found.setdefault(row["ReservationId"], []).append(copy.deepcopy(row))
        return {"Reservations": [{"ReservationId": key, "Instances": some} for key, some in found.items()]}

    def do_terminate_instances(self, given: Json) -> Json | str:
        if any(
            i not in self.machines or self.machines[i].row["State"]["Name"] == "forgotten" for i in given["InstanceIds"]
        ):
            return "InvalidInstanceID.NotFound"
        for instance in given["InstanceIds"]:
            self.end(instance, "Client.UserInitiatedShutdown")
        return {"TerminatingInstances": []}

    def do_describe_instance_type_offerings(self, given: Json) -> Json:
        types = given["Filters"][0]["Values"]
        rows = [{"InstanceType": t, "Location": z} for t in types for z in self.offered.get(t, ())]
        return {"InstanceTypeOfferings": rows}

    def do_describe_subnets(self, given: Json) -> Json:
        ids = [i for i in given["Filters"][0]["Values"] if i in ZONES]
        return {
            "Subnets": [
                {"SubnetId": i, "AvailabilityZone": ZONES[i][0], "AvailabilityZoneId": ZONES[i][1]} for i in ids
            ]
        }

    def do_describe_spot_price_history(self, given: Json) -> Json:
        at = datetime.fromtimestamp(self.clock.now(), UTC)
        rows = [
            {"InstanceType": t, "AvailabilityZone": z, "SpotPrice": str(usd), "Timestamp": at}
            for (t, z), usd in self.spot_usd.items()
            if t in given["InstanceTypes"]
        ]
        return {"SpotPriceHistory": rows}

    def do_get_spot_placement_scores(self, given: Json) -> Json | str:
        if not self.scores:
            return "UnauthorizedOperation"
        return {"SpotPlacementScores": [{"AvailabilityZoneId": z, "Score": s} for z, s in self.scores.items()]}

    def do_describe_volumes(self, given: Json) -> Json:
        return {"Volumes": self.volumes}

    def do_get_console_output(self, given: Json) -> Json:
        return {"InstanceId": given["InstanceId"], "Output": "aGVsbG8KZnJvbSBhIG1hY2hpbmUK"}

    def do_put_object(self, given: Json) -> Json:
        self.objects[given["Key"]] = given["Body"].read()
        return {}

    def do_assume_role(self, given: Json) -> Json:
        until = datetime.fromtimestamp(self.clock.now() + given["DurationSeconds"], UTC)
        keys = {"AccessKeyId": "ASIAMACHINE", "SecretAccessKey": "CANARY-session", "SessionToken": "CANARY-token"}
        return {"Credentials": {**keys, "Expiration": until}}

    do_assume_role_with_web_identity = do_assume_role

    def _reservation(self, ids: list[str]) -> Json:
        rows = [copy.deepcopy(self.machines[i].row) for i in ids]
        return {"ReservationId": rows[0]["ReservationId"], "Instances": rows}


class _Wire:
    """What botocore knows of a request at one moment and we need at the next."""

    account: Account
    given: Json


@cache
def client_of_service(service: str) -> Any:
    """The one client of a service in this process."""
    keys = {"aws_access_key_id": "mine", "aws_secret_access_key": "mine"}
    config = Config(retries={"mode": "standard", "total_max_attempts": 1})
    made = boto3.client(service, region_name="us-east-1", config=config, **keys)  # type: ignore[call-overload]

    def keep(params: Json, **_: Any) -> None:
        _Wire.given = params

    def answer(model: Any, **_: Any) -> tuple[AWSResponse, Json]:
        action = "".join(f"_{c.lower()}" if c.isupper() else c for c in model.name).lstrip("_")
        return _Wire.account.answer(action, dict(_Wire.given))

    made.meta.events.register("provide-client-params.*.*", keep)
    made.meta.events.register("before-call.*.*", answer)
    return made


def _refusal(code: str) -> tuple[AWSResponse, Json]:
    status = 500 if code in ("InternalError", "InsufficientInstanceCapacity") else 503 if "Limit" in code else 400
    said = {"Error": {"Code": code, "Message": f"AWS says {code}"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return AWSResponse("", status, {}, None), said
