mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix = "lorry-dev"
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = alltrue([for r in aws_ecr_repository.this : r.image_tag_mutability == "IMMUTABLE"])
    error_message = "A tag that can move is no record of what ran."
  }
  assert {
    condition     = sort(keys(output.repository_urls)) == tolist(["gateway", "trainer"])
    error_message = "Both images need a repository."
  }
}

run "repositories_incorrect" {
  command = plan
  variables {
    repositories = ["Trainer"]
  }
  expect_failures = [var.repositories]
}

run "keep_images_correct" {
  command = plan
  variables {
    keep_images = 5
  }
  assert {
    condition     = strcontains(aws_ecr_lifecycle_policy.this["trainer"].policy, "\"countNumber\":5")
    error_message = "The number of kept images must reach the rule."
  }
}

run "keep_images_incorrect" {
  command = plan
  variables {
    keep_images = 1
  }
  expect_failures = [var.keep_images]
}

run "pull_principals_correct" {
  command = plan
  variables {
    pull_principals = ["arn:aws:iam::210987654321:user/runpod"]
  }
  assert {
    condition     = length(aws_ecr_repository_policy.this) == 2
    error_message = "Every repository must let the puller in."
  }
}

run "pull_principals_incorrect" {
  command = plan
  variables {
    pull_principals = ["arn:aws:iam::210987654321:root"]
  }
  expect_failures = [var.pull_principals]
}
