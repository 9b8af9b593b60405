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
    disk_gb     = optional(number, 10)
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

variable "cpu" {
  description = "The CPU machine of a worker."
  type = object({
    type  = optional(string, "cpu3c")
    vcpus = optional(number, 2)
  })
  default = {}

  validation {
    condition     = var.cpu.vcpus >= 2 && floor(var.cpu.vcpus) == var.cpu.vcpus
    error_message = "cpu.vcpus must be a whole number of at least 2, Runpod's smallest CPU worker."
  }
}

variable "port" {
  description = "The HTTP port that the front door listens on; /ping there must answer 200."
  type        = number
  default     = 8000

  validation {
    condition     = var.port >= 1024 && var.port <= 65535
    error_message = "port must be from 1024 to 65535."
  }
}

variable "workers" {
  description = "How far it scales, how many requests one worker takes at once, and after how many idle seconds it goes."
  type = object({
    max                 = optional(number, 2)
    requests_per_worker = optional(number, 20)
    idle_seconds        = optional(number, 60)
  })
  default = {}

  validation {
    condition     = var.workers.max >= 1 && var.workers.max <= 5
    error_message = "workers.max must be from 1 to 5: a front door of 0 workers answers nobody."
  }

  validation {
    condition     = var.workers.idle_seconds >= 1 && var.workers.idle_seconds <= 3600
    error_message = "workers.idle_seconds must be from 1 to 3600."
  }
}

variable "datacenters" {
  description = "Where workers may run; empty means anywhere."
  type        = list(string)
  default     = []
}
