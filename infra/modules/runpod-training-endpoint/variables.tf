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
  description = "The network volume with the base models and the datacentre it lies in; null trains without one."
  type = object({
    id         = string
    datacenter = string
  })
  default = null
}

variable "max_workers" {
  description = "How many jobs may train at once. Zero refuses new jobs without deleting the endpoint."
  type        = number
  default     = 1

  validation {
    condition     = var.max_workers >= 0 && var.max_workers <= 5
    error_message = "max_workers must be from 0 to 5, the cap of a new Runpod account."
  }
}

variable "max_run_hours" {
  description = "A job that runs longer is ended by Runpod. The job's own policy must allow as much."
  type        = number
  default     = 24

  validation {
    condition     = var.max_run_hours > 0 && var.max_run_hours <= 168
    error_message = "max_run_hours must be more than 0 and at most 168: Runpod ends every serverless job after 7 days."
  }
}
