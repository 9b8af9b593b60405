variable "prefix" {
  description = "Starts every name, so that what is ours can be told from what is not."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.prefix))
    error_message = "prefix must be 2 to 31 characters: a lower-case letter, then lower-case letters, digits and hyphens."
  }
}

variable "container" {
  description = "What runs: an image pinned by digest, its disk, plain variables, and variables filled from Runpod secrets (variable = secret name)."
  type = object({
    image       = string
    disk_gb     = optional(number, 50)
    registry_id = optional(string)
    env         = optional(map(string), {})
    secret_env  = optional(map(string), {})
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

variable "gpu" {
  description = "GPU pools in order of preference, GPUs per worker, and the least CUDA version of the host."
  type = object({
    pools            = list(string)
    count            = optional(number, 1)
    excluded_types   = optional(list(string))
    min_cuda_version = optional(string)
  })

  validation {
    condition     = length(var.gpu.pools) > 0 && alltrue([for pool in var.gpu.pools : contains(local._pools, pool)])
    error_message = "gpu.pools must hold at least one pool that Runpod's catalogue knows: ${join(", ", local._pools)}."
  }

  validation {
    condition     = var.gpu.count >= 1 && var.gpu.count <= 8
    error_message = "gpu.count must be from 1 to 8: one worker is one machine."
  }
}

variable "volume" {
  description = "The network volume with the base model and the adapters, and the datacentre it lies in."
  type = object({
    id         = string
    datacenter = string
  })
}

variable "model" {
  description = "Folder of the base model on the volume, the name clients use for it, and the longest context in tokens."
  type = object({
    path        = string
    served_name = string
    max_tokens  = optional(number, 32768)
  })

  validation {
    condition     = startswith(var.model.path, "/runpod-volume/")
    error_message = "model.path must lie under /runpod-volume/, where serverless workers mount the volume; a missing folder would be taken for a name to download."
  }
}

variable "lora" {
  description = "Adapters to load at start (name, folder on the volume), how many may be active at once, and the highest rank. vLLM takes memory for the experts of all of them at that rank, used or not: 2 x rank 16 are 11 GiB on Qwen3-Next-80B, 4 x rank 64 would be 90."
  type = object({
    adapters = optional(list(object({ name = string, path = string })), [])
    active   = optional(number, 2)
    max_rank = optional(number, 16)
  })
  default = {}

  validation {
    condition     = contains([8, 16, 32, 64, 128, 256], var.lora.max_rank)
    error_message = "lora.max_rank must be 8, 16, 32, 64, 128 or 256, the ranks vLLM knows."
  }

  validation {
    condition     = alltrue([for adapter in var.lora.adapters : startswith(adapter.path, "/runpod-volume/")])
    error_message = "lora.adapters: every path must lie under /runpod-volume/; vLLM cannot read s3:// paths."
  }
}

variable "workers" {
  description = "How far it scales, after how many idle seconds a worker goes, and how many seconds a start may take."
  type = object({
    max             = optional(number, 1)
    idle_seconds    = optional(number, 300)
    startup_seconds = optional(number, 3600)
  })
  default = {}

  validation {
    condition     = var.workers.max >= 0 && var.workers.max <= 5
    error_message = "workers.max must be from 0 to 5, the cap of a new Runpod account."
  }

  validation {
    condition     = var.workers.idle_seconds >= 1 && var.workers.idle_seconds <= 3600
    error_message = "workers.idle_seconds must be from 1 to 3600."
  }
}
