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
    key          = "dev/aws.tfstate"
    use_lockfile = true
    encrypt      = true
  }
}

provider "aws" {
  region = var.region
}

module "room" {
  source = "../../../stacks/aws"

  prefix             = "lorry-dev"
  region             = var.region
  tags               = { environment = "dev" }
  bucket_name        = var.bucket_name
  gateway_principals = var.gateway_principals
  users              = var.users
  reader_principals  = var.reader_principals
  github             = merge(var.github, { subjects = ["environment:train", "environment:reap", "ref:refs/heads/main"] })
  network            = var.network
  trainer_digest     = var.trainer_digest
  budget             = var.budget

  retention     = { checkpoint_days = 3, deleted_days = 7 }
  force_destroy = true
  ec2           = { instance_types = ["g6e.12xlarge", "p5.4xlarge"], ami_id = var.ami_id, max_hours = 12, reservation_id = var.reservation.id, capacity_block = var.reservation.capacity_block }
  sagemaker     = { instance_types = ["ml.g6e.12xlarge", "ml.p5.4xlarge"], max_run_hours = 12, create_log_group = false }
}

output "room" {
  description = "Everything the verbs need to know; the table in infra/README.md names each field."
  value       = module.room
}
