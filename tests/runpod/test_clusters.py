"""A job on two nodes of Runpod: one Instant Cluster, asked for once, billed whole, ended as one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.backends.runpod_machines import ENDED, Clusters, as_one_pod, cluster_name
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.cost import pod_bill
from scripts.errors import Refused
from scripts.fake_runpod.account import cluster_of
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.host import Host, Mishap
from scripts.fake_runpod.server import Fault, LocalRunpod, serve
from scripts.forgotten import forgotten
from scripts.stop import stop_job
from tests.runpod.cluster_world import ClusterWorld
from tests.runpod.conftest import KEY, OPENAPI, Room
from tests.runpod.test_worlds import ends, folder  # noqa: F401
from tests.runpod.world import EPOCH

CLUSTER = {"id": "c1", "name": "n", "createdAt": "t", "compute": {"gpuTypeId": "G", "gpuCountPerPod": 8, "podCount": 2}}
STATUSES = ("PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR", "TERMINATED")


@pytest.fixture
def cluster(make_room: Callable[..., Room]) -> Room:
    """A job on two nodes that trains for ever; its cluster may be ended by the key of its Pods."""
    room = make_room(steps=100_000)
    room.spec = room.spec.model_copy(update={"nodes": 2})
    room.runpod.cluster_keys_work = True
    return room


def posted(room: Room) -> int:
    return sum(entry[:2] == ("POST", "/v2/clusters") for entry in room.runpod.log)


def bill(room: Room) -> dict[str, float]:
    with RunpodApi(KEY, room.runpod.url) as api:
        charges = pod_bill(api, room.store, room.files())
    assert charges is not None
    return dict(charges.usd)


def test_a_cluster_runs_when_all_its_pods_do_and_has_ended_when_one_has() -> None:
    for statuses in itertools.product(STATUSES, repeat=2):
        whole = as_one_pod(CLUSTER, [{"status": status, "cost": 3.0, "env": {}} for status in statuses])
        assert whole["cost"] == 6.0
        if set(ENDED) & set(statuses):
            assert whole["status"] in ENDED
        else:
            assert (whole["status"] == "RUNNING") == (statuses == ("RUNNING", "RUNNING"))
    assert as_one_pod(CLUSTER, [])["status"] == "PROVISIONING"
    one = {"status": "RUNNING", "cost": 3.0, "startedAt": "2026-11-27T00:00:00Z"}
    assert as_one_pod(CLUSTER, [one])["missing"] == 1
    assert as_one_pod(CLUSTER, [one, {**one, "startedAt": None, "status": "NEW"}])["status"] == "PROVISIONING"
    assert as_one_pod(CLUSTER, [one, {**one, "startedAt": None}])["startedAt"] is None, "one never ran"
    assert as_one_pod(CLUSTER, [one, one])["startedAt"] == one["startedAt"]


def test_two_containers_share_one_job_and_the_cluster_is_stopped_and_billed_whole(cluster: Room) -> None:
    began = time.time()
    handle = cluster.launch().handle
    assert cluster.launch().handle == handle, "launched twice, rented once"
    assert posted(cluster) == 1
    cluster.wait(lambda: (status := cluster.files().status) and status.step >= 2)
    cluster.wait(lambda: "node 1 joins attempt 1" in cluster.said())
    with RunpodApi(KEY, cluster.runpod.url) as api:
        assert api.listed("pods") == [], "the list of Pods leaves them out"
        assert len(api.members(handle["cluster"])) == 2
    (owned,) = cluster.backend.owned()
    assert (owned.job_id, owned.usd_per_hour) == ("job-1", pytest.approx(2 * 1.79))
    assert owned.handle["name"] == "lorry-job-1"
    assert any("attempt 1 starts" in line for line in cluster.backend.logs(handle)), "node 0 speaks"
    stop_job(cluster.store, "job-1", cluster.backend, "user", "enough", time.time())
    assert cluster.backend.observe(handle).phase == "gone"
    assert cluster.pods() == [] == cluster.backend.owned()
    usd = bill(cluster)
    assert list(usd) == [handle["cluster"]]
    assert 0 < usd[handle["cluster"]] <= 2 * 1.79 * (time.time() - began) / 3600
    cluster.backend.stop(handle)  # nothing is there, and no error


def test_a_job_that_ends_takes_its_cluster_with_it(make_room: Callable[..., Room]) -> None:
    room = make_room(steps=4)
    room.spec = room.spec.model_copy(update={"nodes": 2})
    room.runpod.cluster_keys_work = True
    room.launch()
    files = room.finish()
    assert files.container is not None
    assert files.container.ended == "completed", room.said()
    assert room.runpod.account.held["clusters"] == {}


def test_a_pod_that_is_lost_ends_its_cluster_and_another_is_asked_for(cluster: Room) -> None:
    first = cluster.launch().handle
    cluster.wait(lambda: "node 1 joins attempt 1" in cluster.said())
    with cluster.runpod.lock:
        (pod,) = [pod for pod in cluster.runpod.account.held["pods"].values() if pod["cluster"]["rank"] == 1]
        cluster.runpod.account.delete("pods", pod["id"])
    looks: list[float] = []
    backend = RunpodPodBackend(cluster.environment, sleep=looks.append)
    assert backend.observe(first).phase == "waiting", "it may not have come yet"
    seen = backend.observe({**first, "run_by": time.time() - 1})
    assert seen.phase == "gone"
    assert "it has lost 1 of its Pods" in seen.detail
    assert looks, "it was looked at twice"
    second = cluster.launch().handle
    assert second["cluster"] != first["cluster"]
    assert {str(cluster_of(pod)) for pod in cluster.pods()} == {second["cluster"]}
    assert set(bill(cluster)) == {first["cluster"], second["cluster"]}
    cluster.backend.stop(second)


def test_a_cluster_without_pods_is_found_by_its_name_and_held_to_the_quote_later(cluster: Room) -> None:
    handle = cluster.launch().handle
    with cluster.runpod.lock:
        account = cluster.runpod.account
        away = {pod["id"]: account.held["pods"].pop(pod["id"]) for pod in list(account.held["pods"].values())}
    cluster.submissions.clear()
    again = cluster.backend.submit(cluster.spec, cluster.backend.request(cluster.spec))
    assert (again["cluster"], again["usd_per_hour"]) == (handle["cluster"], 2 * 1.79)
    assert cluster.backend.observe(again).phase == "waiting"
    assert cluster.backend.owned() == [], "it costs nothing yet and shows no mark"
    with cluster.runpod.lock:
        account.held["pods"].update(away)
        for pod in away.values():
            pod["hourly"] = 2.5
    seen = cluster.backend.observe(again)
    assert seen.phase == "gone"
    assert "$5.00 an hour instead of $3.58" in seen.detail


def test_a_price_above_the_quote_is_given_back_at_once(cluster: Room) -> None:
    cluster.runpod.account.catalog.surcharge = 1.5
    with pytest.raises(Refused, match=r"the Cluster came at \$5.37 an hour, the quote was \$3.58"):
        cluster.launch()
    assert cluster.pods() == []


def test_the_same_job_id_in_another_store_is_another_job_and_what_lacks_a_mark_is_only_reported(cluster: Room) -> None:
    handle = cluster.launch().handle
    with RunpodApi(KEY, cluster.runpod.url) as api:
        body = {**cluster.backend.request(cluster.spec), "dataCenterIds": ["US-MO-1"]}
        body["compute"] |= {"gpuTypeId": "NVIDIA A100-SXM4-80GB"}  # what there is where its volume is
        foreign = api.create("clusters", {**body, "name": cluster_name("job-1", "s3://other/jobs")})["id"]
        body["env"] = {}
        bare = api.create("clusters", {**body, "name": "lorry-job-9"})["id"]
        assert cluster.launch().handle == handle
        assert {row["id"] for row in api.listed("clusters")} == {handle["cluster"], foreign, bare}
        assert [owned.handle["cluster"] for owned in cluster.backend.owned()] == [handle["cluster"]]
        said = {one.name: one for one in forgotten(Clusters(api).listed(), [], [], {handle["cluster"]})}
        assert f"cluster lorry-job-9 ({bare})" in said
        assert len(said) == 2, "the foreign one too, since its Pods name this store"
        assert all(one.usd_per_month == pytest.approx(2 * 1.79 * 730) for one in said.values())
        for cluster_id in (foreign, bare):
            api.delete("clusters", cluster_id)
    cluster.backend.stop(handle)


def test_a_pod_whose_container_is_started_again_does_not_end_its_cluster(cluster: Room) -> None:
    assert cluster.runpod.host is not None
    cluster.runpod.host.shows_restarts, cluster.runpod.host.starting_seconds = True, 1.0
    handle = cluster.launch().handle
    cluster.wait(lambda: "node 1 joins attempt 1" in cluster.said())
    late = {**handle, "run_by": 0.0}
    with cluster.runpod.lock:
        machines = cluster.runpod.host.machines.values()
        (follower,) = [machine for machine in machines if machine.pod["cluster"]["rank"] == 1]
        assert follower.running is not None
        follower.running.end(at_once=True)
    cluster.wait(lambda: cluster.backend.observe(late).phase == "waiting")
    cluster.wait(lambda: cluster.backend.observe(late).phase == "running")
    cluster.wait(lambda: cluster.said().count("node 1 joins attempt") >= 2)
    cluster.backend.stop(handle)


@pytest.mark.parametrize("status", [403, 500])
def test_a_cluster_whose_pods_cannot_be_seen_is_rented_once_and_recorded(cluster: Room, status: int) -> None:
    cluster.environment["RUNPOD_VOLUME_ID"] = ""  # it may go to several places
    cluster.runpod.faults.append(Fault("GET", "/v2/clusters/[^/]+/pods", status, times=5))
    handle = cluster.launch(sleep=lambda _: None).handle
    assert posted(cluster) == 1
    assert list(cluster.runpod.account.held["clusters"]) == [handle["cluster"]] == cluster.claims().pods()
    cluster.backend.stop(handle)


def test_a_key_without_clusters_hides_no_pod(cluster: Room) -> None:
    cluster.spec = cluster.spec.model_copy(update={"nodes": 1})
    handle = cluster.launch().handle
    cluster.runpod.faults.append(Fault("GET", "/v2/clusters", 403))
    assert [owned.handle["pod"] for owned in cluster.backend.owned()] == [handle["pod"]]
    cluster.backend.stop(handle)


def test_a_cluster_that_never_came_is_not_taken_for_the_job_s(cluster: Room) -> None:
    first = cluster.launch().handle
    with cluster.runpod.lock:
        account = cluster.runpod.account
        for pod in list(account.held["pods"].values()):
            account.delete("pods", pod["id"])
        account.held["clusters"][first["cluster"]]["createdAt"] = "2026-11-01T00:00:00Z"
    second = cluster.launch().handle
    assert second["cluster"] != first["cluster"]
    assert list(account.held["clusters"]) == [second["cluster"]]
    cluster.backend.stop(second)


@pytest.mark.parametrize("mishap", ["stuck", "error"])
def test_a_cluster_of_which_one_pod_does_not_start_is_ended(cluster: Room, mishap: Any) -> None:
    assert cluster.runpod.host is not None
    cluster.runpod.host.mishaps.append(Mishap(mishap, name=r"-1$"))
    handle = cluster.launch().handle
    observe = cluster.backend.observe
    if mishap == "error":
        cluster.wait(lambda: observe(handle).phase == "gone")
    else:
        assert observe(handle).phase == "waiting"
        assert observe({**handle, "run_by": 0.0}).phase == "gone"
    assert cluster.pods() == []


@pytest.fixture
def worlds(folder: Path) -> Iterator[LocalRunpod]:  # noqa: F811
    nobody = ClusterWorld.__new__(ClusterWorld)
    with serve(KEY, OPENAPI, host=Host(folder, nobody), clock=Clock(EPOCH)) as local:
        yield local


def test_a_few_worlds_of_clusters_end_well_or_with_a_reason(worlds: LocalRunpod, folder: Path) -> None:  # noqa: F811
    assert ends(range(4), worlds, folder, ClusterWorld)["completed"] >= 2


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_every_world_of_clusters_ends_well_or_with_a_reason(worlds: LocalRunpod, folder: Path) -> None:  # noqa: F811
    seen = ends(range(4, 304), worlds, folder, ClusterWorld)
    assert min(seen["completed"], seen["failed"]) >= 30, seen
