"""One job, one set of machines: whatever EC2 answers or does not answer, and whoever launches again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scripts.backends.aws import AwsError
from scripts.backends.ec2 import Ec2Backend
from scripts.backends.ec2_claims import InstanceClaims
from scripts.errors import ProviderError, Refused
from scripts.fake_runpod.clock import Clock
from scripts.store import open_store
from tests.ec2.conftest import ec2_spec
from tests.ec2.local_ec2 import BOOT_SECONDS, Account, Fault

DOOR = {"LORRY_PUBLIC_URL": "https://lorry.example", "LORRY_TOKEN_SECRET": "s" * 16}


class Room:
    """One job in a store on this disk, and launchers for it."""

    def __init__(self, account: Account, clock: Clock, store: str, backend_of: Callable[..., Ec2Backend]) -> None:
        self.account, self.clock, self.backend_of = account, clock, backend_of
        self.store = f"{store}/clients/acme/jobs"
        self.spec = ec2_spec(self.store)

    def backend(self, **changes: str) -> Ec2Backend:
        made = self.backend_of(**(DOOR | changes))
        made._bucket = lambda spec: "bucket"  # type: ignore[method-assign]
        return made

    def submit(self, **changes: str) -> dict[str, Any]:
        backend = self.backend(**changes)
        return backend.submit(self.spec, backend.request(self.spec))

    def claims(self) -> InstanceClaims:
        return InstanceClaims(open_store(self.store), self.spec.job_id, self.clock.now)

    def asked(self, action: str) -> list[dict[str, Any]]:
        return [given for name, given in self.account.log if name == action]


@pytest.fixture
def room(account: Account, clock: Clock, store: str, backend_of: Callable[..., Ec2Backend]) -> Room:
    return Room(account, clock, store, backend_of)


def test_a_machine_is_rented_watched_and_ended(room: Room) -> None:
    handle = room.submit()
    (instance,) = handle["instances"]
    assert handle["usd_per_hour"] == pytest.approx(6.88)
    assert f"machines/AROAMACHINE:{instance}/launch.env" in room.account.objects
    backend = room.backend()
    assert backend.observe(handle).phase == "waiting"
    room.clock.jump(BOOT_SECONDS + 1)
    assert backend.observe(handle).phase == "running"
    (owned,) = backend.owned()
    assert (owned.job_id, owned.handle["store"], owned.phase) == ("job-1", room.store, "running")
    assert owned.handle["deadline"] == pytest.approx(room.clock.now() + 3600 - BOOT_SECONDS - 1, abs=2)
    assert list(backend.logs(handle)) == [f"{instance}: hello", f"{instance}: from a machine"]
    assert room.asked("get_console_output") == [{"InstanceId": instance, "Latest": True}]
    backend.stop(handle)
    backend.stop(handle)
    seen = backend.observe(handle)
    assert (seen.phase, seen.was_taken) == ("gone", False)
    room.clock.jump(7200)
    backend.stop(handle)  # EC2 has forgotten it by now
    assert backend.observe(handle).phase == "gone"
    assert backend.owned() == []


def test_launched_twice_it_is_rented_once(room: Room) -> None:
    assert room.submit()["instances"] == room.submit()["instances"]
    assert len(room.account.machines) == 1


@pytest.mark.parametrize("code", ["", "InternalError", "RequestLimitExceeded"])
@pytest.mark.parametrize("carried_out", [True, False])
def test_a_create_without_a_clear_answer_is_asked_again_and_makes_one_machine(
    code: str, carried_out: bool, room: Room
) -> None:
    room.account.faults.append(Fault("run_instances", code, times=2, carried_out=carried_out))
    room.account.hidden_seconds = 30
    handle = room.submit()
    assert list(room.account.machines) == handle["instances"]
    assert len({given["ClientToken"] for given in room.asked("run_instances")}) == 1


@pytest.mark.parametrize("hidden", [5, 30])
def test_a_second_launcher_finds_the_machine_that_is_not_listed_yet(hidden: int, room: Room) -> None:
    room.account.hidden_seconds = hidden
    handle = room.submit()
    assert room.submit() == handle
    room.clock.jump(hidden)
    assert room.submit() == handle
    assert list(room.account.machines) == handle["instances"]


@pytest.mark.parametrize("hidden", [5, 30])
@pytest.mark.parametrize("last", ["", "RequestLimitExceeded"])
def test_a_create_whose_answers_were_all_lost_is_waited_for_by_the_next_launcher(
    hidden: int, last: str, room: Room
) -> None:
    room.account.hidden_seconds = hidden
    room.account.faults += [Fault("run_instances", "", times=2, carried_out=True), Fault("run_instances", last)]
    with pytest.raises(AwsError):
        room.submit()
    handle = room.submit()
    assert list(room.account.machines) == handle["instances"] == room.account.alive()
    assert f"machines/AROAMACHINE:{handle['instances'][0]}/launch.env" in room.account.objects


def test_a_machine_that_ended_at_once_is_followed_by_another(room: Room) -> None:
    first = room.submit()
    room.account.end(first["instances"][0], "Server.SpotInstanceTermination")
    assert room.submit()["instances"] != first["instances"]
    assert len(room.account.alive()) == 1


def test_a_launcher_that_died_after_the_create_is_followed_by_one_that_hands_over(room: Room) -> None:
    backend = room.backend()

    def die(*given: Any) -> None:
        raise KeyboardInterrupt

    backend._hand_over = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        backend.submit(room.spec, backend.request(room.spec))
    assert not room.account.objects
    handle = room.submit()
    assert list(room.account.machines) == handle["instances"]
    assert len(room.account.objects) == 1
    assert room.claims().instances() == handle["instances"]


def test_a_launch_file_that_cannot_be_written_ends_the_machine(room: Room) -> None:
    room.account.faults.append(Fault("put_object", "AccessDenied"))
    with pytest.raises(AwsError, match="AccessDenied"):
        room.submit()
    assert room.account.alive() == []
    newest = room.claims().newest()
    assert newest is not None
    assert "AccessDenied" in newest.given_up


def test_a_full_zone_is_followed_by_the_next_one(room: Room) -> None:
    room.account.no_capacity.add(("p5.4xlarge", "us-east-1a"))
    assert room.submit()["zone"] == "us-east-1b"


def test_no_capacity_anywhere_is_one_sentence_and_costs_nothing(room: Room) -> None:
    room.account.no_capacity |= {("p5.4xlarge", zone) for zone in ("us-east-1a", "us-east-1b")}
    with pytest.raises(ProviderError, match="no place gave the machines: InsufficientInstanceCapacity") as caught:
        room.submit()
    assert "launch it again later, or in another zone or region; asked at 2 places" in str(caught.value)
    assert not room.account.machines


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("UnauthorizedOperation", "take the launcher's policy of Terraform as it is"),
        ("VcpuLimitExceeded", "ask for a higher quota"),
        ("InvalidLaunchTemplateId.NotFound", "run `terraform apply` on the AWS room"),
    ],
)
def test_what_aws_refuses_is_a_sentence_with_the_next_step(code: str, sentence: str, room: Room) -> None:
    room.account.faults.append(Fault("run_instances", code, times=9))
    with pytest.raises(ProviderError, match=sentence):
        room.submit()
    assert not room.account.machines


def test_spot_is_asked_for_at_the_price_of_the_quote_at_most(room: Room) -> None:
    room.account.spot_usd = {("p5.4xlarge", "us-east-1a"): 2.5, ("p5.4xlarge", "us-east-1b"): 2.0}
    handle = room.submit(LORRY_EC2_MARKET="spot")
    assert (handle["zone"], handle["usd_per_hour"]) == ("us-east-1b", 2.0)
    (asked,) = room.asked("run_instances")
    assert asked["InstanceMarketOptions"]["SpotOptions"]["MaxPrice"] == "6.8800"


def test_spot_pools_are_scored_in_this_region_and_one_without_a_score_comes_after_a_good_one(room: Room) -> None:
    room.account.spot_usd = {("p5.4xlarge", "us-east-1a"): 2.5, ("p5.4xlarge", "us-east-1b"): 2.0}
    room.account.scores = {"use1-az1": 9}
    assert room.submit(LORRY_EC2_MARKET="spot")["zone"] == "us-east-1a"
    assert {tuple(asked["RegionNames"]) for asked in room.asked("get_spot_placement_scores")} == {("us-east-1",)}


def test_a_spot_machine_that_is_taken_back_says_so_and_the_next_launch_rents_another(room: Room) -> None:
    room.account.spot_usd = {("p5.4xlarge", "us-east-1a"): 2.5}
    handle = room.submit(LORRY_EC2_MARKET="spot")
    (instance,) = handle["instances"]
    room.account.end(instance, "Server.SpotInstanceTermination")
    seen = room.backend().observe(handle)
    assert (seen.phase, seen.was_taken) == ("gone", True)
    again = room.submit(LORRY_EC2_MARKET="spot")
    assert again["instances"] != handle["instances"]
    assert room.claims().instances() == [instance, *again["instances"]]


def test_two_nodes_come_together_and_end_together(room: Room) -> None:
    room.spec = ec2_spec(room.store, offer="ec2-p5-8", gpus=8, nodes=2, cap_usd=300.0)
    handle = room.submit()
    assert len(handle["instances"]) == 2
    assert handle["usd_per_hour"] == pytest.approx(2 * 55.04)
    told = [room.account.objects[f"machines/AROAMACHINE:{i}/launch.env"].decode() for i in handle["instances"]]
    assert [f"NODE_RANK={n}\n" in text for n, text in enumerate(told)] == [True, True]
    (owned,) = room.backend().owned()
    assert owned.handle["instances"] == handle["instances"]
    room.clock.jump(BOOT_SECONDS + 1)
    room.account.end(handle["instances"][1], "Server.InternalError")
    seen = room.backend().observe(handle)
    assert (seen.phase, seen.was_taken) == ("gone", True)
    assert room.account.alive() == []  # the other one costs no more


def test_two_nodes_of_which_one_is_listed_late_are_left_alone_and_found_again(room: Room) -> None:
    room.spec = ec2_spec(room.store, offer="ec2-p5-8", gpus=8, nodes=2, cap_usd=300.0)
    room.account.late_seconds = 60
    handle = room.submit()
    assert room.submit() == handle
    assert room.backend().observe(handle).phase == "waiting"
    room.clock.jump(40)
    assert room.backend().observe(handle).phase == "waiting"
    room.clock.jump(40)
    assert room.backend().observe(handle).phase == "running"
    assert room.account.alive() == handle["instances"]


def test_of_two_nodes_the_one_that_is_never_listed_is_ended_too(room: Room) -> None:
    room.spec = ec2_spec(room.store, offer="ec2-p5-8", gpus=8, nodes=2, cap_usd=300.0)
    room.account.late_seconds = 3600
    handle = room.submit()
    room.clock.jump(121)
    assert room.backend().observe(handle).phase == "gone"
    assert room.account.alive() == []


def test_a_machine_of_another_store_with_the_same_job_is_left_alone(room: Room) -> None:
    first = room.submit()
    room.store = room.store.replace("acme", "other")
    room.spec = ec2_spec(room.store)
    second = room.submit()
    assert sorted(room.account.alive()) == sorted(first["instances"] + second["instances"])


def test_what_is_sold_now_is_told_with_its_price(room: Room) -> None:
    offers = {offer.offer: offer for offer in room.backend().offers()}
    assert offers["ec2-p5-8"].available
    assert not offers["ec2-p6-b200-8"].available
    room.account.spot_usd = {("p5.48xlarge", "us-east-1b"): 20.0}
    spot = {offer.offer: offer for offer in room.backend(LORRY_EC2_MARKET="spot").offers()}
    assert (spot["ec2-p5-8"].available, spot["ec2-p5-8"].usd_per_hour) == (True, 20.0)
    assert not spot["ec2-p5en-8"].available


def test_a_type_nobody_offers_here_is_refused_before_anything_is_rented(room: Room) -> None:
    room.account.offered.clear()
    with pytest.raises(Refused, match=r"p5.4xlarge is not offered in us-east-1a, us-east-1b; another region"):
        room.submit()
    assert room.asked("run_instances") == []


def test_session_keys_are_of_this_job_alone_and_are_asked_for_before_a_machine(
    account: Account, store: str, backend_of: Callable[..., Ec2Backend]
) -> None:
    spec = ec2_spec(store="s3://bucket/clients/acme/jobs")
    backend = backend_of()
    keys = backend._keys(spec, 1_800_003_600)
    assert keys["AWS_SESSION_TOKEN"] == "CANARY-token"
    (asked,) = [given for name, given in account.log if name == "assume_role"]
    assert "clients/acme/jobs/job-1/*" in asked["Policy"]
    assert asked["DurationSeconds"] == 4500


def test_a_workflow_of_github_gets_keys_that_last_by_its_own_identity(
    account: Account, backend_of: Callable[..., Ec2Backend], github: dict[str, str]
) -> None:
    spec = ec2_spec(store="s3://bucket/jobs", deadline_seconds=11 * 3600)
    keys = backend_of(**github)._keys(spec, 1_800_003_600)
    assert keys["AWS_SESSION_TOKEN"] == "CANARY-token"
    ((action, asked),) = [(name, given) for name, given in account.log if name.startswith("assume_role")]
    assert (action, asked["WebIdentityToken"]) == ("assume_role_with_web_identity", "CANARY-identity")
    assert "/jobs/job-1/*" in asked["Policy"]
    assert asked["DurationSeconds"] == 11 * 3600 + 900, "a role that takes a role would get one hour"


def test_a_workflow_that_github_does_not_know_gets_no_keys_and_a_sentence(
    backend_of: Callable[..., Ec2Backend], github: dict[str, str]
) -> None:
    backend = backend_of(**github | {"ACTIONS_ID_TOKEN_REQUEST_TOKEN": "another"})
    with pytest.raises(ProviderError) as caught:
        backend._keys(ec2_spec(store="s3://bucket/jobs"), 1_800_003_600)
    assert str(caught.value) == (
        "credentials: GitHub did not say who this workflow is (HTTPStatusError); try again; the job needs "
        "`id-token: write`"
    )
