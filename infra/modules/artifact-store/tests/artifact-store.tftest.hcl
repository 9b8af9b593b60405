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
