data "aws_caller_identity" "this" {}

data "aws_partition" "this" {}

locals {
  _tags      = merge(var.tags, { lorry = var.prefix })
  _account   = data.aws_caller_identity.this.account_id
  _partition = data.aws_partition.this.partition
  _log_group = "/aws/sagemaker/TrainingJobs"
  _jobs      = "arn:${local._partition}:sagemaker:${var.region}:${local._account}:training-job/${var.prefix}-*"
  _logs      = "arn:${local._partition}:logs:${var.region}:${local._account}:log-group:${local._log_group}:*"

  # The SDK simulates exactly these on "*" before it submits, and refuses a role that holds them under a condition.
  _checked_by_sdk = [
    "cloudwatch:PutMetricData",
    "ec2:CreateNetworkInterface",
    "ec2:CreateNetworkInterfacePermission",
    "ec2:DeleteNetworkInterface",
    "ec2:DeleteNetworkInterfacePermission",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
    "ecr:GetAuthorizationToken",
  ]
}

resource "aws_cloudwatch_log_group" "jobs" {
  #checkov:skip=CKV_AWS_158:Logs hold step numbers and losses, never training text; CloudWatch encrypts them with its own key
  #checkov:skip=CKV_AWS_338:The term is the caller's choice; its default is a year
  count = var.log_group.create ? 1 : 0

  name              = local._log_group
  retention_in_days = var.log_group.retention_days
  tags              = local._tags
}

resource "aws_iam_role" "execution" {
  name        = "${var.prefix}-sagemaker"
  description = "SageMaker training jobs of ${var.prefix}"
  tags        = local._tags

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "sagemaker.amazonaws.com" }
      Condition = { StringEquals = { "aws:SourceAccount" = local._account } }
    }]
  })
}

resource "aws_iam_role_policy_attachment" "data" {
  role       = aws_iam_role.execution.name
  policy_arn = var.data_policy_arn
}

resource "aws_iam_role_policy" "machine" {
  #checkov:skip=CKV_AWS_290:The network actions are demanded on every resource, see _checked_by_sdk
  #checkov:skip=CKV_AWS_355:As above
  name = "machine"
  role = aws_iam_role.execution.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([
      { Sid = "CheckedBySdk", Effect = "Allow", Action = local._checked_by_sdk, Resource = "*" },
      { Sid = "Logs", Effect = "Allow", Action = ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"], Resource = local._logs },
      ], [for arn in var.repository_arns :
      { Effect = "Allow", Action = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"], Resource = arn }
    ])
  })
}

resource "aws_iam_policy" "launcher" {
  name        = "${var.prefix}-sagemaker-launcher"
  description = "Submit, watch and stop training jobs of ${var.prefix} within its limits"
  tags        = local._tags

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([
      {
        Sid      = "SubmitWithinLimits"
        Effect   = "Allow"
        Action   = ["sagemaker:CreateTrainingJob", "sagemaker:AddTags"]
        Resource = local._jobs
        Condition = {
          "ForAllValues:StringEquals"   = { "sagemaker:InstanceTypes" = var.limits.instance_types }
          NumericLessThanEqualsIfExists = { "sagemaker:MaxRuntimeInSeconds" = tostring(var.limits.max_run_hours * 3600) }
        }
      },
      { Sid = "WatchAndStop", Effect = "Allow", Action = ["sagemaker:DescribeTrainingJob", "sagemaker:StopTrainingJob"], Resource = local._jobs },
      # Lists cannot be narrowed to a name.
      { Sid = "List", Effect = "Allow", Action = "sagemaker:ListTrainingJobs", Resource = "*" },
      { Sid = "Logs", Effect = "Allow", Action = ["logs:DescribeLogStreams", "logs:GetLogEvents"], Resource = local._logs },
      # What `lorry plan` asks before a launch (scripts/doctor/sagemaker_checks.py): role, image, types and quotas.
      { Sid = "AskOfRole", Effect = "Allow", Action = ["iam:GetRole", "iam:SimulatePrincipalPolicy"], Resource = aws_iam_role.execution.arn },
      { Sid = "AskOfRegion", Effect = "Allow", Action = ["ec2:DescribeInstanceTypeOfferings", "servicequotas:ListServiceQuotas"], Resource = "*" },
      { Sid = "HandOver", Effect = "Allow", Action = "iam:PassRole", Resource = aws_iam_role.execution.arn, Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } } },
      ], [for arn in var.repository_arns :
      { Effect = "Allow", Action = "ecr:DescribeImages", Resource = arn }
    ])
  })
}

resource "aws_security_group" "jobs" {
  #checkov:skip=CKV2_AWS_5:SageMaker attaches it to the network interfaces of its jobs
  count = var.network == null ? 0 : 1

  name        = "${var.prefix}-sagemaker"
  description = "Training jobs: out over HTTPS, and the hosts of a job to each other"
  vpc_id      = var.network.vpc_id
  tags        = local._tags
}

resource "aws_vpc_security_group_egress_rule" "https" {
  count = var.network == null ? 0 : 1

  security_group_id = aws_security_group.jobs[0].id
  description       = "S3, ECR and logs"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  tags              = local._tags
}

# A job of several hosts: NCCL and EFA need all traffic between them, in both directions.
resource "aws_vpc_security_group_egress_rule" "hosts" {
  count = var.network == null ? 0 : 1

  security_group_id            = aws_security_group.jobs[0].id
  description                  = "To the other hosts of a job"
  referenced_security_group_id = aws_security_group.jobs[0].id
  ip_protocol                  = "-1"
  tags                         = local._tags
}

resource "aws_vpc_security_group_ingress_rule" "hosts" {
  count = var.network == null ? 0 : 1

  security_group_id            = aws_security_group.jobs[0].id
  description                  = "From the other hosts of a job"
  referenced_security_group_id = aws_security_group.jobs[0].id
  ip_protocol                  = "-1"
  tags                         = local._tags
}
