data "aws_caller_identity" "this" {}

data "aws_partition" "this" {}

locals {
  _tags      = merge(var.tags, { lorry = var.prefix })
  _partition = data.aws_partition.this.partition
  _account   = data.aws_caller_identity.this.account_id
  _ec2       = "arn:${local._partition}:ec2:${var.region}:${local._account}"

  # Overwritten at launch. A machine that somebody starts without a deadline counts as overdue at once.
  _machine_tags = merge(local._tags, { Name = "${var.prefix}-trainer", expires_at = "1970-01-01T00:00:00Z" })

  _reservation_id = coalesce(var.reservation.id, one(aws_ec2_capacity_reservation.this[*].id), "none")

  _user_data = templatefile("${path.module}/user-data.sh.tftpl", {
    max_minutes = var.max_hours * 60
    region      = var.region
    bucket      = var.bucket.name
    image       = var.image.reference
    registry    = var.image.repository_arn == null ? "" : split("/", var.image.reference)[0]
  })
}

resource "aws_security_group" "machine" {
  #checkov:skip=CKV2_AWS_5:The launch template attaches it; machines come and go outside Terraform
  name        = "${var.prefix}-trainer"
  description = "GPU machines: out over HTTPS, nothing in but from each other"
  vpc_id      = var.network.vpc_id
  tags        = local._tags
}

resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.machine.id
  description       = "S3, image registry and the EC2 service"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  tags              = local._tags
}

# The machines of one job meet on any port: over TCP, and over EFA, which needs all traffic in both directions. Without a
# condition: any room may be asked for several nodes, and nothing but these machines is in the group.
resource "aws_vpc_security_group_egress_rule" "nodes" {
  security_group_id            = aws_security_group.machine.id
  description                  = "To the other machines"
  referenced_security_group_id = aws_security_group.machine.id
  ip_protocol                  = "-1"
  tags                         = local._tags
}

resource "aws_vpc_security_group_ingress_rule" "nodes" {
  security_group_id            = aws_security_group.machine.id
  description                  = "From the other machines"
  referenced_security_group_id = aws_security_group.machine.id
  ip_protocol                  = "-1"
  tags                         = local._tags
}

# The launcher's request names it where it is wanted: one machine needs none, and a Capacity Block allows none.
resource "aws_placement_group" "this" {
  count = var.cluster.placement_group ? 1 : 0

  name     = "${var.prefix}-trainer"
  strategy = "cluster"
  tags     = local._tags
}

resource "aws_ec2_capacity_reservation" "this" {
  count = var.reservation.create == null ? 0 : 1

  instance_type           = var.instance_types[0]
  instance_platform       = "Linux/UNIX"
  instance_count          = var.reservation.create.count
  availability_zone       = var.reservation.create.availability_zone
  end_date_type           = "limited"
  end_date                = var.reservation.create.end
  instance_match_criteria = "targeted"
  tags                    = local._tags
}

resource "aws_launch_template" "this" {
  #checkov:skip=CKV_AWS_88:No address is asked for; the subnet decides
  name                                 = "${var.prefix}-trainer"
  description                          = "One GPU machine that shuts itself down and is gone with its disks"
  update_default_version               = true
  image_id                             = coalesce(var.ami.id, "resolve:ssm:${var.ami.ssm_parameter}")
  instance_type                        = var.instance_types[0]
  instance_initiated_shutdown_behavior = "terminate"
  user_data                            = base64encode(local._user_data)
  tags                                 = local._tags

  iam_instance_profile {
    arn = aws_iam_instance_profile.machine.arn
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    instance_metadata_tags      = "enabled"
  }

  block_device_mappings {
    device_name = "/dev/sda1"

    ebs {
      volume_size           = var.root_disk_gb
      volume_type           = "gp3"
      encrypted             = true
      delete_on_termination = true
    }
  }

  # Card 0 carries ordinary traffic and one EFA device beside it; further cards carry EFA only.
  network_interfaces {
    device_index          = 0
    network_card_index    = 0
    subnet_id             = var.network.subnet_ids[0]
    security_groups       = [aws_security_group.machine.id]
    delete_on_termination = true
  }

  dynamic "network_interfaces" {
    for_each = range(var.cluster.efa_cards)

    content {
      device_index          = network_interfaces.value == 0 ? 1 : 0
      network_card_index    = network_interfaces.value
      interface_type        = "efa-only"
      subnet_id             = var.network.subnet_ids[0]
      security_groups       = [aws_security_group.machine.id]
      delete_on_termination = true
    }
  }

  dynamic "capacity_reservation_specification" {
    for_each = local._reservation_id == "none" ? [] : [local._reservation_id]

    content {
      capacity_reservation_target {
        capacity_reservation_id = capacity_reservation_specification.value
      }
    }
  }

  dynamic "instance_market_options" {
    for_each = var.reservation.capacity_block ? ["capacity-block"] : []

    content {
      market_type = instance_market_options.value
    }
  }

  dynamic "tag_specifications" {
    for_each = toset(["instance", "volume"])

    content {
      resource_type = tag_specifications.value
      tags          = local._machine_tags
    }
  }
}
