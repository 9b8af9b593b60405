"""Jobs in Runpod Pods: one Pod per job, or one cluster of them, asked for once, looked at often, and terminated.

backend = RunpodPodBackend(os.environ); handle = backend.submit(spec, backend.request(spec)); backend.observe(handle)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.backends.base import Handle, LiveOffer, Observation, Owned, Phase, machine_name
from scripts.backends.claims import ask_once
from scripts.backends.runpod_api import BASE_URL, RunpodApi
from scripts.backends.runpod_errors import RunpodError
from scripts.backends.runpod_machines import QUEUE_SECONDS, Clusters, Machines, Pods, cluster_name, machines_of, useless
from scripts.backends.runpod_offers import CENT, Candidate, choose, live_offers
from scripts.backends.runpod_pod_claims import PodClaim, PodClaims
from scripts.backends.runpod_pod_request import PodSettings, placed, pod_request, read_pod_settings
from scripts.errors import LorryError, Problem, ProviderError, Refused
from scripts.job_token import machine_token
from scripts.store import open_store

Json = dict[str, Any]
_PHASES: dict[str, Phase] = {"PROVISIONING": "waiting", "STARTING": "waiting", "RUNNING": "running"}
_CREATE_TRIES = 3
_LOOKS = (1.0, 3.0, 8.0)  # seconds before each look for a Pod whose create was not answered
_MOST_LINES = 5000


class RunpodPodBackend:
    """One account of Runpod, named by RUNPOD_API_KEY and RUNPOD_API_BASE_URL of `environment`."""

    name: BackendName = "runpod_pod"

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._environment, self._now, self._sleep = environment, now, sleep

    def offers(self) -> list[LiveOffer]:
        """Stock and price now of our Pod offers."""
        catalog = load_catalog()
        counts = sorted({offer.gpus for offer in catalog.offers.values() if offer.backend == self.name})
        return live_offers(catalog, {count: self._api.gpus(count=count) for count in counts})

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        """The body of POST /v2/pods, or of POST /v2/clusters, without place, deadline and token."""
        return pod_request(spec, self._settings)

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """Asks for a Pod, or finds the one that was asked for, also by another launcher or before a kill.

        Raises Refused when the live price is above the quote or a secret is missing, ProviderError otherwise.
        """
        claims = PodClaims(open_store(spec.store), spec.job_id, self._now)

        def found(newest: PodClaim | None) -> dict[str, Any] | None:
            pod = self._only_one(spec, claims)
            return self._known(spec, claims, newest, pod) if pod else None

        return ask_once(claims, found, lambda mine: self._ask(spec, request, claims, mine), self._sleep)

    def observe(self, handle: Handle) -> Observation:
        """What Runpod says. A Pod that is of no use any more is terminated here, and counts as gone."""
        machines = machines_of(self._api, handle)
        machine_id = str(handle.get(machines.key, ""))
        said = f"{machines.key.capitalize()} {machine_id}"
        row = machines.read(machine_id) if machine_id else None
        if row is None:
            return Observation("gone", f"{said}: it is gone")
        why = self._why_end(machines, handle, row)
        if why is None:
            return Observation(_PHASES.get(str(row["status"]), "gone"), f"{said}: {row['status']}")
        machines.delete(machine_id)
        return Observation("gone", f"{said}: {why}; it was terminated")

    def logs(self, handle: Handle) -> Iterator[str]:
        """What the container and the platform said."""
        machines = machines_of(self._api, handle)
        pod = machines.pod_that_speaks(str(handle[machines.key]))
        for line in self._api.pod_logs(pod, tail=_MOST_LINES) if pod else ():
            yield f"{line.get('ts', '')} {line.get('source', '')}: {line.get('line', '')}"

    def stop(self, handle: Handle) -> None:
        """Terminates the Pod: a stopped one would go on to cost, and may come back without its GPUs."""
        machines = machines_of(self._api, handle)
        if handle.get(machines.key):
            machines.delete(str(handle[machines.key]))

    def owned(self) -> list[Owned]:
        """Pods and clusters with our name, our job in their variables and our deadline: what has all three is ours."""
        shown = [_owned(Pods(self._api), row) for row in Pods(self._api).listed()]
        try:
            shown += [_owned(Clusters(self._api), row) for row in Clusters(self._api).listed()]
        except RunpodError as error:
            if error.status not in (403, 404):  # an account or a key without clusters has none
                raise
        return [one for one in shown if one is not None]

    @cached_property
    def _settings(self) -> PodSettings:
        return read_pod_settings(self._environment)

    @cached_property
    def _api(self) -> RunpodApi:
        base = self._environment.get("RUNPOD_API_BASE_URL") or BASE_URL
        return RunpodApi(self._environment.get("RUNPOD_API_KEY", ""), base, sleep=self._sleep)

    def _why_end(self, machines: Machines, handle: Handle, row: Json) -> str | None:
        """Why this Pod or cluster must go now; None while it may stay."""
        run_by, most_usd = float(handle.get("run_by", 0.0)), float(handle.get("most_usd_per_hour", math.inf))
        if why := useless(row, run_by, self._now()):
            return why
        if row["cost"] > most_usd + CENT:
            return f"it costs ${row['cost']:.2f} an hour instead of ${most_usd:.2f}"
        if row.get("missing", 0) <= 0 or self._now() <= run_by:
            return None
        self._sleep(_LOOKS[-1])  # one answer that leaves out a Pod is no proof that it is gone
        again = machines.read(str(row["id"]))
        return f"it has lost {again['missing']} of its Pods" if again and again.get("missing", 0) > 0 else None

    def _ask(self, spec: LaunchSpec, request: Mapping[str, Any], claims: PodClaims, claim: PodClaim) -> dict[str, Any]:
        """Goes through the candidates; whatever comes of it stands in the claim."""
        try:
            self._require_secrets()
            failures: list[RunpodError] = []
            for candidate in self._candidates(spec):
                try:
                    pod = self._create(spec, request, candidate, claims, claim)
                except RunpodError as error:
                    if error.verdict != "next_candidate":
                        raise
                    failures.append(error)
                    continue
                self._require_price(spec, claims, claim, pod)
                return self._known(spec, claims, claim, pod)
            raise _all_refused(failures)
        except LorryError as error:
            claims.write(claim, given_up=str(error))
            raise

    def _candidates(self, spec: LaunchSpec) -> list[Candidate]:
        limits, volume_id = self._settings.limits, self._settings.volume_id
        if volume_id:
            volume = self._api.read("network-volumes", volume_id)
            if volume is None:
                raise Refused(Problem("RUNPOD_VOLUME_ID", f"there is no volume {volume_id}", "the id of a volume"))
            limits = replace(limits, datacenters=frozenset({str(volume["dataCenter"])}))
        gpus = self._api.gpus(count=spec.gpus, product="CLUSTER" if spec.nodes > 1 else "POD")
        return choose(spec, load_catalog(), gpus, self._api.datacenters(), limits)

    def _create(
        self, spec: LaunchSpec, request: Mapping[str, Any], candidate: Candidate, claims: PodClaims, claim: PodClaim
    ) -> Json:
        """One Pod or cluster at one place. A create that was not answered is looked for before it is sent again."""
        deadline = int(self._now()) + spec.deadline_seconds
        body = placed(request, candidate, deadline, self._token(spec, deadline))
        failure: RunpodError | None = None
        for _ in range(_CREATE_TRIES):
            claim = claims.write(claim, gpu=candidate.gpu, datacenter=candidate.datacenter)
            try:
                pod = machines_of(self._api, spec).create(body)
            except RunpodError as error:
                if not error.maybe_done:
                    raise
                failure = error
            else:  # two launchers that met here keep the same one
                return self._seen(spec, claims) or pod
            for seconds in _LOOKS:
                self._sleep(seconds)
                if found := self._seen(spec, claims):
                    return found
        assert failure is not None
        raise failure

    def _seen(self, spec: LaunchSpec, claims: PodClaims) -> Json | None:
        """The same after a create: a look that fails must not lead to another create elsewhere."""
        try:
            return self._only_one(spec, claims)
        except RunpodError:
            return None

    def _only_one(self, spec: LaunchSpec, claims: PodClaims) -> Json | None:
        """The Pod or cluster of this job: the oldest that lives. All others of the job are terminated."""
        machines = machines_of(self._api, spec)
        rows = [row for row in machines.listed() if machines.is_of(row, spec)]
        rows.sort(key=lambda row: (row["createdAt"], row["id"]))
        now = self._now()
        kept = next((r for r in rows if useless(r, _seconds(r["createdAt"]) + QUEUE_SECONDS, now) is None), None)
        for row in rows:
            if row is not kept:
                claims.note_double(row["id"])
                machines.delete(row["id"])
        return kept

    def _known(self, spec: LaunchSpec, claims: PodClaims, claim: PodClaim | None, pod: Json) -> dict[str, Any]:
        """The handle of a Pod or cluster, with the claim it came from completed."""
        created_at = _seconds(pod["createdAt"])
        gpu, place = str((pod.get("gpu") or {}).get("id", "")), str(pod.get("dataCenterId") or "")
        usd = float(pod["cost"]) if spec.nodes == 1 else max(float(pod["cost"]), quoted_usd(spec))
        about = {"gpu": gpu, "datacenter": place, "usd_per_hour": usd, "created_at": created_at}
        if claim is not None and claim.pod is None:
            claims.write(claim, pod=pod["id"], given_up="", **about)
        # A cluster shows its price only when its Pods have a place, so every look holds it to the quoted one.
        limit = {"most_usd_per_hour": quoted_usd(spec)} if spec.nodes > 1 else {}
        key = machines_of(self._api, spec).key
        return {
            key: pod["id"],
            "name": machine_name(spec.job_id),
            "run_by": created_at + QUEUE_SECONDS,
            **about,
            **limit,
        }

    def _require_price(self, spec: LaunchSpec, claims: PodClaims, claim: PodClaim, pod: Json) -> None:
        """What was shown is not always what is charged: a Pod that costs more than the quote is given back at once."""
        quoted, usd = quoted_usd(spec), float(pod["cost"])
        if usd > quoted + CENT:
            claims.write(claim, pod=pod["id"], usd_per_hour=usd)
            machines = machines_of(self._api, spec)
            machines.delete(pod["id"])
            what = machines.key.capitalize()
            said = f"the {what} came at ${usd:.2f} an hour, the quote was ${quoted:.2f}; it was given back"
            raise Refused(Problem(f"job {spec.job_id}", said, "plan again with the price of today"))

    def _require_secrets(self) -> None:
        """A reference without a secret would reach the container as that very text."""
        wanted = self._settings.secrets
        try:
            present = {row["name"] for row in self._api.listed("account/secrets")} if wanted else set()
        except RunpodError as error:
            if error.status in (403, 404):  # the key may not look; the container refuses what was not filled in
                return
            raise
        missing = sorted(set(wanted.values()) - present)
        if missing:
            raise Refused(*(Problem(f"secret {name}", "Runpod has none", "`lorry secrets --set`") for name in missing))

    def _token(self, spec: LaunchSpec, deadline: int) -> str:
        settings = self._settings
        return machine_token(spec.store, spec.job_id, deadline, settings.token_secret) if settings.front_door else ""


def quoted_usd(spec: LaunchSpec) -> float:
    """USD an hour that the quote was made with, for all nodes."""
    return load_catalog().offers[spec.offer or ""].usd_per_hour * spec.nodes


def _owned(machines: Machines, row: Json) -> Owned | None:
    """What the reaper sees of a Pod or cluster; None where one of the three marks is missing."""
    env = row.get("env") or {}
    job_id, store, deadline = (str(env.get(f"LORRY_{name}", "")) for name in ("JOB", "STORE", "DEADLINE"))
    ours = machine_name(job_id) if machines.key == "pod" else cluster_name(job_id, store)
    if len(job_id) <= 2 or row["name"] != ours or not deadline.isdecimal():
        return None
    handle = {machines.key: row["id"], "name": machine_name(job_id), "status": row["status"]}
    handle |= {"store": store, "deadline": int(deadline)}
    phase = _PHASES.get(row["status"], "running" if row["cost"] else "gone")  # of a cluster some Pods may go on
    return Owned(job_id, handle, phase, _seconds(row["createdAt"]), float(row["cost"]))


def _all_refused(failures: list[RunpodError]) -> ProviderError:
    """Every place said no: want of stock is a sentence, anything else is probably the request itself."""
    said = "; ".join(dict.fromkeys(str(error) for error in failures))
    step = f"launch it again later; asked at {len(failures)} places. If stock is shown there, suspect the request"
    return ProviderError(Problem("Runpod", f"no place took the Pod: {said}", step))


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
