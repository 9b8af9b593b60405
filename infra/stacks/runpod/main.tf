module "workspace" {
  source = "../../modules/runpod-workspace"

  prefix              = var.prefix
  datacenter          = var.datacenter
  gpu_types           = var.gpu_types
  gpu_stock           = var.gpu_stock
  volume              = { size_gb = var.volume_size_gb }
  registry            = var.registry
  ecr_repository_arns = var.ecr_repository_arns
  container = {
    image      = var.images.trainer
    env        = var.env.trainer
    secret_env = var.secret_env.trainer
  }
}

locals {
  _volume = { id = module.workspace.volume_id, datacenter = module.workspace.datacenter }
}

module "training" {
  source = "../../modules/runpod-training-endpoint"

  prefix        = var.prefix
  gpu           = { pools = var.training.pools, count = var.training.gpus }
  volume        = local._volume
  max_workers   = var.training.max_workers
  max_run_hours = var.training.max_run_hours
  container = {
    image       = var.images.trainer
    registry_id = module.workspace.registry_id
    env         = var.env.trainer
    secret_env  = var.secret_env.trainer
  }
}

module "gateway" {
  source = "../../modules/runpod-gateway"
  count  = var.images.gateway == null ? 0 : 1

  prefix = var.prefix
  container = {
    image       = var.images.gateway
    registry_id = module.workspace.registry_id
    env         = var.env.gateway
    secret_env  = var.secret_env.gateway
  }
}

module "serving" {
  source = "../../modules/runpod-serving"
  count  = var.images.serving == null ? 0 : 1

  prefix = var.prefix
  gpu    = { pools = var.serving.pools, count = var.serving.gpus }
  volume = local._volume
  model  = { path = var.serving.model_path, served_name = var.serving.model_name, max_tokens = var.serving.max_tokens }
  lora   = { adapters = var.serving.adapters, active = var.serving.active, max_rank = var.serving.max_rank }
  container = {
    image       = var.images.serving
    registry_id = module.workspace.registry_id
    secret_env  = var.secret_env.serving
  }
}
