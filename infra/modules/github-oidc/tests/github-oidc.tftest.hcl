mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix      = "lorry-dev"
  repository  = { owner = "acme", name = "lorry" }
  subjects    = ["environment:prod"]
  policy_arns = { push = "arn:aws:iam::123456789012:policy/push" }
}

run "name_only_correct" {
  command = plan
  assert {
    condition     = output.subjects == ["repo:acme/lorry:environment:prod"]
    error_message = "An old repository signs with its name."
  }
  assert {
    condition     = aws_iam_role.actions.max_session_duration == 21600
    error_message = "A workflow watches a training for up to 350 minutes."
  }
}

run "ids_correct" {
  command = plan
  variables {
    repository = { owner = "acme", name = "lorry", owner_id = "11", repository_id = "22" }
    subjects   = ["environment:prod", "ref:refs/heads/main"]
  }
  assert {
    condition     = contains(output.subjects, "repo:acme@11/lorry@22:ref:refs/heads/main") && length(output.subjects) == 4
    error_message = "A new repository signs with its ids."
  }
}

run "ids_incorrect" {
  command = plan
  variables {
    repository = { owner = "acme", name = "lorry", owner_id = "11" }
  }
  expect_failures = [var.repository]
}

run "repository_incorrect" {
  command = plan
  variables {
    repository = { owner = "acme", name = "*" }
  }
  expect_failures = [var.repository]
}

run "subjects_incorrect" {
  command = plan
  variables {
    subjects = ["*"]
  }
  expect_failures = [var.subjects]
}

run "pull_request_incorrect" {
  command = plan
  variables {
    subjects = ["pull_request"]
  }
  expect_failures = [var.subjects]
}

run "existing_provider_correct" {
  command = plan
  variables {
    provider_arn = "arn:aws:iam::123456789012:oidc-provider/token.actions.githubusercontent.com"
  }
  assert {
    condition     = length(aws_iam_openid_connect_provider.github) == 0
    error_message = "An account has only one provider."
  }
}
