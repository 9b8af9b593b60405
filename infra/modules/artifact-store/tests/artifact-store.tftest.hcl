mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix             = "lorry-dev"
  region             = "us-east-1"
  gateway_principals = ["arn:aws:iam::123456789012:role/front-door"]
}

run "defaults_correct" {
  command = plan

  assert {
    condition     = aws_s3_bucket.this.bucket == "lorry-dev-artifacts-123456789012-us-east-1"
    error_message = "The name of the bucket must tell whose it is and where."
  }
  assert {
    condition     = length(output.trainer_session_policy) < 2048
    error_message = "AWS takes session policies of at most 2048 characters."
  }
  assert {
    condition     = length(aws_iam_role.reader) == 0 && output.reader_role_arn == null
    error_message = "Nobody reads, so there must be no reader."
  }
}

run "bucket_name_correct" {
  command = plan
  variables {
    bucket_name = "acme-adapters"
  }
  assert {
    condition     = aws_s3_bucket.this.bucket == "acme-adapters"
    error_message = "A given name must be used."
  }
}

run "bucket_name_incorrect" {
  command = plan
  variables {
    bucket_name = "Acme.Adapters"
  }
  expect_failures = [var.bucket_name]
}

run "gateway_principals_incorrect" {
  command = plan
  variables {
    gateway_principals = ["arn:aws:iam::123456789012:root"]
  }
  expect_failures = [var.gateway_principals]
}

run "users_correct" {
  command = plan
  variables {
    users = { machines = "lorry-machines" }
  }
  assert {
    condition     = keys(aws_iam_user_policy_attachment.this) == ["machines"]
    error_message = "Only the named user may get rights."
  }
}

run "launchers_correct" {
  command = plan
  variables {
    users                = { front_door = "lorry-front-door" }
    launcher_policy_arns = { ec2 = "arn:aws:iam::123456789012:policy/ec2" }
  }
  assert {
    condition     = keys(aws_iam_role_policy_attachment.launcher) == ["ec2"] && aws_iam_user_policy_attachment.launcher["ec2"].user == "lorry-front-door"
    error_message = "A front door that may not launch serves no client, by its role or by its user."
  }
}

run "workflows_correct" {
  command = plan
  variables {
    workflows = [{
      provider_arn = "arn:aws:iam::123456789012:oidc-provider/token.actions.githubusercontent.com"
      subjects     = ["repo:acme@11/lorry@22:environment:reap"]
    }]
  }
  assert {
    condition     = jsondecode(aws_iam_role.trainer.assume_role_policy).Statement[1].Condition.StringEquals["token.actions.githubusercontent.com:sub"] == ["repo:acme@11/lorry@22:environment:reap"]
    error_message = "A workflow is let in by its exact subject."
  }
}

run "workflows_incorrect" {
  command = plan
  variables {
    workflows = [{
      provider_arn = "arn:aws:iam::123456789012:oidc-provider/token.actions.githubusercontent.com"
      subjects     = ["repo:acme/lorry:ref:refs/heads/main"]
    }]
  }
  expect_failures = [var.workflows]
}

run "readers_correct" {
  command = plan
  variables {
    reader_principals = ["arn:aws:iam::123456789012:user/serving"]
  }
  assert {
    condition     = output.reader_role_arn != null
    error_message = "A reader was asked for."
  }
}

run "readers_incorrect" {
  command = plan
  variables {
    reader_principals = ["*"]
  }
  expect_failures = [var.reader_principals]
}

run "retention_incorrect" {
  command = plan
  variables {
    retention = { deleted_days = 0 }
  }
  expect_failures = [var.retention]
}

run "prefix_incorrect" {
  command = plan
  variables {
    prefix = "Lorry"
  }
  expect_failures = [var.prefix]
}

run "region_incorrect" {
  command = plan
  variables {
    region = "Virginia"
  }
  expect_failures = [var.region]
}
