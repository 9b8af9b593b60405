variable "prefix" {
  description = "Starts every name, so that what is ours can be told from what is not."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.prefix))
    error_message = "prefix must be 2 to 31 characters: a lower-case letter, then lower-case letters, digits and hyphens."
  }
}

variable "datacenter" {
  description = "Runpod datacentre of the volume, and so of every job and of the serving endpoint."
  type        = string
}

variable "gpu_types" {
  description = "GPU ids that training Pods want."
  type        = list(string)
}

variable "gpu_stock" {
  description = "Datacentre -> GPU ids in stock, as seen shortly before; empty means not looked at."
  type        = map(list(string))
  default     = {}
}

variable "volume_size_gb" {
  description = "Size of the model volume. It only grows."
  type        = number
}

variable "images" {
  description = "Images by digest. A null gateway or serving image leaves that endpoint out."
  type = object({
    trainer = string
    gateway = optional(string)
    serving = optional(string)
  })
}

variable "registry" {
  description = "Login of the private registry of the images, or null."
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
}

variable "training" {
  description = "The serverless training endpoint: GPU pools, GPUs per job, jobs at once, hours per job."
  type = object({
    pools         = list(string)
    gpus          = optional(number, 1)
    max_workers   = optional(number, 1)
    max_run_hours = optional(number, 24)
  })
}

variable "serving" {
  description = "The serving endpoint: GPU pools, GPUs per worker, base model, adapters, how many at once, and their highest rank."
  type = object({
    pools      = list(string)
    gpus       = optional(number, 1)
    model_path = string
    model_name = string
    max_tokens = optional(number, 32768)
    adapters   = optional(list(object({ name = string, path = string })), [])
    active     = optional(number, 2)
    max_rank   = optional(number, 16)
  })
}

variable "env" {
  description = "Plain variables of the trainer and of the gateway."
  type = object({
    trainer = optional(map(string), {})
    gateway = optional(map(string), {})
  })
  default = {}
}

variable "secret_env" {
  description = "Variables filled from Runpod secrets (variable = secret name), per container."
  type = object({
    trainer = optional(map(string), {})
    gateway = optional(map(string), {})
    serving = optional(map(string), {})
  })
  default = {}
}
