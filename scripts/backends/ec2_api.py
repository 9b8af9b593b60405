"""What we ask of EC2 in one region: machines by tag or id, what is offered where, spot prices, the end of machines.

ec2 = Ec2Api(aws_client("ec2")); ec2.with_tag("lorry_job"); ec2.end(["i-..."])            # AwsError when AWS says no
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.backends.aws import AwsError, ask
from scripts.backends.ec2_places import Pool, spot_prices

Json = dict[str, Any]
COSTS = ("pending", "running", "stopping", "stopped")
"States in which a machine or its disk is charged for."
BLOCK_PRICE_TAG = "lorry_usd_per_hour"
"On the reservation of a Capacity Block: what an hour of one machine comes to, by its fee."


class Ec2Api:
    """One client of EC2; each method is one question or one order."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def region(self) -> str:
        """Where all this is."""
        return str(self._client.meta.region_name)

    def run(self, request: Mapping[str, Any]) -> Json:
        """The reservation with its machines. Asked again with one client token, it is the same."""
        return ask(self._client, "run_instances", **request)

    def with_tag(self, key: str, value: str = "", *, ended: bool = False) -> list[Json]:
        """Machines that may still cost something, or have ended too, and carry this tag, whatever its value if none."""
        tag = {"Name": f"tag:{key}", "Values": [value]} if value else {"Name": "tag-key", "Values": [key]}
        states = [] if ended else [{"Name": "instance-state-name", "Values": list(COSTS)}]
        return self._rows([tag, *states])

    def known(self, ids: Sequence[str]) -> list[Json]:
        """These machines, ended ones too; those that EC2 knows no more are left out: it forgets in an hour."""
        return self._rows([{"Name": "instance-id", "Values": list(ids)}]) if ids else []

    def volumes(self, key: str) -> list[Json]:
        """Disks that carry this tag, in use or not."""
        return list(ask(self._client, "describe_volumes", Filters=[{"Name": "tag-key", "Values": [key]}])["Volumes"])

    def console(self, instance: str) -> list[str]:
        """The last 64 KB of what a machine wrote to its console, now and not as it was at its start."""
        said = ask(self._client, "get_console_output", InstanceId=instance, Latest=True)
        return str(said.get("Output") or "").splitlines()

    def offered(self, types: Sequence[str]) -> set[Pool]:
        """In which zones of the region there is which type."""
        wanted = [{"Name": "instance-type", "Values": list(types)}]
        given: Json = {"LocationType": "availability-zone", "Filters": wanted}
        rows = ask(self._client, "describe_instance_type_offerings", **given)["InstanceTypeOfferings"]
        return {(str(row["InstanceType"]), str(row["Location"])) for row in rows}

    def subnets(self, ids: Sequence[str]) -> list[Json]:
        """Those of them that exist."""
        wanted = [{"Name": "subnet-id", "Values": list(ids)}]
        return list(ask(self._client, "describe_subnets", Filters=wanted)["Subnets"])

    def spot(self, types: Sequence[str], now: float) -> dict[Pool, float]:
        """USD an hour of each pool, as it is now."""
        given: Json = {"InstanceTypes": list(types), "ProductDescriptions": ["Linux/UNIX"], "StartTime": int(now)}
        return spot_prices(ask(self._client, "describe_spot_price_history", **given)["SpotPriceHistory"])

    def scores(self, types: Sequence[str], nodes: int, subnets: Sequence[Mapping[str, Any]]) -> dict[Pool, int]:
        """How likely each pool is to last, 1 to 10, where this account may ask; empty where it may not."""
        names = {str(row.get("AvailabilityZoneId")): str(row["AvailabilityZone"]) for row in subnets}
        found: dict[Pool, int] = {}
        for kind in types:
            given: Json = {"InstanceTypes": [kind], "TargetCapacity": nodes, "SingleAvailabilityZone": True}
            given["RegionNames"] = [self.region]  # otherwise the ten best zones of all regions
            try:
                rows = ask(self._client, "get_spot_placement_scores", **given)["SpotPlacementScores"]
            except AwsError:
                return {}
            zones = ((names.get(str(row["AvailabilityZoneId"])), int(row["Score"])) for row in rows)
            found |= {(kind, zone): score for zone, score in zones if zone}
        return found

    def block_usd(self, reservation: str) -> float | None:
        """What an hour of one machine in our Capacity Block comes to; None where it does not say, as one that was
        bought elsewhere."""
        rows = ask(self._client, "describe_capacity_reservations", CapacityReservationIds=[reservation])
        tags = {tag["Key"]: tag["Value"] for row in rows["CapacityReservations"] for tag in row.get("Tags", ())}
        return float(tags[BLOCK_PRICE_TAG]) if BLOCK_PRICE_TAG in tags else None

    def end(self, ids: Sequence[str]) -> None:
        """Terminates machines; no error for those that are gone."""
        try:
            if ids:
                ask(self._client, "terminate_instances", InstanceIds=list(ids))
        except AwsError as error:
            if error.aws_code != "InvalidInstanceID.NotFound":
                raise
            for instance in ids if len(ids) > 1 else ():  # one that is unknown must not keep the others alive
                self.end([instance])

    def _rows(self, filters: list[Json]) -> list[Json]:
        rows: list[Json] = []
        given: Json = {"Filters": filters}
        while True:
            answer = ask(self._client, "describe_instances", **given)
            for one in answer["Reservations"]:
                rows += [{**row, "ReservationId": one["ReservationId"]} for row in one["Instances"]]
            if not answer.get("NextToken"):
                return rows
            given["NextToken"] = answer["NextToken"]
