# Layout of the bucket: jobs/JOB/... of the terminal, jobs/clients/CLIENT/jobs/JOB/... of the front door, models/...,
# machines/ROLE_ID:INSTANCE_ID/launch.env. What begins with _ below jobs/ are records of those who launch.
locals {
  _bucket  = aws_s3_bucket.this.arn
  _jobs    = "${local._bucket}/jobs/*"
  _models  = "${local._bucket}/models/*"
  _read    = ["s3:GetObject", "s3:GetObjectTagging"]
  _write   = ["s3:PutObject", "s3:PutObjectTagging", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
  _decrypt = ["kms:Decrypt"]
  _encrypt = ["kms:Decrypt", "kms:GenerateDataKey"]
  _via_s3  = { StringEquals = { "kms:ViaService" = "s3.${var.region}.amazonaws.com" } }

  # What a job may do, for any place that names one job or all of them.
  _trainer = { for place, job in { role = "jobs/*", session = "JOB_PREFIX" } : place => {
    Version = "2012-10-17"
    Statement = [
      { Sid = "Work", Effect = "Allow", Action = concat(local._read, local._write), Resource = "${local._bucket}/${job}/*" },
      { Sid = "Prune", Effect = "Allow", Action = "s3:DeleteObject", Resource = "${local._bucket}/${job}/checkpoints/*" },
      { Sid = "Models", Effect = "Allow", Action = local._read, Resource = local._models },
      { Sid = "List", Effect = "Allow", Action = "s3:ListBucket", Resource = local._bucket, Condition = { StringLike = { "s3:prefix" = ["${job}/*", "models/*"] } } },
      { Sid = "Key", Effect = "Allow", Action = local._encrypt, Resource = aws_kms_key.this.arn, Condition = local._via_s3 },
    ]
  } }

  _github = "token.actions.githubusercontent.com"

  # No job writes the audit, what is served, or what was deleted.
  _records = [for place in ["_*", "clients/*/jobs/_*", "clients/*/notes/*"] : "${local._bucket}/jobs/${place}"]
  _trainer_role = merge(local._trainer.role, { Statement = concat(local._trainer.role.Statement, [
    { Sid = "Records", Effect = "Deny", Action = ["s3:PutObject", "s3:DeleteObject"], Resource = local._records },
  ]) })
}

locals {
  _trust = { for role, principals in { gateway = var.gateway_principals, reader = var.reader_principals } : role => {
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "sts:AssumeRole", Principal = { AWS = principals } }]
  } }
}

resource "aws_iam_policy" "trainer" {
  name        = "${var.prefix}-trainer"
  description = "What a training job does in the artifact store; a session policy narrows it to one job"
  policy      = jsonencode(local._trainer_role)
  tags        = local._tags
}

resource "aws_iam_role" "gateway" {
  name               = "${var.prefix}-gateway"
  description        = "The front door: all jobs"
  assume_role_policy = jsonencode(local._trust.gateway)
  tags               = local._tags
}

resource "aws_iam_role" "trainer" {
  name                 = "${var.prefix}-trainer"
  description          = "One training job: always taken with the session policy of its prefix"
  max_session_duration = 12 * 3600
  tags                 = local._tags

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat([{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { AWS = concat(var.gateway_principals, [aws_iam_role.gateway.arn]) }
      # By their own identity and not by the role they run under: a role that takes a role gets one hour of keys.
      }], [for github in var.workflows : {
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = github.provider_arn }
      Condition = { StringEquals = {
        "${local._github}:aud" = "sts.amazonaws.com"
        "${local._github}:sub" = github.subjects
      } }
    }])
  })
}

resource "aws_iam_role" "reader" {
  count = length(var.reader_principals) > 0 ? 1 : 0

  name               = "${var.prefix}-reader"
  description        = "Fetches finished adapters"
  assume_role_policy = jsonencode(local._trust.reader)
  tags               = local._tags
}

resource "aws_iam_role_policy_attachment" "trainer" {
  role       = aws_iam_role.trainer.name
  policy_arn = aws_iam_policy.trainer.arn
}

resource "aws_iam_role_policy_attachment" "gateway" {
  role       = aws_iam_role.gateway.name
  policy_arn = aws_iam_policy.gateway.arn
}

resource "aws_iam_role_policy_attachment" "launcher" {
  for_each = var.launcher_policy_arns

  role       = aws_iam_role.gateway.name
  policy_arn = each.value
}

resource "aws_iam_user_policy_attachment" "launcher" {
  #checkov:skip=CKV_AWS_40:A user is what the front door has keys of; a group of one user would narrow nothing
  for_each = { for name, arn in var.launcher_policy_arns : name => arn if var.users.front_door != null }

  user       = var.users.front_door
  policy_arn = each.value
}

resource "aws_iam_user_policy_attachment" "this" {
  #checkov:skip=CKV_AWS_40:A user is what a Pod's key belongs to; a group of one user would narrow nothing
  for_each = { for user, policy in {
    front_door = aws_iam_policy.gateway.arn
    machines   = aws_iam_policy.trainer.arn
  } : user => policy if var.users[user] != null }

  user       = var.users[each.key]
  policy_arn = each.value
}

resource "aws_iam_policy" "gateway" {
  name        = "${var.prefix}-gateway"
  description = "All jobs: for the front door, and for the cron that looks after jobs"
  tags        = local._tags

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Sid = "Jobs", Effect = "Allow", Action = concat(local._read, local._write, ["s3:DeleteObject", "s3:DeleteObjectVersion"]), Resource = local._jobs },
      # Only unfinished uploads below jobs/ can be ended or gone on with; their list cannot be narrowed to a prefix.
      { Sid = "Unfinished", Effect = "Allow", Action = "s3:ListBucketMultipartUploads", Resource = local._bucket },
      { Sid = "Launch", Effect = "Allow", Action = ["s3:PutObject", "s3:DeleteObject"], Resource = "${local._bucket}/machines/*" },
      { Sid = "Models", Effect = "Allow", Action = local._read, Resource = local._models },
      { Sid = "List", Effect = "Allow", Action = ["s3:ListBucket", "s3:ListBucketVersions"], Resource = local._bucket, Condition = { StringLike = { "s3:prefix" = ["jobs/*", "models/*"] } } },
      { Sid = "Key", Effect = "Allow", Action = local._encrypt, Resource = aws_kms_key.this.arn, Condition = local._via_s3 },
      { Sid = "Where", Effect = "Allow", Action = "s3:GetBucketLocation", Resource = local._bucket },
      { Sid = "HandOutJobs", Effect = "Allow", Action = "sts:AssumeRole", Resource = aws_iam_role.trainer.arn },
      # Asked before a launch (scripts/doctor/template_checks.py).
      { Sid = "AskOfTrainer", Effect = "Allow", Action = ["iam:GetRole", "iam:SimulatePrincipalPolicy"], Resource = aws_iam_role.trainer.arn },
    ]
  })
}

resource "aws_iam_role_policy" "reader" {
  count = length(var.reader_principals) > 0 ? 1 : 0

  name = "adapters"
  role = aws_iam_role.reader[0].id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Sid = "Adapters", Effect = "Allow", Action = "s3:GetObject", Resource = ["${local._jobs}/adapter/*", "${local._jobs}/manifest.json"] },
      { Sid = "Key", Effect = "Allow", Action = local._decrypt, Resource = aws_kms_key.this.arn, Condition = local._via_s3 },
    ]
  })
}
