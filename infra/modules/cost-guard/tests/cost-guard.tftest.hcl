mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix            = "lorry-dev"
  region            = "us-east-1"
  monthly_limit_usd = 500
  alert_emails      = ["ops@example.com"]
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = length(aws_budgets_budget.month.notification) == 4
    error_message = "Three thresholds and the forecast."
  }
  assert {
    condition     = length(aws_cloudwatch_metric_alarm.charges) == 0
    error_message = "No alarm was asked for."
  }
}

run "billing_alarm_correct" {
  command = plan
  variables {
    billing_alarm_usd = 400
  }
  assert {
    condition     = aws_cloudwatch_metric_alarm.charges[0].threshold == 400
    error_message = "The alarm must ring at the given sum."
  }
}

run "billing_alarm_incorrect" {
  command = plan
  variables {
    region            = "eu-west-1"
    billing_alarm_usd = 400
  }
  expect_failures = [var.billing_alarm_usd]
}

run "limit_incorrect" {
  command = plan
  variables {
    monthly_limit_usd = 0
  }
  expect_failures = [var.monthly_limit_usd]
}

run "emails_incorrect" {
  command = plan
  variables {
    alert_emails = ["ops"]
  }
  expect_failures = [var.alert_emails]
}

run "thresholds_incorrect" {
  command = plan
  variables {
    thresholds_percent = [0]
  }
  expect_failures = [var.thresholds_percent]
}
