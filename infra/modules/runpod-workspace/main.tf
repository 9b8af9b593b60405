data "runpod_data_centers" "all" {}

data "runpod_gpu_types" "all" {}

locals {
  _volume_tiers = { for dc in data.runpod_data_centers.all.data_centers : dc.id => dc.network_volume_types }
  _secure_gpus  = [for gpu in data.runpod_gpu_types.all.gpu_types : gpu.id if gpu.secure]

  # Datacentres whose volumes answer the S3 API, from Runpod's storage pages of August 2026; the catalogue does not say.
  _s3_datacenters = [
    "EU-CZ-1", "EU-RO-1", "EUR-IS-1", "EUR-NO-1", "US-CA-2", "US-GA-2", "US-IL-1", "US-KS-2",
    "US-MD-1", "US-MO-1", "US-MO-2", "US-NC-1", "US-NC-2", "US-NE-1", "US-WA-1",
  ]

  # A secret that does not exist leaves this text as it stands, and the trainer refuses values that start with {{.
  _secret_env = { for name, secret in var.container.secret_env : name => "{{ RUNPOD_SECRET_${secret} }}" }
}

check "gpu_stock_was_looked_at" {
  assert {
    condition     = length(var.gpu_stock) > 0
    error_message = "gpu_stock is empty, so nothing says that ${var.datacenter} has ${join(", ", var.gpu_types)} to rent."
  }
}

resource "runpod_network_volume" "this" {
  name        = "${var.prefix}-models"
  size        = var.volume.size_gb
  data_center = var.datacenter
  type        = var.volume.tier
}

resource "runpod_registry" "this" {
  count = nonsensitive(var.registry != null) ? 1 : 0

  name     = "${var.prefix}-registry"
  username = var.registry.username
  password = var.registry.password
}

resource "runpod_registry_delegation" "this" {
  for_each = var.ecr_repository_arns

  name     = "${var.prefix}-${each.key}"
  resource = each.value
}

# The network volume is attached when a Pod is made: templates know persistent disks only.
resource "runpod_template" "pod" {
  name       = "${var.prefix}-pod"
  image      = var.container.image
  disk       = var.container.disk_gb
  env        = merge(var.container.env, local._secret_env, { LORRY_MODELS = "${var.mount_path}/models" })
  registry   = one(runpod_registry.this[*].id)
  serverless = false
  public     = false
  category   = "NVIDIA"
}
