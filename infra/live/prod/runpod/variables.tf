variable "datacenter" {
  description = "Runpod datacentre of the volume and of everything that mounts it."
  type        = string
}

variable "gpu_types" {
  description = "GPU ids that training Pods want."
  type        = list(string)
  default     = ["NVIDIA H200"]
}

variable "gpu_stock" {
  description = "Datacentre -> GPU ids in stock, as seen shortly before."
  type        = map(list(string))
  default     = {}
}

variable "volume_size_gb" {
  description = "Size of the model volume. It only grows; one 80B model in bf16 is about 160 GB."
  type        = number
  default     = 300
}

variable "images" {
  description = "Images by digest."
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
