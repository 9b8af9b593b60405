terraform {
  required_version = ">= 1.11, < 2.0"

  required_providers {
    runpod = {
      source  = "runpod/runpod"
      version = "~> 2.0.0"
    }
  }

  # bucket and region come with init: -backend-config="bucket=..." -backend-config="region=..."
  backend "s3" {
    key          = "prod/runpod.tfstate"
    use_lockfile = true
    encrypt      = true
  }
}

# The key comes from RUNPOD_API_KEY.
provider "runpod" {}

module "room" {
  source = "../../../stacks/runpod"

  prefix              = "lorry-prod"
  datacenter          = var.datacenter
  gpu_types           = var.gpu_types
  gpu_stock           = var.gpu_stock
  volume_size_gb      = var.volume_size_gb
  images              = var.images
  registry            = var.registry
  ecr_repository_arns = var.ecr_repository_arns
  env                 = var.env
  secret_env          = var.secret_env

  training = { pools = ["HOPPER_141"], gpus = 4, max_workers = 3, max_run_hours = 72 }
  serving = {
    pools      = ["HOPPER_141"]
    gpus       = 2
    model_path = "/runpod-volume/models/Qwen--Qwen3-Next-80B-A3B-Instruct"
    model_name = "qwen3-next-80b"
  }
}

output "room" {
  description = "Everything the verbs need to know; the table in infra/README.md names each field."
  value       = module.room
}
