locals {
  _tags = merge(var.tags, { lorry = var.prefix })
  _host = "token.actions.githubusercontent.com"

  _by_name = "${var.repository.owner}/${var.repository.name}"
  _by_id   = var.repository.owner_id == null ? [] : ["${var.repository.owner}@${var.repository.owner_id}/${var.repository.name}@${var.repository.repository_id}"]

  _provider = coalesce(var.provider_arn, one(aws_iam_openid_connect_provider.github[*].arn))

  # GitHub signs with one of the two forms, depending on the repository's age.
  _subjects = [for pair in setproduct(concat([local._by_name], local._by_id), var.subjects) : "repo:${pair[0]}:${pair[1]}"]
}

resource "aws_iam_openid_connect_provider" "github" {
  count = var.provider_arn == null ? 1 : 0

  url            = "https://${local._host}"
  client_id_list = ["sts.amazonaws.com"]
  tags           = local._tags
}

resource "aws_iam_role" "actions" {
  name                 = "${var.prefix}-github-actions"
  description          = "GitHub Actions of ${local._by_name}"
  max_session_duration = 6 * 3600 # the longest job on GitHub's machines; a workflow asks for one hour unless it says more
  tags                 = local._tags

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = local._provider }
      Condition = {
        StringEquals = {
          "${local._host}:aud" = "sts.amazonaws.com"
          "${local._host}:sub" = local._subjects
        }
      }
    }]
  })
}

resource "aws_iam_role_policy_attachment" "this" {
  for_each = var.policy_arns

  role       = aws_iam_role.actions.name
  policy_arn = each.value
}
