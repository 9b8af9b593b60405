"""How a container in a Pod comes to its end: it terminates its Pod or cluster, asks the front door to, or holds.

end = end_of_pod(os.environ, "job-1"); code = run_in_pod(run, end, os.environ) if end else run()

An exited container is started again by the platform and costs on. So the last act in a Pod is to wait for its end, and
to ask for it again; every way out of the container leads there, but one: a machine that is told to end. The Pods of a
cluster end together: node 0 asks at once, the others only when it had the time to.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import httpx

from scripts.backends.runpod_api import BASE_URL, RunpodApi
from scripts.backends.runpod_errors import RunpodError
from scripts.errors import Conflict, InputError, LorryError, Problem, ProviderError

INTERRUPTED = 128 + signal.SIGTERM
"Exit code of a container whose machine was told to end before the job was over."
START_SECONDS = 600.0
FOLLOWERS_WAIT_SECONDS = 1200.0
"So long node 0 has to bring all home (900 s) and to end the cluster, when another node sees no more to do."
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 15.0, 300.0
_IN_A_CLUSTER = 409
_UNFILLED = "{{"


def end_of_pod(environment: Mapping[str, str], job_id: str) -> PodEnd | None:
    """What ends the Pod of this container; None where it is in none. A queue worker's machine is not ours to end."""
    if not environment.get("RUNPOD_POD_ID") or environment.get("RUNPOD_ENDPOINT_ID"):
        return None
    return PodEnd(
        pod_id=environment["RUNPOD_POD_ID"],
        key=environment.get("RUNPOD_API_KEY", ""),
        base_url=environment.get("RUNPOD_API_BASE_URL") or BASE_URL,
        front_door=environment.get("LORRY_FRONT_DOOR", "").rstrip("/"),
        token=environment.get("LORRY_JOB_TOKEN", ""),
        job_id=job_id,
        follows=environment.get("NODES", "1") != "1" and environment.get("NODE_RANK") != "0",
    )


def run_in_pod(
    run: Callable[[], int],
    end: Callable[[], None],
    environment: Mapping[str, str],
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Runs the container, then ends the Pod, whatever happened.

    A store that is silent at the start is asked again for START_SECONDS. Returns when the machine was told to end, or
    when another container is at work on the job; the platform then starts this one again.
    """
    give_up = now() + START_SECONDS
    while True:
        try:
            require_filled(environment)
            if (code := run()) == INTERRUPTED:
                return code
        except Conflict as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except LorryError as error:
            print(error, file=sys.stderr, flush=True)
            code = error.exit_code
            if isinstance(error, ProviderError) and now() < give_up:
                sleep(_FIRST_PAUSE_SECONDS)
                continue
        except Exception:  # whatever it is, a Pod that trains nothing must not cost on
            traceback.print_exc()
            code = 1
        end()
        return code


def require_filled(environment: Mapping[str, str]) -> None:
    """Raises InputError for variables in which Runpod left the reference, because it has no such secret."""
    names = sorted(name for name, value in environment.items() if value.lstrip().startswith(_UNFILLED))
    want = "a secret of that name in Runpod: `lorry secrets --set`"
    if names:
        raise InputError(*(Problem(name, "a secret that was not filled in", want) for name in names))


@dataclass(frozen=True)
class PodEnd:
    """Ends a Pod from inside, or the cluster it is in. `key` may do little else, and perhaps not even end a cluster;
    `front_door` and `token` are the second way. follows: it is a node of several, and not node 0."""

    pod_id: str
    key: str = field(repr=False)
    base_url: str
    front_door: str
    token: str = field(repr=False)
    job_id: str
    follows: bool = False
    sleep: Callable[[float], None] = time.sleep

    def __call__(self) -> None:
        """Asks for the end until it comes; returns only when `sleep` raises."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on nothing is lost by dying
        if self.follows:
            self.sleep(FOLLOWERS_WAIT_SECONDS)
        is_first = True
        for pause in _pauses():
            # Who is still here after a pause was not ended, whatever the answer was: a key may see no cluster at all.
            if not self._through_runpod() or not is_first:
                self._through_front_door()
            is_first = False
            self.sleep(pause)

    def _through_runpod(self) -> bool:
        try:
            with RunpodApi(self.key, self.base_url, sleep=self.sleep) as runpod:
                self._end(runpod)
        except LorryError as error:
            return _say(f"this Pod could not end itself: {error}")
        return True

    def _end(self, runpod: RunpodApi) -> None:
        try:
            runpod.delete("pods", self.pod_id)
        except RunpodError as error:
            cluster = (runpod.read("pods", self.pod_id) or {}).get("cluster") if error.status == _IN_A_CLUSTER else None
            if not cluster:
                raise
            runpod.delete("clusters", str(cluster["id"]))

    def _through_front_door(self) -> bool:
        if not self.front_door or not self.token:
            return _say("there is no front door to ask instead; holding, since a restart would cost as much")
        url, header = f"{self.front_door}/machines/{self.job_id}/end", {"authorization": f"Bearer {self.token}"}
        try:
            answer = httpx.post(url, headers=header, timeout=30.0)
        except httpx.HTTPError as error:
            return _say(f"the front door does not answer: {type(error).__name__}; holding")
        return answer.is_success or _say(f"the front door does not end this Pod: status {answer.status_code}; holding")


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _say(sentence: str) -> bool:
    """Tells the Pod's log, and says that it did not work."""
    print(sentence, file=sys.stderr, flush=True)
    return False
