"""Jobs in Runpod Pods: one Pod per job, asked for once, looked at often, terminated and never stopped.

backend = RunpodPodBackend(os.environ); handle = backend.submit(spec, backend.request(spec)); backend.observe(handle)
"""

from __future__ import annotations

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
from scripts.backends.runpod_offers import CENT, Candidate, choose, live_offers
from scripts.backends.runpod_pod_claims import PodClaim, PodClaims
from scripts.backends.runpod_pod_request import PodSettings, placed, pod_request, read_pod_settings
from scripts.errors import LorryError, Problem, ProviderError, Refused
from scripts.job_token import machine_token
from scripts.store import open_store

Json = dict[str, Any]
QUEUE_SECONDS = 1200.0
"How long a Pod may take to run: an image of 10 GB is pulled in 4-5 minutes; a machine that needs 20 is stuck."
_PHASES: dict[str, Phase] = {"PROVISIONING": "waiting", "STARTING": "waiting", "RUNNING": "running"}
_ENDED = ("EXITED", "ERROR")  # they do nothing any more, but their disk is charged
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
        """The body of POST /v2/pods, without place, deadline and token."""
        return pod_request(spec, self._settings)

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """Asks for a Pod, or finds the one that was asked for, also by another launcher or before a kill.

        Raises Refused when the live price is above the quote or a secret is missing, ProviderError otherwise.
        """
        claims = PodClaims(open_store(spec.store), spec.job_id, self._now)

        def found(newest: PodClaim | None) -> dict[str, Any] | None:
            pod = self._only_pod(spec, claims)
            return self._known(claims, newest, pod) if pod else None

        return ask_once(claims, found, lambda mine: self._ask(spec, request, claims, mine), self._sleep)

    def observe(self, handle: Handle) -> Observation:
        """What Runpod says. A Pod that is of no use any more is terminated here, and counts as gone."""
        pod_id = str(handle.get("pod", ""))
        pod = self._api.read("pods", pod_id) if pod_id else None
        why = useless(pod, float(handle.get("run_by", 0.0)), self._now())
        if pod is None or why is None:
            status = str(pod["status"]) if pod else ""
            return Observation(_PHASES.get(status, "gone"), f"Pod {pod_id}: {why or status}")
        self._api.delete("pods", pod_id)
        return Observation("gone", f"Pod {pod_id}: {why}")

    def logs(self, handle: Handle) -> Iterator[str]:
        """What the container and the platform said."""
        for line in self._api.pod_logs(str(handle["pod"]), tail=_MOST_LINES):
            yield f"{line.get('ts', '')} {line.get('source', '')}: {line.get('line', '')}"

    def stop(self, handle: Handle) -> None:
        """Terminates the Pod: a stopped one would go on to cost, and may come back without its GPUs."""
        if handle.get("pod"):
            self._api.delete("pods", str(handle["pod"]))

    def owned(self) -> list[Owned]:
        """Pods with our name, our job in their environment and our deadline: what carries all three is ours."""
        found = []
        for pod in self._api.listed("pods"):
            env = pod.get("env") or {}
            job_id = str(env.get("LORRY_JOB", ""))
            deadline = str(env.get("LORRY_DEADLINE", ""))
            ours = pod["name"] == machine_name(job_id) and deadline.isdecimal() and len(job_id) > 2
            if ours and pod["status"] != "TERMINATED":
                handle = {"pod": pod["id"], "name": pod["name"], "status": pod["status"]}
                handle |= {"store": env.get("LORRY_STORE", ""), "deadline": int(deadline)}
                phase = _PHASES.get(pod["status"], "gone")
                found.append(Owned(job_id, handle, phase, _seconds(pod["createdAt"]), float(pod["cost"])))
        return found

    @cached_property
    def _settings(self) -> PodSettings:
        return read_pod_settings(self._environment)

    @cached_property
    def _api(self) -> RunpodApi:
        base = self._environment.get("RUNPOD_API_BASE_URL") or BASE_URL
        return RunpodApi(self._environment.get("RUNPOD_API_KEY", ""), base, sleep=self._sleep)

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
                return self._known(claims, claim, pod)
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
        gpus, datacenters = self._api.gpus(count=spec.gpus), self._api.datacenters()
        return choose(spec, load_catalog(), gpus, datacenters, limits)

    def _create(
        self, spec: LaunchSpec, request: Mapping[str, Any], candidate: Candidate, claims: PodClaims, claim: PodClaim
    ) -> Json:
        """One Pod at one place. A create that was not answered is looked for before it is sent again."""
        deadline = int(self._now()) + spec.deadline_seconds
        body = placed(request, candidate, deadline, self._token(spec, deadline))
        failure: RunpodError | None = None
        for _ in range(_CREATE_TRIES):
            claim = claims.write(claim, gpu=candidate.gpu, datacenter=candidate.datacenter)
            try:
                pod = self._api.create("pods", body)
                return self._only_pod(spec, claims) or pod  # two launchers that met here keep the same one
            except RunpodError as error:
                if not error.maybe_done:
                    raise
                failure = error
            for seconds in _LOOKS:
                self._sleep(seconds)
                if found := self._only_pod(spec, claims):
                    return found
        assert failure is not None
        raise failure

    def _only_pod(self, spec: LaunchSpec, claims: PodClaims) -> Json | None:
        """The Pod of this job: the oldest that lives. All others of the job are terminated."""
        name = machine_name(spec.job_id)
        pods = [pod for pod in self._api.listed("pods") if pod["name"] == name and pod["status"] != "TERMINATED"]
        pods = [pod for pod in pods if (pod.get("env") or {}).get("LORRY_STORE") == spec.store]
        pods.sort(key=lambda pod: (pod["status"] in _ENDED, pod["createdAt"], pod["id"]))
        kept = pods[0] if pods and pods[0]["status"] not in _ENDED else None
        for pod in pods:
            if pod is not kept:
                claims.note_double(pod["id"])
                self._api.delete("pods", pod["id"])
        return kept

    def _known(self, claims: PodClaims, claim: PodClaim | None, pod: Json) -> dict[str, Any]:
        """The handle of a Pod, with the claim it came from completed."""
        created_at = _seconds(pod["createdAt"])
        gpu, place = str((pod.get("gpu") or {}).get("id", "")), str(pod.get("dataCenterId") or "")
        about = {"gpu": gpu, "datacenter": place, "usd_per_hour": float(pod["cost"]), "created_at": created_at}
        if claim is not None and claim.pod is None:
            claims.write(claim, pod=pod["id"], given_up="", **about)
        return {"pod": pod["id"], "name": pod["name"], "run_by": created_at + QUEUE_SECONDS, **about}

    def _require_price(self, spec: LaunchSpec, claims: PodClaims, claim: PodClaim, pod: Json) -> None:
        """What was shown is not always what is charged: a Pod that costs more than the quote is given back at once."""
        quoted, usd = load_catalog().offers[spec.offer or ""].usd_per_hour, float(pod["cost"])
        if usd > quoted + CENT:
            claims.write(claim, pod=pod["id"], usd_per_hour=usd)
            self._api.delete("pods", pod["id"])
            said = f"the Pod came at ${usd:.2f} an hour, the quote was ${quoted:.2f}; it was given back"
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


def useless(pod: Mapping[str, Any] | None, run_by: float, now: float) -> str | None:
    """Why this Pod will not do its job any more; None while it may. Pure.

    pod: as Runpod shows it, None when there is none. run_by: unix seconds by which it must run.
    """
    if pod is None or pod["status"] == "TERMINATED":
        return "it is gone"
    if pod["status"] in _ENDED:
        return f"it is {pod['status']}; it was terminated"
    if pod["status"] != "RUNNING" and now > run_by:
        return f"it was still {pod['status']} after {QUEUE_SECONDS / 60:.0f} minutes; it was terminated"
    return None


def _all_refused(failures: list[RunpodError]) -> ProviderError:
    """Every place said no: want of stock is a sentence, anything else is probably the request itself."""
    said = "; ".join(dict.fromkeys(str(error) for error in failures))
    step = f"launch it again later; asked at {len(failures)} places. If stock is shown there, suspect the request"
    return ProviderError(Problem("Runpod", f"no place took the Pod: {said}", step))


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
