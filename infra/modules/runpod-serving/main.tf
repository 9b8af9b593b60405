data "runpod_gpu_types" "all" {}

locals {
  _pools      = distinct(compact([for gpu in data.runpod_gpu_types.all.gpu_types : gpu.pool]))
  _secret_env = { for name, secret in var.container.secret_env : name => "{{ RUNPOD_SECRET_${secret} }}" }

  _vllm = {
    MODEL_NAME                       = var.model.path
    SERVED_MODEL_NAME                = var.model.served_name
    MAX_MODEL_LEN                    = tostring(var.model.max_tokens)
    TENSOR_PARALLEL_SIZE             = tostring(var.gpu.count)
    ENABLE_LORA                      = "true"
    LORA_MODULES                     = jsonencode(var.lora.adapters)
    MAX_LORAS                        = tostring(var.lora.active)
    MAX_LORA_RANK                    = tostring(var.lora.max_rank)
    VLLM_STARTUP_TIMEOUT             = tostring(var.workers.startup_seconds)
    HF_HUB_OFFLINE                   = "1"
    VLLM_ALLOW_RUNTIME_LORA_UPDATING = "False"
  }
  # A request waits for a cold start, then for its answer.
  _timeout_ms = (var.workers.startup_seconds + 600) * 1000
}

resource "runpod_serverless_endpoint" "this" {
  name          = "${var.prefix}-serving"
  endpoint_type = "QUEUE"

  image    = var.container.image
  disk     = var.container.disk_gb
  registry = var.container.registry_id
  env      = merge(local._vllm, var.container.env, local._secret_env)

  gpu_pools        = var.gpu.pools
  gpu_count        = var.gpu.count
  excluded_types   = var.gpu.excluded_types
  min_cuda_version = var.gpu.min_cuda_version

  scaling_type  = "QUEUE_DELAY"
  scaling_value = 4
  workers_min   = 0
  workers_max   = var.workers.max
  idle_timeout  = var.workers.idle_seconds
  timeout       = local._timeout_ms
  flashboot     = "FLASHBOOT"

  network_volumes = [var.volume.id]
  data_center_ids = [var.volume.datacenter]

  lifecycle {
    # What is live changes with `lorry serve`, which records it; the room only says what it starts with.
    ignore_changes = [env["LORA_MODULES"]]
  }
}
