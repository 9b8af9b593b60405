locals {
  _secret_env = { for name, secret in var.container.secret_env : name => "{{ RUNPOD_SECRET_${secret} }}" }
  # A request through Runpod's proxy is cut after 100 s, so no answer may take longer.
  _timeout_ms = 100 * 1000
}

resource "runpod_serverless_endpoint" "this" {
  name          = "${var.prefix}-gateway"
  endpoint_type = "LOAD_BALANCER"

  image    = var.container.image
  disk     = var.container.disk_gb
  registry = var.container.registry_id
  ports    = ["${var.port}/http"]
  env = merge(var.container.env, local._secret_env, {
    PORT        = tostring(var.port)
    PORT_HEALTH = tostring(var.port)
  })

  cpu = [{ cpu_type_id = var.cpu.type, vcpu_count = var.cpu.vcpus }]

  scaling_type  = "REQUEST_COUNT"
  scaling_value = var.workers.requests_per_worker
  workers_min   = 0
  workers_max   = var.workers.max
  idle_timeout  = var.workers.idle_seconds
  timeout       = local._timeout_ms
  flashboot     = "OFF"

  data_center_ids = length(var.datacenters) == 0 ? null : var.datacenters
}
