data "runpod_gpu_types" "all" {}

locals {
  _pools          = distinct(compact([for gpu in data.runpod_gpu_types.all.gpu_types : gpu.pool]))
  _secret_env     = { for name, secret in var.container.secret_env : name => "{{ RUNPOD_SECRET_${secret} }}" }
  _milliseconds   = 3600 * 1000
  _volume_ids     = var.volume == null ? null : [var.volume.id]
  _datacenter_ids = var.volume == null ? null : [var.volume.datacenter]
}

resource "runpod_serverless_endpoint" "this" {
  name          = "${var.prefix}-training"
  endpoint_type = "QUEUE"

  image    = var.container.image
  disk     = var.container.disk_gb
  registry = var.container.registry_id
  env      = merge(var.container.env, local._secret_env, { LORRY_MODELS = "/runpod-volume/models", LORRY_TRAINER_IMAGE = var.container.image })

  gpu_pools        = var.gpu.pools
  gpu_count        = var.gpu.count
  excluded_types   = var.gpu.excluded_types
  min_cuda_version = var.gpu.min_cuda_version

  # One worker per waiting job, none without jobs. With this scaling Runpod refuses an idle timeout.
  scaling_type  = "REQUEST_COUNT"
  scaling_value = 1
  workers_min   = 0
  workers_max   = var.max_workers
  flashboot     = "OFF"

  # Left out, the timeout was seen to become 0 rather than the documented default.
  timeout = floor(var.max_run_hours * local._milliseconds)

  network_volumes = local._volume_ids
  data_center_ids = local._datacenter_ids
}
