terraform {
  required_version = ">= 1.11, < 2.0"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.100, < 7.0"
    }
  }

  # bucket and region come with init: -backend-config="bucket=..." -backend-config="region=..."
  backend "s3" {
    key          = "prod/aws.tfstate"
    use_lockfile = true
    encrypt      = true
  }
}

provider "aws" {
  region = var.region
}

module "room" {
  source = "../../../stacks/aws"

  prefix             = "lorry-prod"
  region             = var.region
  tags               = { environment = "prod" }
  bucket_name        = var.bucket_name
  gateway_principals = var.gateway_principals
  users              = var.users
  reader_principals  = var.reader_principals
  github             = merge(var.github, { subjects = ["environment:train", "environment:reap", "ref:refs/heads/main"] })
  network            = var.network
  trainer_digest     = var.trainer_digest
  budget             = var.budget

  retention     = { checkpoint_days = 14, deleted_days = 30 }
  force_destroy = false
  ec2           = { instance_types = ["p5.48xlarge", "p5en.48xlarge", "p5.4xlarge", "p4d.24xlarge", "p4de.24xlarge", "p6-b200.48xlarge", "g6e.12xlarge", "g6e.48xlarge", "g7e.48xlarge"], ami_id = var.ami_id, max_hours = 72, reservation_id = var.reservation.id, capacity_block = var.reservation.capacity_block }
  sagemaker     = { instance_types = ["ml.p5.48xlarge", "ml.p5en.48xlarge", "ml.p5.4xlarge", "ml.p4d.24xlarge", "ml.p4de.24xlarge", "ml.p6-b200.48xlarge", "ml.g6e.12xlarge", "ml.g6e.48xlarge", "ml.g7e.48xlarge"], max_run_hours = 72, create_log_group = true }
}

output "room" {
  description = "Everything the verbs need to know; the table in infra/README.md names each field."
  value       = module.room
}
