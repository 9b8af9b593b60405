"""A SageMaker on this machine: training jobs that live as the service says, and whose containers are real processes.

account = SageMaker(folder, ProcessRunner(...))     # over HTTP: wire.py

It differs from moto where moto does not behave: names are given away once, a job takes time, both statuses change,
limits and stops are kept, what the request says is kept, containers run, logs and billed seconds are there. Requests
are held to the published model of the service, patterns and lengths included, which botocore itself does not check.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.processes import Runner, Running
from tests.sagemaker.wire import Broken, Refusal, require_model

Json = dict[str, Any]
ACCOUNT, REGION = "123456789012", "us-east-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/lorry-sagemaker"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/lorry/trainer@sha256:" + "a" * 64
ENDED = ("Completed", "Failed", "Stopped")
GRACE_SECONDS = 120.0
SPOT_SHARE = 0.4
"Of the on-demand price; billed seconds are that much fewer."


@dataclass
class Pace:
    """Seconds of each part of a training job's life but the training."""

    launching: float = 60.0
    downloading: float = 30.0
    uploading: float = 15.0
    back: float = 240.0
    "Until spot has a machine again."


@dataclass
class Mishap:
    """What befalls the next `times` training jobs.

    no_capacity: it fails without a machine. internal: the platform loses it. interrupt: spot wants the machine back.
    """

    kind: str
    after_seconds: float = 0.0
    times: int = 1


@dataclass
class Fault:
    """What befalls the next `times` requests. status 0: the connection breaks, before or after it was carried out."""

    action: str
    status: int
    code: str = ""
    times: int = 1
    carried_out: bool = False


@dataclass
class Job:
    """One training job. `at`: since when the secondary status is what it is."""

    body: Json
    created_at: float
    at: float
    mishap: Mishap | None
    status: str = "InProgress"
    secondary: str = "Starting"
    failure: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    on_seconds: float = 0.0
    "How long it had a machine before this one."
    on_since: float | None = None
    stop: str = ""
    told_at: float | None = None
    running: list[Running] = field(default_factory=list)
    "The containers of its hosts; empty where it has none."
    starts: int = 0
    transitions: list[Json] = field(default_factory=list)
    lines: list[tuple[int, float, str]] = field(default_factory=list)
    "Host from 1, time, what it printed."

    @property
    def name(self) -> str:
        return str(self.body["TrainingJobName"])

    @property
    def is_spot(self) -> bool:
        return bool(self.body.get("EnableManagedSpotTraining"))

    @property
    def keep_alive_seconds(self) -> float:
        return float(self.body["ResourceConfig"].get("KeepAlivePeriodInSeconds") or 0)

    def warm_seconds(self, now: float) -> float | None:
        """For how long its machine was kept after its end; None where it is not to be kept."""
        if self.status != "Completed" or self.ended_at is None or not self.keep_alive_seconds:
            return None
        return min(now - self.ended_at, self.keep_alive_seconds)

    def used(self, now: float) -> float:
        """Seconds of machine time so far."""
        return self.on_seconds + (now - self.on_since if self.on_since is not None else 0.0)


class SageMaker:
    """One account in one region.

    bucket: copies what lies below an S3 URL into a folder, if one is given, and says whether there was any.
    """

    def __init__(
        self,
        folder: Path,
        runner: Runner,
        *,
        clock: Clock | None = None,
        pace: Pace | None = None,
        bucket: Callable[[str, Path | None], bool] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.runner, self.clock, self.pace = folder, runner, clock or Clock(), pace or Pace()
        self.bucket = bucket or (lambda url, into: True)
        self.variables = variables or {}
        "What the platform gives a container beside what was asked: the keys of the role."
        self.jobs: dict[str, Job] = {}
        self.quotas: dict[str, int] = {}
        self.roles = {ROLE}
        self.mishaps: list[Mishap] = []
        self.faults: list[Fault] = []
        self.log: list[tuple[str, Json]] = []
        self.lock = threading.RLock()

    # -- requests ---------------------------------------------------------------------------------------------------

    def answer(self, target: str, body: Json) -> tuple[int, Json]:
        """Status and body of the answer to one request. target: the header X-Amz-Target. Raises Broken."""
        action = target.rpartition(".")[2]
        with self.lock:
            self.advance()
            self.log.append((action, body))
            fault = next((f for f in self.faults if f.times > 0 and re.fullmatch(f.action, action)), None)
            if fault is not None:
                fault.times -= 1
                if fault.carried_out:
                    self._carry_out(action, body)
                if not fault.status:
                    raise Broken
                return fault.status, {"__type": fault.code, "message": "a fault of the test"}
            return self._carry_out(action, body)

    def _carry_out(self, action: str, body: Json) -> tuple[int, Json]:
        try:
            return 200, getattr(self, "do_" + re.sub(r"(?<!^)(?=[A-Z])", "_", action).lower())(body)
        except Refusal as refusal:
            return 400, {"__type": refusal.code, "message": str(refusal)}

    def do_create_training_job(self, body: Json) -> Json:
        require_model(body)
        if body["TrainingJobName"] in self.jobs:
            arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{body['TrainingJobName']}"
            raise Refusal("ResourceInUse", f"Training job names must be unique within an AWS account; {arn} exists")
        self._require_sense(body)
        kind, count = body["ResourceConfig"]["InstanceType"], body["ResourceConfig"]["InstanceCount"]
        alive = [job for job in self.jobs.values() if job.status not in ENDED]
        used = sum(
            j.body["ResourceConfig"]["InstanceCount"] for j in alive if j.body["ResourceConfig"]["InstanceType"] == kind
        )
        if used + count > self.quotas.get(kind, 99):
            said = f"The account-level service limit '{kind} for training job usage' is {self.quotas[kind]} Instances"
            raise Refusal("ResourceLimitExceeded", said)
        now = self.clock.now()
        job = Job(body, now, now, next((m for m in self.mishaps if m.times > 0), None))
        if job.mishap is not None:
            job.mishap.times -= 1
        self.jobs[job.name] = job
        self._turn(job, "Starting", now)
        return {"TrainingJobArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{job.name}"}

    def do_describe_training_job(self, body: Json) -> Json:
        job = self._job(body)
        now = self.clock.now()
        shown = {
            **{k: v for k, v in job.body.items() if k != "Tags"},
            "TrainingJobArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{job.name}",
            "TrainingJobStatus": job.status,
            "SecondaryStatus": job.secondary,
            "SecondaryStatusTransitions": job.transitions,
            "CreationTime": job.created_at,
            "LastModifiedTime": job.at,
        }
        if job.started_at is not None:
            used = job.used(now)
            shown["TrainingStartTime"] = job.started_at
            shown["TrainingTimeInSeconds"] = int(used)
            shown["BillableTimeInSeconds"] = int(used * SPOT_SHARE if job.is_spot else used)
        if job.ended_at is not None:
            shown["TrainingEndTime"] = job.ended_at
        if (warm := job.warm_seconds(now)) is not None:
            shown["WarmPoolStatus"] = {
                "Status": self._warmth(job) or "Terminated",
                "ResourceRetainedBillableTimeInSeconds": int(warm),
            }
        if job.failure:
            shown["FailureReason"] = job.failure[:1024]
        return shown

    def do_stop_training_job(self, body: Json) -> Json:
        job = self._job(body)
        if job.status in (*ENDED, "Stopping"):
            said = f"The request was rejected because the training job is in status {job.status}"
            raise Refusal("ValidationException", said)
        job.status = "Stopping"
        job.stop = job.stop or "Stopped"
        self._turn(job, "Stopping", self.clock.now())
        return {}

    def do_list_training_jobs(self, body: Json) -> Json:
        found = [
            {
                "TrainingJobName": job.name,
                "TrainingJobArn": "arn",
                "CreationTime": job.created_at,
                "TrainingJobStatus": job.status,
            }
            for job in sorted(self.jobs.values(), key=lambda job: -job.created_at)
            if body.get("NameContains", "") in job.name
            and body.get("StatusEquals") in (None, job.status)
            and body.get("WarmPoolStatusEquals") in (None, self._warmth(job))
        ]
        start, most = int(body.get("NextToken") or 0), int(body.get("MaxResults") or 10)
        page: Json = {"TrainingJobSummaries": found[start : start + most]}
        return page | ({"NextToken": str(start + most)} if start + most < len(found) else {})

    def do_describe_log_streams(self, body: Json) -> Json:
        hosts = {(job.name, host, int(job.created_at)) for job in self.jobs.values() for host, _, _ in job.lines}
        if not hosts:
            raise Refusal("ResourceNotFoundException", "The specified log group does not exist.")
        names = [f"{name}/algo-{host}-{at}" for name, host, at in sorted(hosts)]
        prefix = body.get("logStreamNamePrefix", "")
        return {"logStreams": [{"logStreamName": name} for name in names if name.startswith(prefix)]}

    def do_get_log_events(self, body: Json) -> Json:
        """Two events a page, so that whoever reads must turn it."""
        name, _, stream = body["logStreamName"].partition("/")
        lines = [(at, line) for host, at, line in self.jobs[name].lines if stream.startswith(f"algo-{host}-")]
        start = int((body.get("nextToken") or "f/0").rpartition("/")[2])
        page = lines[start : start + 2]
        events = [{"timestamp": int(at * 1000), "message": line, "ingestionTime": int(at * 1000)} for at, line in page]
        return {"events": events, "nextForwardToken": f"f/{start + len(page)}", "nextBackwardToken": "b/0"}

    def _warmth(self, job: Job) -> str | None:
        warm = job.warm_seconds(self.clock.now())
        return "Available" if warm is not None and warm < job.keep_alive_seconds else None

    def _job(self, body: Json) -> Job:
        if body["TrainingJobName"] not in self.jobs:
            raise Refusal("ValidationException", "Requested resource not found.")
        return self.jobs[body["TrainingJobName"]]

    def _require_sense(self, body: Json) -> None:
        """What the service checks beyond the model of the request."""
        if body["RoleArn"] not in self.roles:
            raise Refusal("ValidationException", f"Could not assume role {body['RoleArn']}. Please ensure it exists")
        limits, spot = body["StoppingCondition"], body.get("EnableManagedSpotTraining")
        if spot and limits.get("MaxWaitTimeInSeconds", 0) < limits["MaxRuntimeInSeconds"]:
            raise Refusal("ValidationException", "MaxWaitTimeInSeconds must be equal to or greater than MaxRuntime")
        if spot and body["ResourceConfig"].get("KeepAlivePeriodInSeconds"):
            raise Refusal("ValidationException", "Warm pools are not supported for managed spot training")
        if "VolumeKmsKeyId" in body["ResourceConfig"]:
            raise Refusal("ValidationException", "VolumeKmsKeyId is not supported for instances with local storage")
        for channel in body.get("InputDataConfig", ()):
            url = channel["DataSource"]["S3DataSource"]["S3Uri"]
            if not self.bucket(url, None):
                raise Refusal("ValidationException", f"No S3 objects found under S3 URL {url!r} given in input data")

    # -- lives ------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Brings every training job to where it is by now."""
        with self.lock:
            for job in self.jobs.values():
                while job.status not in ENDED and self._step(job, self.clock.now()):
                    continue

    def close(self) -> None:
        for job in self.jobs.values():
            _end(job, at_once=True)

    def _step(self, job: Job, now: float) -> bool:
        """Whether something changed."""
        waited = now - job.at
        limits = job.body["StoppingCondition"]
        if job.is_spot and not job.stop and now - job.created_at > limits["MaxWaitTimeInSeconds"]:
            job.stop = "MaxWaitTimeExceeded"
            return True
        if job.stop and not job.running:
            return self._finish(job, "Stopped", job.stop, now)
        match job.secondary:
            case "Starting" | "Interrupted":
                return self._launch(job, waited, now)
            case "Downloading":
                return waited >= self.pace.downloading and self._train(job, now)
            case "Training" | "Stopping":
                return self._watch(job, now)
            case "Uploading":
                return waited >= self.pace.uploading and self._finish(job, "Completed", "Completed", now)
        raise AssertionError(job.secondary)

    def _launch(self, job: Job, waited: float, now: float) -> bool:
        if waited < (self.pace.back if job.secondary == "Interrupted" else self.pace.launching):
            return False
        if job.mishap is not None and job.mishap.kind == "no_capacity":
            job.failure = "CapacityError: Unable to provision requested ML compute capacity. Please retry using another"
            return self._finish(job, "Failed", "Failed", now)
        job.started_at = job.started_at or now
        job.on_since = now
        self._turn(job, "Downloading", now)
        return True

    def _train(self, job: Job, now: float) -> bool:
        count = job.body["ResourceConfig"]["InstanceCount"]
        job.running = [self._start(job, host + 1, count) for host in range(count)]
        job.starts += 1
        self._turn(job, "Training", now)
        return True

    def _start(self, job: Job, host: int, count: int) -> Running:
        """The container of one host, with the platform's files below its own /opt/ml."""
        spec, base = job.body["AlgorithmSpecification"], self._base(job, job.starts, host)
        for channel in job.body.get("InputDataConfig", ()):
            url = channel["DataSource"]["S3DataSource"]["S3Uri"]
            self.bucket(url, base / "input" / "data" / channel["ChannelName"])
        hosts = [f"algo-{n + 1}" for n in range(count)]
        told = {"current_host": f"algo-{host}", "hosts": hosts, "network_interface_name": "eth0"}
        (base / "input" / "config").mkdir(parents=True)
        (base / "input" / "config" / "resourceconfig.json").write_text(json.dumps(told))
        if (mirror := self.folder / job.name / "mirror").is_dir():
            shutil.copytree(mirror, base / "checkpoints")
        env = {**self.variables, **job.body.get("Environment", {}), "SAGEMAKER_BASE_DIR": str(base)}
        env |= {"TRAINING_JOB_NAME": job.name, "AWS_REGION": REGION}
        command = [*spec["ContainerEntrypoint"], *spec.get("ContainerArguments", ["train"])]
        return self.runner.start(job.name, command, env, base.parent.parent)

    def _base(self, job: Job, start: int, host: int) -> Path:
        return self.folder / job.name / f"{start}-algo-{host}" / "opt" / "ml"

    def _watch(self, job: Job, now: float) -> bool:
        """Containers that run: their ends, their limits, and whoever wants them to end."""
        codes = [running.exit_code() for running in job.running]
        for host, running in enumerate(job.running, 1):
            job.lines += [(host, now, line) for line in running.lines()]
        if None not in codes:
            return self._left(job, next((code for code in codes if code), 0) or 0, now)
        if any(codes) and job.told_at is None:  # one host that fails ends the job
            job.told_at, job.stop = now, job.stop or "host failed"
            _end(job)
        due = job.mishap if job.mishap is not None and now - (job.on_since or now) >= job.mishap.after_seconds else None
        if due is not None and due.kind == "internal":
            _end(job, at_once=True)
            job.running = []
            job.failure = "InternalServerError: We encountered an internal error. Please try again."
            return self._finish(job, "Failed", "Failed", now)
        if job.used(now) > job.body["StoppingCondition"]["MaxRuntimeInSeconds"] and not job.stop:
            job.stop = "MaxRuntimeExceeded"
        if job.told_at is None and (job.stop or (due is not None and due.kind == "interrupt")):
            job.told_at = now
            _end(job)
            return True
        if job.told_at is not None and now - job.told_at > GRACE_SECONDS:
            _end(job, at_once=True)
            return True
        return False

    def _left(self, job: Job, code: int, now: float) -> bool:
        """All containers have ended, by themselves or because they were told."""
        base = self._base(job, job.starts - 1, 1)
        if (base / "checkpoints").is_dir():
            shutil.copytree(base / "checkpoints", self.folder / job.name / "mirror", dirs_exist_ok=True)
        interrupted = job.told_at is not None and not job.stop
        job.running, job.told_at = [], None
        if job.stop and job.stop != "host failed":
            return self._finish(job, "Stopped", job.stop, now)
        if interrupted:
            job.on_seconds, job.on_since, job.mishap = job.used(now), None, None
            self._turn(job, "Interrupted", now)
            return True
        if code:
            failure = base / "output" / "failure"
            said = failure.read_text() if failure.is_file() else ""
            job.failure = f"AlgorithmError: {said}, exit code: {code}"
            return self._finish(job, "Failed", "Failed", now)
        self._turn(job, "Uploading", now)
        return True

    def _finish(self, job: Job, status: str, secondary: str, now: float) -> bool:
        job.on_seconds, job.on_since = job.used(now), None
        job.status, job.ended_at = status, now
        self._turn(job, secondary, now)
        return True

    def _turn(self, job: Job, secondary: str, now: float) -> None:
        job.secondary, job.at = secondary, now
        job.transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": secondary})


def _end(job: Job, *, at_once: bool = False) -> None:
    for running in job.running:
        running.end(at_once=at_once)
