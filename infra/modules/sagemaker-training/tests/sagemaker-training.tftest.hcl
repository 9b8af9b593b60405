mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix          = "lorry-dev"
  region          = "us-east-1"
  data_policy_arn = "arn:aws:iam::123456789012:policy/lorry-dev-trainer"
  limits          = { instance_types = ["ml.p5.48xlarge"] }
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = output.vpc_config == null && length(aws_security_group.jobs) == 0
    error_message = "Without a network nothing of it may be made."
  }
  assert {
    condition     = output.job_name_prefix == "lorry-dev-"
    error_message = "The launcher may use this prefix only."
  }
}

run "network_correct" {
  command = plan
  variables {
    network = { vpc_id = "vpc-1", subnet_ids = ["subnet-1"] }
  }
  assert {
    condition     = output.vpc_config.Subnets == tolist(["subnet-1"]) && length(output.vpc_config.SecurityGroupIds) == 1
    error_message = "CreateTrainingJob needs both."
  }
  assert {
    condition = (
      aws_vpc_security_group_ingress_rule.hosts[0].referenced_security_group_id == aws_security_group.jobs[0].id &&
      aws_vpc_security_group_egress_rule.hosts[0].referenced_security_group_id == aws_security_group.jobs[0].id
    )
    error_message = "Hosts of a job must reach each other, and nobody else may reach them."
  }
}

run "network_incorrect" {
  command = plan
  variables {
    network = { vpc_id = "vpc-1", subnet_ids = [] }
  }
  expect_failures = [var.network]
}

run "limits_incorrect" {
  command = plan
  variables {
    limits = { instance_types = ["p5.48xlarge"] }
  }
  expect_failures = [var.limits]
}

run "hours_incorrect" {
  command = plan
  variables {
    limits = { instance_types = ["ml.p5.48xlarge"], max_run_hours = 1000 }
  }
  expect_failures = [var.limits]
}

run "log_group_correct" {
  command = plan
  variables {
    log_group = { create = false }
  }
  assert {
    condition     = length(aws_cloudwatch_log_group.jobs) == 0
    error_message = "Another set-up of the account owns it."
  }
}

run "log_group_incorrect" {
  command = plan
  variables {
    log_group = { retention_days = 33 }
  }
  expect_failures = [var.log_group]
}

run "data_policy_incorrect" {
  command = plan
  variables {
    data_policy_arn = "trainer"
  }
  expect_failures = [var.data_policy_arn]
}
