"""Jobs on EC2: the machines of one job from our launch template, on demand, spot or reserved; ended, never stopped.

backend = Ec2Backend(os.environ); handle = backend.submit(spec, backend.request(spec)); backend.observe(handle)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.backends.aws import AwsError, ask, aws_client
from scripts.backends.base import Charges, Handle, LiveOffer, Observation, Owned, machine_name
from scripts.backends.claims import ask_once
from scripts.backends.ec2_api import COSTS, Ec2Api
from scripts.backends.ec2_charges import costs_of_ended, lifetimes
from scripts.backends.ec2_claims import InstanceClaim, InstanceClaims
from scripts.backends.ec2_fleet import Group, forgotten_at_ec2, group_of, groups_of, may_be_whole, phase_of, reason_of
from scripts.backends.ec2_places import Place, choose_places
from scripts.backends.ec2_request import (
    Ec2Settings,
    ec2_request,
    has_door,
    key_variables,
    launch_file,
    placed,
    read_ec2_settings,
)
from scripts.backends.suitable import suitable
from scripts.cost import read_settlement
from scripts.errors import LorryError, Problem, ProviderError
from scripts.forgotten import Forgotten
from scripts.job_folder import JobFiles
from scripts.job_session import job_session
from scripts.job_token import KEYS_SECONDS, machine_token
from scripts.store import Store, open_store

Json = dict[str, Any]
START_SECONDS = 1200.0
"How long machines may take to run."
_CREATE_TRIES, _PAUSES = 3, (2.0, 5.0, 10.0)


class Ec2Backend:
    """One account and region of AWS, as boto3 finds them; the room's outputs come from `environment`.

    client: a client of a service by its name; the default is boto3's.
    """

    name: BackendName = "ec2"

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        client: Callable[[str], Any] = aws_client,
    ) -> None:
        self._environment, self._now, self._sleep, self._client = environment, now, sleep, client
        self._clients: dict[str, Any] = {}

    def offers(self) -> list[LiveOffer]:
        """What our zones offer now, at the spot price where the market is spot, else at the catalog's."""
        offers = {name: o for name, o in load_catalog().offers.items() if o.backend == self.name}
        types = sorted({offer.provider_type for offer in offers.values()})
        zones = {str(row["AvailabilityZone"]) for row in self._ec2.subnets(self._settings.subnets)}
        offered = {pool for pool in self._ec2.offered(types) if pool[1] in zones}
        spot = self._ec2.spot(types, self._now()) if self._settings.market == "spot" else None
        found = []
        for name, offer in offers.items():
            pools = [pool for pool in offered if pool[0] == offer.provider_type]
            usd = min((spot[pool] for pool in pools if pool in spot), default=None) if spot is not None else None
            found.append(LiveOffer(name, bool(pools) and (spot is None or usd is not None), usd or offer.usd_per_hour))
        return found

    def request(self, spec: LaunchSpec) -> Json:
        """The arguments of RunInstances, without place, deadline and client token."""
        return ec2_request(spec, self._settings)

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> Json:
        """Asks for the job's machines, or finds those that were asked for, also by another launcher or before a kill.

        Raises Refused when nothing that would do is offered, ProviderError otherwise.
        """
        claims = InstanceClaims(open_store(spec.store), spec.job_id, self._now)

        def found(newest: InstanceClaim | None) -> Json | None:
            group = self._only_group(spec, claims)
            return self._known(spec, claims, newest, group) if group else self._unseen(spec, newest)

        handle = ask_once(claims, found, lambda mine: self._ask(spec, request, claims, mine), self._sleep)
        in_block = self._settings.market == "capacity-block"
        return handle | ({"prepaid": self._settings.reservation} if in_block else {})

    def observe(self, handle: Handle) -> Observation:
        """What EC2 says. Machines of which one is of no use any more are ended here, and count as gone."""
        ids, now = _ids(handle), self._now()
        rows = self._ec2.known(ids)
        names, created_at = ", ".join(ids), float(handle.get("created_at", 0.0))
        if len(rows) < len(ids) and may_be_whole(rows, len(ids), created_at, now):
            return Observation("waiting", f"{names}: not all listed yet")
        phase = phase_of(rows, len(ids))
        if phase == "waiting" and now > float(handle.get("run_by", now)):
            phase = "gone"
        if phase == "gone" and rows:  # also those that are not listed
            ended = [row["InstanceId"] for row in rows if row["State"]["Name"] not in COSTS]
            self._ec2.end([one for one in ids if one not in ended])
        said, was_taken = reason_of(rows)
        return Observation(phase, f"{names}: {said}", was_taken=phase == "gone" and was_taken)

    def logs(self, handle: Handle) -> Iterator[str]:
        """The console of each machine, where its user data and its container write."""
        for instance in _ids(handle):
            yield from (f"{instance}: {line}" for line in self._ec2.console(instance))

    def stop(self, handle: Handle) -> None:
        """Terminates the machines: a stopped one would go on to cost for its disk."""
        self._ec2.end(_ids(handle))

    def owned(self) -> list[Owned]:
        """Machines with our name, our job and our deadline in their tags: what carries all three is ours."""
        rows = self._ec2.with_tag("lorry_job")
        return [group.owned() for group in groups_of(rows) if group.is_marked]

    def charges(self, store: Store, files: JobFiles) -> Charges | None:
        """How long each machine of the job lived x its price; None where it never got one.

        EC2 forgets a machine an hour after its end: what was settled until then is kept.
        """
        claims, known = InstanceClaims(store, files.job_id, self._now), read_settlement(store, files.job_id)
        rows = self._rows_of(store.url, files.job_id)
        return lifetimes(claims.all(), rows, known.machines if known else {}, files, self._now())

    def forgotten(self) -> list[Forgotten]:
        """Disks of ours that no machine uses, and machines of our template that carry no job: reported, never ended."""
        return forgotten_at_ec2(self._ec2.with_tag("lorry"), self._ec2.volumes("lorry"))

    @cached_property
    def _settings(self) -> Ec2Settings:
        return read_ec2_settings(self._environment)

    @cached_property
    def _ec2(self) -> Ec2Api:
        return Ec2Api(self._client("ec2"))

    def _of(self, service: str) -> Any:
        return self._clients.setdefault(service, self._client(service))

    def _ask(self, spec: LaunchSpec, request: Mapping[str, Any], claims: InstanceClaims, claim: InstanceClaim) -> Json:
        """Goes through the places; whatever comes of it stands in the claim."""
        try:
            claims.note_costs(costs_of_ended(self._rows_of(spec.store, spec.job_id)))
            deadline = int(self._now()) + spec.deadline_seconds
            keys = self._keys(spec, deadline)  # before anything is rented
            failures: list[AwsError] = []
            for place in self._places(spec):
                try:
                    group = self._create(spec, request, place, deadline, claims, claim)
                except AwsError as error:
                    if not error.wants_another_place:
                        raise
                    failures.append(error)
                    continue
                self._hand_over(spec, claims, group, keys)
                return self._known(spec, claims, claim, self._only_group(spec, claims) or group, handed=True)
            raise _all_refused(failures)
        except LorryError as error:
            claims.write(claim, given_up=str(error))
            raise

    def _create(
        self,
        spec: LaunchSpec,
        request: Mapping[str, Any],
        place: Place,
        deadline: int,
        claims: InstanceClaims,
        claim: InstanceClaim,
    ) -> Group:
        """The machines at one place. Asked again with the same token, EC2 answers with the same machines."""
        token = claim.client_token(spec.store, spec.job_id, place)
        body = placed(request, spec, self._settings, place, deadline, token)
        for tries in range(_CREATE_TRIES):
            claim = claims.write(claim, instance_type=place.instance_type, zone=place.zone)
            try:
                return group_of(self._ec2.run(body))
            except AwsError as error:
                is_unclear = not error.wants_another_place and (error.maybe_done or claim.is_unclear)
                if is_unclear != claim.is_unclear:
                    claim = claims.write(claim, is_unclear=is_unclear)
                if error.wants_another_place or tries == _CREATE_TRIES - 1 or not error.may_be_asked_again:
                    raise
            self._sleep(_PAUSES[tries])
        raise AssertionError("the last try returns or raises")

    def _hand_over(self, spec: LaunchSpec, claims: InstanceClaims, group: Group, keys: Mapping[str, str]) -> None:
        """Writes each machine's launch file, which it waits for ten minutes. Machines without one are ended."""
        bucket = self._bucket(spec)
        for node, row in enumerate(group.rows):
            text = launch_file(spec, self._settings, group.deadline, keys, node, group.addresses)
            key = f"machines/{self._settings.role_id}:{row['InstanceId']}/launch.env"
            try:
                ask(self._of("s3"), "put_object", Bucket=bucket, Key=key, Body=text.encode())
            except AwsError:
                claims.note_doubles(group.ids)
                self._ec2.end(group.ids)
                raise

    def _bucket(self, spec: LaunchSpec) -> str:
        """Where machines look for their launch files: the bucket of the store."""
        return spec.store.removeprefix("s3://").split("/")[0]

    def _keys(self, spec: LaunchSpec, deadline: int) -> dict[str, str]:
        settings, session = self._settings, None
        door = has_door(spec, settings)
        token = machine_token(spec.store, spec.job_id, deadline, settings.token_secret) if door else ""
        if not door:
            lasting = min(KEYS_SECONDS, max(900, spec.deadline_seconds + 900))
            url = f"{spec.store}/{spec.job_id}"
            role, policy = settings.trainer_role, settings.session_policy
            session = job_session(role, policy, url, lasting, self._environment, self._of("sts"))
        return key_variables(settings, spec.job_id, token, session, self._ec2.region)

    def _known(
        self, spec: LaunchSpec, claims: InstanceClaims, claim: InstanceClaim | None, group: Group, handed: bool = False
    ) -> Json:
        """The handle of machines, with the claim they came from completed."""
        if claim is not None and claim.instances != tuple(group.ids) and not handed:
            keys = self._keys(spec, group.deadline)
            self._hand_over(spec, claims, group, keys)  # its launcher may have died before that
        if claim is not None:
            about = {"instance_type": group.instance_type, "zone": group.zone, "created_at": group.created_at}
            each = group.usd_per_hour
            claims.write(claim, instances=tuple(group.ids), given_up="", usd_per_hour=each, **about)
        return _handle(spec, group.ids, group)

    def _unseen(self, spec: LaunchSpec, claim: InstanceClaim | None) -> Json | None:
        """The handle of machines that a claim names and EC2 may not list under their tags yet."""
        if claim is None or not claim.instances:
            return None
        rows = self._ec2.known(claim.instances)
        is_there = may_be_whole(rows, spec.nodes, claim.created_at, self._now())
        return _handle(spec, claim.instances, claim) if is_there else None

    def _only_group(self, spec: LaunchSpec, claims: InstanceClaims) -> Group | None:
        """The machines of this job: the oldest request whose machines all live. All others of the job are ended, but
        for those that may be whole when all are listed."""
        groups, now = groups_of(self._rows_of(spec.store, spec.job_id)), self._now()
        whole = [group for group in groups if group.is_whole(spec.nodes)]
        kept = min(whole, key=lambda group: (group.created_at, group.ids), default=None)
        others = [group for group in groups if group is not kept]
        if kept is None:
            others = [g for g in others if not may_be_whole(g.rows, spec.nodes, g.created_at, now)]
        rows = [row for group in others for row in group.rows]
        doubles = [str(row["InstanceId"]) for row in rows if row["State"]["Name"] in COSTS]
        if doubles:
            claims.note_doubles(doubles)
            self._ec2.end(doubles)
        return kept

    def _rows_of(self, store: str, job_id: str) -> list[Json]:
        """Every machine of the job that EC2 still knows."""
        rows = self._ec2.with_tag("lorry_job", job_id, ended=True)
        return [row for row in rows if Group((row,)).store == store]

    def _places(self, spec: LaunchSpec) -> list[Place]:
        catalog = load_catalog()
        types = sorted({offer.provider_type for _, offer in suitable(spec, catalog)})
        offered, subnets = self._ec2.offered(types), self._ec2.subnets(self._settings.subnets)
        if self._settings.market == "capacity-block":
            usd = self._ec2.block_usd(self._settings.reservation)
            places = choose_places(spec, catalog, subnets, offered)
            return places if usd is None else [replace(place, usd_per_hour=usd) for place in places]
        if self._settings.market != "spot":
            return choose_places(spec, catalog, subnets, offered)
        prices, scores = self._ec2.spot(types, self._now()), self._ec2.scores(types, spec.nodes, subnets)
        return choose_places(spec, catalog, subnets, offered, prices, scores)


def _handle(spec: LaunchSpec, ids: Sequence[str], about: Group | InstanceClaim) -> Json:
    """What finds these machines again."""
    return {
        "instances": list(ids),
        "name": machine_name(spec.job_id),
        "usd_per_hour": round(about.usd_per_hour * len(ids), 6),
        "run_by": about.created_at + START_SECONDS,
        "instance_type": about.instance_type,
        "zone": about.zone,
        "created_at": about.created_at,
    }


def _ids(handle: Handle) -> list[str]:
    return [str(instance) for instance in handle.get("instances") or ()]


def _all_refused(failures: list[AwsError]) -> ProviderError:
    """Every place said no: want of capacity is a sentence, and so is a quota."""
    said = "; ".join(dict.fromkeys(error.problems[0].got for error in failures))
    step = f"{failures[0].problems[0].want}; asked at {len(failures)} places"
    refused = ProviderError(Problem("AWS EC2", f"no place gave the machines: {said}", step))
    refused.lasts = all(error.lasts for error in failures)
    return refused
