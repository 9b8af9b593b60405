mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix  = "lorry-dev"
  region  = "us-east-1"
  network = { vpc_id = "vpc-1", subnet_ids = ["subnet-1"] }
  image   = { reference = "123456789012.dkr.ecr.us-east-1.amazonaws.com/lorry-dev/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", repository_arn = "arn:aws:ecr:us-east-1:123456789012:repository/lorry-dev/trainer" }
  bucket = {
    name        = "bucket"
    arn         = "arn:aws:s3:::bucket"
    kms_key_arn = "arn:aws:kms:us-east-1:123456789012:key/11111111-1111-1111-1111-111111111111"
  }
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = aws_launch_template.this.instance_initiated_shutdown_behavior == "terminate"
    error_message = "A machine that shuts down must be gone."
  }
  assert {
    condition     = aws_launch_template.this.metadata_options[0].http_tokens == "required"
    error_message = "Only IMDSv2."
  }
  assert {
    condition     = alltrue([for t in aws_launch_template.this.tag_specifications : t.tags.expires_at == "1970-01-01T00:00:00Z"])
    error_message = "A machine started without a deadline must count as overdue."
  }
  assert {
    condition     = length(aws_ec2_capacity_reservation.this) == 0 && length(aws_placement_group.this) == 0
    error_message = "Nothing that costs by default."
  }
  assert {
    condition     = length(aws_launch_template.this.network_interfaces) == 1
    error_message = "One machine needs no EFA."
  }
  assert {
    condition = (
      aws_vpc_security_group_ingress_rule.nodes.referenced_security_group_id == aws_security_group.machine.id &&
      aws_vpc_security_group_egress_rule.nodes.referenced_security_group_id == aws_security_group.machine.id &&
      aws_vpc_security_group_ingress_rule.nodes.ip_protocol == "-1" && aws_vpc_security_group_egress_rule.nodes.ip_protocol == "-1"
    )
    error_message = "Machines of one job must reach each other in every room, also without EFA."
  }
}

run "cluster_correct" {
  command = plan
  variables {
    cluster        = { placement_group = true, efa_cards = 3 }
    instance_types = ["p5en.48xlarge"]
  }
  assert {
    condition     = length(aws_launch_template.this.network_interfaces) == 4
    error_message = "The ordinary interface and one EFA device per card."
  }
  assert {
    condition     = length(aws_placement_group.this) == 1
    error_message = "The group was asked for."
  }
  assert {
    condition     = length(aws_launch_template.this.placement) == 0
    error_message = "A machine of a Capacity Block from this template must be in no group."
  }
}

run "cluster_incorrect" {
  command = plan
  variables {
    cluster = { efa_cards = 33 }
  }
  expect_failures = [var.cluster]
}

run "reservation_id_correct" {
  command = plan
  variables {
    reservation = { id = "cr-0123456789abcdef0", capacity_block = true }
  }
  assert {
    condition     = aws_launch_template.this.instance_market_options[0].market_type == "capacity-block"
    error_message = "A block has its own market."
  }
  assert {
    condition     = aws_launch_template.this.capacity_reservation_specification[0].capacity_reservation_target[0].capacity_reservation_id == "cr-0123456789abcdef0"
    error_message = "The block must be named."
  }
}

run "reservation_create_correct" {
  command = plan
  variables {
    reservation = { create = { count = 1, availability_zone = "us-east-1a", end = "2027-01-31T18:00:00Z" } }
  }
  assert {
    condition     = aws_ec2_capacity_reservation.this[0].end_date_type == "limited"
    error_message = "A reservation must end."
  }
}

run "reservation_both_incorrect" {
  command = plan
  variables {
    reservation = { id = "cr-0123456789abcdef0", create = { count = 1, availability_zone = "us-east-1a", end = "2027-01-31T18:00:00Z" } }
  }
  expect_failures = [var.reservation]
}

run "reservation_endless_incorrect" {
  command = plan
  variables {
    reservation = { create = { count = 1, availability_zone = "us-east-1a", end = "never" } }
  }
  expect_failures = [var.reservation]
}

run "block_without_id_incorrect" {
  command = plan
  variables {
    reservation = { capacity_block = true }
  }
  expect_failures = [var.reservation]
}

run "block_in_a_group_incorrect" {
  command = plan
  variables {
    reservation = { id = "cr-0123456789abcdef0", capacity_block = true }
    cluster     = { placement_group = true }
  }
  expect_failures = [var.reservation]
}

run "ami_correct" {
  command = plan
  variables {
    ami = { id = "ami-0123456789abcdef0" }
  }
  assert {
    condition     = aws_launch_template.this.image_id == "ami-0123456789abcdef0"
    error_message = "A given image must be used."
  }
}

run "ami_incorrect" {
  command = plan
  variables {
    ami = { id = "ubuntu" }
  }
  expect_failures = [var.ami]
}

run "instance_types_incorrect" {
  command = plan
  variables {
    instance_types = ["m5.large"]
  }
  expect_failures = [var.instance_types]
}

run "image_incorrect" {
  command = plan
  variables {
    image = { reference = "ghcr.io/example/trainer:latest" }
  }
  expect_failures = [var.image]
}

run "hours_incorrect" {
  command = plan
  variables {
    max_hours = 0
  }
  expect_failures = [var.max_hours]
}

run "disk_incorrect" {
  command = plan
  variables {
    root_disk_gb = 50
  }
  expect_failures = [var.root_disk_gb]
}

run "network_incorrect" {
  command = plan
  variables {
    network = { vpc_id = "vpc-1", subnet_ids = [] }
  }
  expect_failures = [var.network]
}
