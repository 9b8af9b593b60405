"""Jobs as SageMaker training jobs: asked for under a name that the service gives away once, watched, stopped, settled.

backend = SageMakerBackend(os.environ); handle = backend.submit(spec, backend.request(spec)); backend.observe(handle)

The service refuses a name that is taken, so no claims are needed: of several launchers one makes the training job, and
the others find it. A training job that has ended is followed by the next number of the same job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from recipes.recipe import BackendName
from scripts.backends.aws import AwsError, ask, aws_client
from scripts.backends.base import Charges, Handle, Observation, Owned, Phase, machine_name
from scripts.backends.sagemaker_request import (
    SageMakerSettings,
    read_sagemaker_settings,
    training_job_name,
    training_request,
)
from scripts.errors import Conflict, Problem, ProviderError, Refused
from scripts.forgotten import Forgotten
from scripts.job_folder import JobFiles
from scripts.store import Store

Json = dict[str, Any]
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
MOST_NUMBERS = 99
ENDED = ("Completed", "Failed", "Stopped", "Deleting")
_WAITING = (
    "Interrupted",
    "Pending",
    "Starting",
    "LaunchingMLInstances",
    "PreparingTrainingStack",
    "Downloading",
    "DownloadingTrainingImage",
)
_GRACE_SECONDS = 600.0
"What the platform may take beyond its own limit: 120 s to end the container, and the upload."
_LOG_PAGE = 10_000
_LOOK = "`lorry doctor` with the AWS room says what is missing"
_COLD = "KeepAlivePeriodInSeconds=0"
_NO_SUCH = ("ValidationException", "ResourceNotFound")


class SageMakerBackend:
    """One account and region, named by the settings of sagemaker_request.py in `environment`."""

    name: BackendName = "sagemaker"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._clients: dict[str, Any] = {}

    def request(self, spec: LaunchSpec) -> dict[str, Any]:
        """The body of CreateTrainingJob."""
        return training_request(spec, self._settings)

    def submit(self, spec: LaunchSpec, request: Mapping[str, Any]) -> dict[str, Any]:
        """Makes the training job, or finds the one that was made, also by another launcher or before a kill.

        Raises Refused when a quota or a right is missing, Conflict when another's job has the name, ProviderError.
        """
        if self._settings.sdk:
            from scripts.backends.sagemaker_sdk import through_sdk

            request = through_sdk(request)
        for number in range(1, MOST_NUMBERS + 1):
            name = training_job_name(self._settings.prefix, spec.job_id, spec.store, number)
            if self._create({**request, "TrainingJobName": name}):
                return self._handle(name, number)
            job = self._describe(name)
            if job is None:
                raise ProviderError(Problem(f"training job {name}", "taken, but not shown yet", "launch it again"))
            if (job.get("Environment") or {}).get("LORRY_STORE") != spec.store:
                raise Conflict(Problem(f"training job {name}", "it is not ours", "choose another job id"))
            if job["TrainingJobStatus"] not in ENDED:
                return self._handle(name, number)
        raise ProviderError(
            Problem(
                f"job {spec.job_id}", f"it has had {MOST_NUMBERS} training jobs", "look why none of them ended well"
            )
        )

    def observe(self, handle: Handle) -> Observation:
        """Both statuses in one sentence, with the reason of a failure."""
        name = str(handle.get("training_job", ""))
        job = self._describe(name) if name else None
        if job is None:
            return Observation("gone", f"training job {name}: there is none of that name")
        status, secondary = job["TrainingJobStatus"], str(job.get("SecondaryStatus", ""))
        reason = " ".join(str(job.get("FailureReason") or "").split())[:300]
        said = f"training job {name}: {status}" + (f", {secondary}" if secondary not in ("", status) else "")
        usd = usd_of(job) if handle.get("number") == 1 and "BillableTimeInSeconds" in job else None
        return Observation(phase_of(status, secondary), said + (f": {reason}" if reason else ""), usd)

    def logs(self, handle: Handle) -> Iterator[str]:
        """What the containers of all hosts printed, as CloudWatch has it."""
        logs, prefix = self._client("logs"), f"{handle['training_job']}/"
        try:
            found = ask(logs, "describe_log_streams", logGroupName=LOG_GROUP, logStreamNamePrefix=prefix)
        except AwsError as error:
            if error.aws_code == "ResourceNotFoundException":  # no job of this account has printed anything yet
                return
            raise
        for stream in found["logStreams"]:
            host = stream["logStreamName"].rpartition("/")[2].rpartition("-")[0]
            for event in _events(logs, stream["logStreamName"]):
                at = datetime.fromtimestamp(event["timestamp"] / 1000, UTC).isoformat(timespec="seconds")
                yield f"{at} {host}: {event['message']}"

    def stop(self, handle: Handle) -> None:
        """Asks for the end: the container gets SIGTERM, and two minutes. No error when it has ended already."""
        name = str(handle.get("training_job", ""))
        if not name:
            return
        try:
            ask(self._client("sagemaker"), "stop_training_job", TrainingJobName=name)
        except AwsError as error:
            if error.aws_code not in _NO_SUCH:
                raise
            job = self._describe(name)
            if job is not None and job["TrainingJobStatus"] not in (*ENDED, "Stopping"):
                raise

    def owned(self) -> list[Owned]:
        """Training jobs that have not ended, with a name that follows from our job and store in their environment."""
        found = []
        for status in ("InProgress", "Stopping"):
            for name in self._names(StatusEquals=status):
                job = self._describe(name)
                if job is not None and job["TrainingJobStatus"] not in ENDED and (mine := self._owned(job)) is not None:
                    found.append(mine)
        return found

    def forgotten(self) -> list[Forgotten]:
        """Machines that are kept warm for a next job, which are billed although nothing runs: reported, never ended."""
        found = []
        for name in self._names(WarmPoolStatusEquals="Available"):
            job = self._describe(name)
            if job is not None and self._is_ours(job):
                seconds = (job.get("ResourceConfig") or {}).get("KeepAlivePeriodInSeconds") or 0
                said = f"its machine is kept warm, and billed, for {seconds / 60:.0f} minutes after its end; to end it:"
                said += f" `aws sagemaker update-training-job --training-job-name {name} --resource-config {_COLD}`"
                usd = _hourly_usd(job) * seconds / 3600  # all that it costs, in this month or any: then it is gone
                found.append(Forgotten(f"training job {name}", said, usd))
        return found

    def charges(self, store: Store, files: JobFiles) -> Charges | None:
        """What the job's training jobs cost by the seconds that SageMaker bills; None for a job of another backend.

        A machine that was kept warm for the next job is among it. Raises ProviderError.
        """
        spec, submission = files.launch, files.submission
        if spec is None or submission is None or submission.backend != self.name:
            return None
        usd: dict[str, float] = {}
        is_closed = True
        for number in range(1, MOST_NUMBERS + 1):
            name = training_job_name(self._prefix_of(submission.handle), spec.job_id, spec.store, number)
            if (job := self._describe(name)) is None:
                break
            usd[name] = usd_of(job)
            is_warm = (job.get("WarmPoolStatus") or {}).get("Status") in ("Available", "InUse")
            is_closed = is_closed and job["TrainingJobStatus"] in ENDED and not is_warm
        return Charges(usd, is_closed=is_closed)

    @cached_property
    def _settings(self) -> SageMakerSettings:
        return read_sagemaker_settings(self._environment)

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = aws_client(service, self._settings.region or None)
        return self._clients[service]

    def _create(self, body: Mapping[str, Any]) -> bool:
        """Whether it was made; False when the name is taken, which is also what a repeated request is told."""
        try:
            ask(self._client("sagemaker"), "create_training_job", **body)
        except AwsError as error:
            if error.aws_code == "ResourceInUse":
                return False
            if error.aws_code == "ValidationException":  # a role, a bucket, an image or a type that will not do
                raise Refused(*(Problem(p.where, p.got, _LOOK) for p in error.problems)) from None
            raise
        return True

    def _describe(self, name: str) -> Json | None:
        """A training job; None when there is none of that name, which SageMaker calls a wrong request."""
        try:
            return ask(self._client("sagemaker"), "describe_training_job", TrainingJobName=name)
        except AwsError as error:
            if error.aws_code in _NO_SUCH:
                return None
            raise

    def _names(self, **wanted: str) -> Iterator[str]:
        """Names of training jobs with the prefix of this room, of one status."""
        given: Json = {"NameContains": self._settings.prefix, "MaxResults": 100, **wanted}
        while True:
            page = ask(self._client("sagemaker"), "list_training_jobs", **given)
            yield from (row["TrainingJobName"] for row in page["TrainingJobSummaries"])
            if not page.get("NextToken"):
                return
            given["NextToken"] = page["NextToken"]

    def _handle(self, name: str, number: int) -> dict[str, Any]:
        return {"training_job": name, "name": name, "number": number, "prefix": self._settings.prefix}

    def _prefix_of(self, handle: Handle) -> str:
        return str(handle.get("prefix") or self._settings.prefix)

    def _is_ours(self, job: Json) -> bool:
        env, name = job.get("Environment") or {}, str(job["TrainingJobName"])
        job_id, store = str(env.get("LORRY_JOB", "")), str(env.get("LORRY_STORE", ""))
        first = training_job_name(self._settings.prefix, job_id, store, 1)
        return bool(job_id) and (name == first or name.startswith(f"{first}-"))

    def _owned(self, job: Json) -> Owned | None:
        if not self._is_ours(job):
            return None
        env, name = job["Environment"], job["TrainingJobName"]
        job_id, store = str(env["LORRY_JOB"]), str(env.get("LORRY_STORE", ""))
        handle = {"training_job": name, "name": machine_name(job_id), "store": store, "deadline": _deadline(job)}
        phase = phase_of(job["TrainingJobStatus"], str(job.get("SecondaryStatus", "")))
        started = job["TrainingStartTime"].timestamp() if job.get("TrainingStartTime") else None
        return Owned(job_id, handle, phase, started, _hourly_usd(job))


def _events(logs: Any, stream: str) -> Iterator[Json]:
    """The events of a stream, oldest first; the last page is known by a token that does not change."""
    given: Json = {"logGroupName": LOG_GROUP, "logStreamName": stream, "startFromHead": True, "limit": _LOG_PAGE}
    while True:
        page = ask(logs, "get_log_events", **given)
        yield from page["events"]
        if page["nextForwardToken"] == given.get("nextToken"):
            return
        given["nextToken"] = page["nextForwardToken"]


def phase_of(status: str, secondary: str) -> Phase:
    """Where a training job is, by both of its statuses. Pure."""
    if status in ENDED:
        return "gone"
    return "waiting" if secondary in _WAITING else "running"


def usd_of(job: Mapping[str, Any]) -> float:
    """What a training job cost so far: billed seconds x hosts x price, and those for which its machine was kept warm.

    On spot the billed seconds are fewer than those of the training, which is how SageMaker says the discount.
    """
    warm: float = (job.get("WarmPoolStatus") or {}).get("ResourceRetainedBillableTimeInSeconds") or 0
    seconds = float(job.get("BillableTimeInSeconds", 0)) + warm
    return round(seconds / 3600 * _hourly_usd(job), 6)


def _hourly_usd(job: Mapping[str, Any]) -> float:
    """The catalog's price of all its hosts; 0 for a type that is not in it."""
    resources = job.get("ResourceConfig") or {}
    offers = load_catalog().offers.values()
    prices = (o.usd_per_hour for o in offers if o.provider_type == resources.get("InstanceType"))
    hosts = int(resources.get("InstanceCount") or 1)
    return float(next(prices, 0.0)) * hosts


def _deadline(job: Mapping[str, Any]) -> float:
    """When the platform itself should have ended it, in seconds since 1970."""
    limits = job["StoppingCondition"]
    run = float(limits["MaxRuntimeInSeconds"])
    if job.get("EnableManagedSpotTraining"):  # the run time counts without the waits
        return float(job["CreationTime"].timestamp() + limits["MaxWaitTimeInSeconds"]) + _GRACE_SECONDS
    if job.get("TrainingStartTime"):
        return float(job["TrainingStartTime"].timestamp()) + run + _GRACE_SECONDS
    pending = float(limits.get("MaxPendingTimeInSeconds", 0))
    return float(job["CreationTime"].timestamp()) + pending + run + _GRACE_SECONDS
