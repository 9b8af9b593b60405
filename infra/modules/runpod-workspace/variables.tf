variable "prefix" {
  description = "Starts every name, so that what is ours can be told from what is not."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.prefix))
    error_message = "prefix must be 2 to 31 characters: a lower-case letter, then lower-case letters, digits and hyphens."
  }
}

variable "datacenter" {
  description = "Where the volume lives, and with it every Pod and worker that mounts it. It cannot be changed later without making the volume anew."
  type        = string

  validation {
    condition     = contains(keys(local._volume_tiers), var.datacenter)
    error_message = "datacenter ${var.datacenter} is not in Runpod's catalogue; choose one of ${join(", ", keys(local._volume_tiers))}."
  }

  validation {
    condition     = contains(lookup(local._volume_tiers, var.datacenter, []), var.volume.tier)
    error_message = "datacenter ${var.datacenter} has no ${var.volume.tier} network volumes; choose one of ${join(", ", [for dc, tiers in local._volume_tiers : dc if contains(tiers, var.volume.tier)])}."
  }

  validation {
    condition     = !var.volume.s3_api || contains(local._s3_datacenters, var.datacenter)
    error_message = "datacenter ${var.datacenter} has no S3 API, so files cannot be put on the volume from outside; choose one of ${join(", ", local._s3_datacenters)}, or set volume.s3_api = false."
  }

  validation {
    condition     = length(var.gpu_stock) == 0 || length(setsubtract(var.gpu_types, lookup(var.gpu_stock, var.datacenter, []))) == 0
    error_message = "datacenter ${var.datacenter} has no stock of ${join(", ", setsubtract(var.gpu_types, lookup(var.gpu_stock, var.datacenter, [])))}; datacentres that have all wanted GPUs: ${join(", ", [for dc, gpus in var.gpu_stock : dc if length(setsubtract(var.gpu_types, gpus)) == 0])}."
  }
}

variable "gpu_types" {
  description = "GPU ids that jobs on this volume want, as Runpod's catalogue writes them."
  type        = list(string)

  validation {
    condition     = length(var.gpu_types) > 0
    error_message = "gpu_types is empty: name at least one GPU, for example NVIDIA H200."
  }

  validation {
    condition     = length(setsubtract(var.gpu_types, local._secure_gpus)) == 0
    error_message = "gpu_types: ${join(", ", setsubtract(var.gpu_types, local._secure_gpus))} is not rented in Secure Cloud, where network volumes are; choose from ${join(", ", local._secure_gpus)}."
  }
}

variable "gpu_stock" {
  description = "Datacentre -> GPU ids in stock, as seen shortly before; empty means that stock was not looked at. The provider has no data source for it."
  type        = map(list(string))
  default     = {}
}

variable "volume" {
  description = "The network volume that holds base models and caches. It only grows; 80B in bf16 is about 160 GB."
  type = object({
    size_gb = number
    tier    = optional(string, "STANDARD")
    s3_api  = optional(bool, true)
  })

  validation {
    condition     = var.volume.size_gb >= 10 && var.volume.size_gb <= 4096 && floor(var.volume.size_gb) == var.volume.size_gb
    error_message = "volume.size_gb must be a whole number from 10 to 4096."
  }

  validation {
    condition     = contains(["STANDARD", "HIGH_PERFORMANCE"], var.volume.tier)
    error_message = "volume.tier must be STANDARD or HIGH_PERFORMANCE."
  }
}

variable "container" {
  description = "What runs: an image pinned by digest, its disk, plain variables, and variables filled from Runpod secrets (variable = secret name)."
  type = object({
    image      = string
    disk_gb    = optional(number, 50)
    env        = optional(map(string), {})
    secret_env = optional(map(string), {})
  })

  validation {
    condition     = can(regex("^[^@[:space:]]+@sha256:[0-9a-f]{64}$", var.container.image))
    error_message = "container.image must be pinned by digest (registry/name@sha256:...): a tag goes stale on hosts that have pulled it before."
  }

  validation {
    condition     = !anytrue([for name in keys(var.container.env) : can(regex("(KEY|TOKEN|SECRET|PASSWORD)$", name))])
    error_message = "container.env is stored in the clear: move names ending in KEY, TOKEN, SECRET or PASSWORD to container.secret_env."
  }
}

variable "mount_path" {
  description = "Where Pods mount the volume. Serverless workers always mount it at /runpod-volume."
  type        = string
  default     = "/workspace"

  validation {
    condition     = can(regex("^/[a-z][a-z0-9/-]*[a-z0-9]$", var.mount_path))
    error_message = "mount_path must be an absolute path without a trailing slash, for example /workspace."
  }
}

variable "registry" {
  description = "Login of a private image registry, or null. Runpod keeps it; so does the Terraform state."
  type = object({
    username = string
    password = string
  })
  default   = null
  sensitive = true
}

variable "ecr_repository_arns" {
  description = "ECR repositories that Runpod may pull from without a password, by short name."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for arn in values(var.ecr_repository_arns) : can(regex("^arn:aws[a-z-]*:ecr:[a-z0-9-]+:[0-9]{12}:repository/.+$", arn))])
    error_message = "ecr_repository_arns must hold ARNs of the form arn:aws:ecr:REGION:ACCOUNT:repository/NAME."
  }
}
