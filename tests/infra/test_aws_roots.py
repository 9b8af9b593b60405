"""The AWS roots as committed, from init to destroy, against the local AWS, their state kept there under a lock file."""

from __future__ import annotations

import pytest

from scripts.backends.ec2_places import Place
from scripts.backends.ec2_request import ec2_request, placed, read_ec2_settings
from scripts.backends.sagemaker_request import read_sagemaker_settings, training_request
from scripts.env import web_settings
from scripts.terraform import Terraform, TerraformError, read_outputs
from tests.ec2.conftest import ec2_spec
from tests.infra.conftest import STATE_BUCKET, client, cpu_seconds_of_children, init
from tests.sagemaker.conftest import SETTINGS as SAGEMAKER
from tests.sagemaker.conftest import spec_of as sagemaker_spec

ACCOUNT = "123456789012"


def variables(url, **changes):
    """What a user gives to an AWS root; the network is the default VPC of the local AWS."""
    ec2 = client(url, "ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    subnets = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    given = {
        "gateway_principals": [f"arn:aws:iam::{ACCOUNT}:role/front-door"],
        "reader_principals": [f"arn:aws:iam::{ACCOUNT}:user/serving"],
        "github": {"owner": "acme", "name": "lorry", "owner_id": "11", "repository_id": "22"},
        "network": {"vpc_id": vpc, "subnet_ids": [subnets[0]["SubnetId"]]},
        "trainer_digest": "sha256:" + "a" * 64,
        "budget": {"monthly_limit_usd": 500, "alert_emails": ["ops@example.com"], "billing_alarm_usd": 400},
    }
    return given | changes


def private_network(url):
    """Two subnets of the local AWS in two zones, with the services of AWS inside them."""
    ec2 = client(url, "ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    inside = [{"Name": "vpc-id", "Values": [vpc]}]
    subnets = {row["AvailabilityZone"]: row["SubnetId"] for row in ec2.describe_subnets(Filters=inside)["Subnets"]}
    routes = [ec2.describe_route_tables(Filters=inside)["RouteTables"][0]["RouteTableId"]]
    return {"vpc_id": vpc, "subnet_ids": sorted(subnets.values())[:2], "endpoints": {"route_table_ids": routes}}


def machines_stay_inside(url, room, network):
    """Asserts that jobs of both backends start in these subnets, by the settings that the room gives, and that each of
    the endpoints there lets their two groups in and nobody else."""
    settings = web_settings(room).settings | {"LORRY_IMAGE": SAGEMAKER["LORRY_IMAGE"]}
    asked = training_request(sagemaker_spec("job-1", room["store_url"]), read_sagemaker_settings(settings))["VpcConfig"]
    assert asked == room["sagemaker_vpc_config"]
    assert sorted(asked["Subnets"]) == network["subnet_ids"]
    spec, chosen = ec2_spec(room["store_url"], deadline_seconds=3600), read_ec2_settings(settings)
    place = Place("ec2-p5-4xlarge-1", "p5.4xlarge", network["subnet_ids"][1], "us-east-1b", 6.88)
    assert sorted(chosen.subnets) == network["subnet_ids"]
    (card,) = placed(ec2_request(spec, chosen), spec, chosen, place, 0, "token")["NetworkInterfaces"]
    assert (card["SubnetId"], card["Groups"]) == (place.subnet, [room["ec2_security_group_id"]])

    ec2 = client(url, "ec2")
    found = {row["ServiceName"].partition("us-east-1.")[2]: row for row in ec2.describe_vpc_endpoints()["VpcEndpoints"]}
    assert set(found) == {"s3", "ecr.api", "ecr.dkr", "logs", "sts"}
    assert found.pop("s3")["RouteTableIds"] == network["endpoints"]["route_table_ids"]
    (group,) = {tuple(one["GroupId"] for one in row["Groups"]) for row in found.values()}
    assert all(sorted(row["SubnetIds"]) == network["subnet_ids"] for row in found.values())
    assert all(row["PrivateDnsEnabled"] for row in found.values())
    rules = ec2.describe_security_group_rules(Filters=[{"Name": "group-id", "Values": list(group)}])
    let_in = {r["ReferencedGroupInfo"]["GroupId"] for r in rules["SecurityGroupRules"] if not r["IsEgress"]}
    assert let_in == {*asked["SecurityGroupIds"], *card["Groups"]}


@pytest.fixture
def aws_tf(infra_copy, base_env, aws_provider, aws_fake):
    """aws_tf("live/dev/aws", change=value): a root against the local AWS."""

    def make(root, **changes):
        return Terraform(infra_copy / root, {**base_env, "AWS_ENDPOINT_URL": aws_fake}, variables(aws_fake, **changes))

    return make


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_an_aws_room_is_made_kept_changed_and_removed(environment, aws_tf, aws_fake):
    """`dev` with its defaults, `prod` in private subnets with VPC endpoints."""
    began = cpu_seconds_of_children()
    given = {"network": private_network(aws_fake)} if environment == "prod" else {}
    root = aws_tf(f"live/{environment}/aws", **given)
    init(root, lockfile="readonly")
    root.validate()

    assert root.plan()
    root.apply()
    assert not root.plan(), "a second plan must find nothing to do"

    room = read_outputs(root.root, root.env)
    s3, bucket = client(aws_fake, "s3"), room["store_url"].removeprefix("s3://").removesuffix("/jobs")
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    rule = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"] == room["kms_key_arn"]
    template = client(aws_fake, "ec2").describe_launch_template_versions(
        LaunchTemplateId=room["ec2_launch_template_id"], Versions=["$Latest"]
    )["LaunchTemplateVersions"][0]["LaunchTemplateData"]
    assert template["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert template["MetadataOptions"]["HttpTokens"] == "required"

    if given:
        machines_stay_inside(aws_fake, room, given["network"])

    changed = aws_tf(f"live/{environment}/aws", budget=root.variables["budget"] | {"monthly_limit_usd": 900}, **given)
    assert changed.plan()
    changed.apply()
    budget = client(aws_fake, "budgets").describe_budget(AccountId=ACCOUNT, BudgetName=f"lorry-{environment}-month")
    assert float(budget["Budget"]["BudgetLimit"]["Amount"]) == 900

    changed.destroy()
    assert [b["Name"] for b in s3.list_buckets()["Buckets"]] == [STATE_BUCKET]
    assert client(aws_fake, "iam").list_roles()["Roles"] == []
    ec2 = client(aws_fake, "ec2")
    assert ec2.describe_launch_templates()["LaunchTemplates"] == []
    assert [row["State"] for row in ec2.describe_vpc_endpoints()["VpcEndpoints"] if row["State"] != "deleted"] == []
    assert {row["GroupName"] for row in ec2.describe_security_groups()["SecurityGroups"]} == {"default"}
    assert client(aws_fake, "ecr").describe_repositories()["repositories"] == []
    # Of the 150 s that it may take on two idle cores the provider itself waits 67: 55 for the bucket's lifecycle, 12
    # for the key.
    assert cpu_seconds_of_children() - began < 2 * (150 - 67)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_taken_bucket_name_says_so_and_a_second_run_goes_on(aws_tf, aws_fake):
    other = client(aws_fake, "sts").assume_role(RoleArn="arn:aws:iam::210987654321:role/x", RoleSessionName="other")
    keys = other["Credentials"]
    theirs = client(aws_fake, "s3", keys["AccessKeyId"], keys["SecretAccessKey"], keys["SessionToken"])
    theirs.create_bucket(Bucket="acme-adapters")
    root = aws_tf("live/dev/aws", bucket_name="acme-adapters")
    init(root)
    root.plan()
    with pytest.raises(TerraformError) as caught:
        root.apply()
    said = str(caught.value)
    assert "BucketAlreadyExists" in said
    assert said.endswith("bucket names are shared by all accounts: choose another name")
    assert len(said.splitlines()) == 1

    free = aws_tf("live/dev/aws", bucket_name="acme-adapters-2")
    assert free.plan()
    actions = {c["address"]: c["change"]["actions"] for c in free.show(plan=True)["resource_changes"]}
    assert actions["module.room.module.store.aws_s3_bucket.this"] == ["create"]
    assert actions["module.room.module.store.aws_kms_key.this"] == ["no-op"], "what was made is kept"


def test_missing_aws_credentials_say_what_to_do(infra_copy, base_env, aws_fake):
    bare = {name: value for name, value in base_env.items() if not name.startswith("AWS_")}
    root = Terraform(
        infra_copy / "live/dev/aws",
        {**bare, "AWS_ENDPOINT_URL": aws_fake, "AWS_EC2_METADATA_DISABLED": "true"},
    )
    with pytest.raises(TerraformError, match=r"No valid credential sources found.*sign in to AWS"):
        init(root)
