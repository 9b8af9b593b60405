"""The local AWS: its patches are still needed, its refusals are clear, and placement groups and reservations live."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError

from tests.infra import patched_moto
from tests.infra.conftest import client


def test_every_added_action_is_still_missing_upstream():
    """Fails when moto gains one: then the patch must go."""
    assert {cls.__name__: names for cls, names in patched_moto.GAPS_FOUND.items() if names} == {}


@pytest.mark.parametrize(
    ("service", "call"),
    [
        ("ec2", "describe_capacity_block_offerings"),
        ("sagemaker", "list_training_plans"),
        ("iam", "simulate_custom_policy"),
    ],
)
def test_an_action_nobody_wrote_is_refused_at_once_in_the_services_own_words(service, call, aws_fake):
    arguments = {
        "describe_capacity_block_offerings": {"CapacityDurationHours": 24},
        "simulate_custom_policy": {"PolicyInputList": ["{}"], "ActionNames": ["s3:GetObject"]},
    }
    with pytest.raises(ClientError) as caught:
        getattr(client(aws_fake, service), call)(**arguments.get(call, {}))
    assert caught.value.response["Error"]["Code"] == "NotImplemented"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 501


def test_placement_groups_and_reservations_live_and_die(aws_fake):
    ec2 = client(aws_fake, "ec2")
    ec2.create_placement_group(GroupName="g", Strategy="cluster")
    with pytest.raises(ClientError, match="Duplicate"):
        ec2.create_placement_group(GroupName="g", Strategy="cluster")
    assert ec2.describe_placement_groups(GroupNames=["g"])["PlacementGroups"][0]["State"] == "available"
    ec2.delete_placement_group(GroupName="g")
    with pytest.raises(ClientError, match="Unknown"):
        ec2.describe_placement_groups(GroupNames=["g"])

    made = ec2.create_capacity_reservation(
        InstanceType="p5.48xlarge", InstancePlatform="Linux/UNIX", AvailabilityZone="us-east-1a", InstanceCount=1
    )["CapacityReservation"]
    ec2.modify_capacity_reservation(CapacityReservationId=made["CapacityReservationId"], InstanceCount=2)
    ec2.cancel_capacity_reservation(CapacityReservationId=made["CapacityReservationId"])
    kept = ec2.describe_capacity_reservations(CapacityReservationIds=[made["CapacityReservationId"]])
    assert (kept["CapacityReservations"][0]["State"], kept["CapacityReservations"][0]["TotalInstanceCount"]) == (
        "cancelled",
        2,
    )


def test_a_reset_forgets_the_added_stores_too(aws_fake):
    client(aws_fake, "ec2").create_placement_group(GroupName="g", Strategy="cluster")
    patched_moto.reset(aws_fake)
    assert client(aws_fake, "ec2").describe_placement_groups()["PlacementGroups"] == []
