locals {
  # What the launcher asks before and after a start (scripts/backends/ec2_api.py, scripts/doctor/template_checks.py).
  _watch = [
    "ec2:DescribeCapacityReservations", "ec2:DescribeInstanceTypeOfferings", "ec2:DescribeInstances",
    "ec2:DescribeLaunchTemplateVersions", "ec2:DescribeSpotPriceHistory", "ec2:DescribeSubnets", "ec2:DescribeVolumes", "ec2:GetSpotPlacementScores",
  ]
  _pull = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
}

resource "aws_iam_role" "machine" {
  name        = "${var.prefix}-machine"
  description = "A GPU machine: its own launch folder and the trainer image, no client's data"
  tags        = local._tags

  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "sts:AssumeRole", Principal = { Service = "ec2.amazonaws.com" } }]
  })
}

resource "aws_iam_role_policy" "machine" {
  name = "machine"
  role = aws_iam_role.machine.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([
      # aws:userid of a machine is ROLE_ID:INSTANCE_ID, so no machine reads another's folder.
      { Sid = "OwnLaunchFolder", Effect = "Allow", Action = "s3:GetObject", Resource = "${var.bucket.arn}/machines/$${aws:userid}/*" },
      { Sid = "Key", Effect = "Allow", Action = "kms:Decrypt", Resource = var.bucket.kms_key_arn, Condition = { StringEquals = { "kms:ViaService" = "s3.${var.region}.amazonaws.com" } } },
      ], [for statement in [
        { Sid = "Image", Effect = "Allow", Action = local._pull, Resource = coalesce(var.image.repository_arn, "none") },
        # A login token is not bound to a repository.
        { Sid = "Login", Effect = "Allow", Action = ["ecr:GetAuthorizationToken"], Resource = "*" },
    ] : statement if var.image.repository_arn != null])
  })
}

resource "aws_iam_instance_profile" "machine" {
  name = "${var.prefix}-machine"
  role = aws_iam_role.machine.name
  tags = local._tags
}

resource "aws_iam_policy" "launcher" {
  name        = "${var.prefix}-ec2-launcher"
  description = "Start, watch and end GPU machines of ${var.prefix}, from its launch template only"
  tags        = local._tags

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([
      {
        Sid      = "StartFromTemplate"
        Effect   = "Allow"
        Action   = "ec2:RunInstances"
        Resource = "${local._ec2}:*/*"
        Condition = {
          ArnEquals            = { "ec2:LaunchTemplate" = aws_launch_template.this.arn }
          StringEqualsIfExists = { "ec2:InstanceType" = var.instance_types }
        }
      },
      # Machine images belong to Amazon's account.
      { Sid = "Image", Effect = "Allow", Action = "ec2:RunInstances", Resource = "arn:${local._partition}:ec2:${var.region}::image/*" },
      { Sid = "TagAtStart", Effect = "Allow", Action = "ec2:CreateTags", Resource = "${local._ec2}:*/*", Condition = { StringEquals = { "ec2:CreateAction" = "RunInstances" } } },
      { Sid = "EndOurs", Effect = "Allow", Action = "ec2:TerminateInstances", Resource = "${local._ec2}:instance/*", Condition = { StringEquals = { "ec2:ResourceTag/lorry" = var.prefix } } },
      { Sid = "Console", Effect = "Allow", Action = "ec2:GetConsoleOutput", Resource = "${local._ec2}:instance/*", Condition = { StringEquals = { "ec2:ResourceTag/lorry" = var.prefix } } },
      # Describe actions cannot be narrowed to a resource.
      { Sid = "Watch", Effect = "Allow", Action = local._watch, Resource = "*" },
      { Sid = "Newest", Effect = "Allow", Action = "ssm:GetParameters", Resource = "arn:${local._partition}:ssm:${var.region}::parameter/aws/service/deeplearning/*" },
      { Sid = "Quotas", Effect = "Allow", Action = "servicequotas:GetServiceQuota", Resource = "arn:${local._partition}:servicequotas:${var.region}:${local._account}:ec2/*" },
      # Spot needs this role once in an account; who asks for the first spot machine makes it.
      { Sid = "FirstSpot", Effect = "Allow", Action = "iam:CreateServiceLinkedRole", Resource = "arn:${local._partition}:iam::${local._account}:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot", Condition = { StringEquals = { "iam:AWSServiceName" = "spot.amazonaws.com" } } },
      { Sid = "HandOver", Effect = "Allow", Action = "iam:PassRole", Resource = aws_iam_role.machine.arn, Condition = { StringEquals = { "iam:PassedToService" = "ec2.amazonaws.com" } } },
      # Whether the image and the role are there is asked before a machine is paid for.
      { Sid = "RoleIsThere", Effect = "Allow", Action = "iam:GetInstanceProfile", Resource = aws_iam_instance_profile.machine.arn },
      ], [for arn in compact([var.image.repository_arn]) :
      { Sid = "ImageIsThere", Effect = "Allow", Action = "ecr:DescribeImages", Resource = arn }
    ])
  })
}
