variable "prefix" {
  description = "Starts every name, so that what is ours can be told from what is not."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.prefix))
    error_message = "prefix must be 2 to 31 characters: a lower-case letter, then lower-case letters, digits and hyphens."
  }
}

variable "tags" {
  description = "Tags of everything that can carry tags; the tag lorry = prefix is added."
  type        = map(string)
  default     = {}
}

variable "region" {
  description = "AWS region of the provider, for names and policies that spell it out."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be an AWS region such as us-east-1."
  }
}

variable "bucket_name" {
  description = "Name of the artifact store; null makes it from prefix, account and region."
  type        = string
  default     = null
}

variable "retention" {
  description = "Days until checkpoints go, and days until deleted data is gone for good."
  type = object({
    checkpoint_days = optional(number, 14)
    deleted_days    = optional(number, 30)
  })
  default = {}
}

variable "force_destroy" {
  description = "Whether destroy may remove a bucket that still holds adapters."
  type        = bool
  default     = false
}

variable "gateway_principals" {
  description = "ARNs of the IAM users or roles that run the front door."
  type        = list(string)
}

variable "users" {
  description = "Names of IAM users that get the rights themselves: front_door those of the gateway, machines those of a training job (for keys on machines that no front door starts)."
  type = object({
    front_door = optional(string)
    machines   = optional(string)
  })
  default = {}
}

variable "reader_principals" {
  description = "ARNs of the IAM users or roles that may fetch finished adapters."
  type        = list(string)
  default     = []
}

variable "github" {
  description = "The GitHub repository whose Actions build images, launch and reap; and the account's GitHub provider if there is one."
  type = object({
    owner         = string
    name          = string
    owner_id      = optional(string)
    repository_id = optional(string)
    subjects      = list(string)
    provider_arn  = optional(string)
  })
}

variable "network" {
  description = "VPC and subnets of GPU machines; endpoints puts the AWS services that they call into the subnets, off by default."
  type = object({
    vpc_id     = string
    subnet_ids = list(string)
    endpoints  = optional(object({ route_table_ids = list(string) }))
  })
}

variable "trainer_digest" {
  description = "Digest (sha256:...) of the trainer image in this set-up's registry; null until the first image is pushed leaves EC2 out."
  type        = string
  default     = null
}

variable "ec2" {
  description = "GPU machines: types, image id, hours, a reservation to use, and what jobs over several machines need."
  type = object({
    instance_types = optional(list(string), ["p5.48xlarge"])
    ami_id         = optional(string)
    max_hours      = optional(number, 24)
    reservation_id = optional(string)
    capacity_block = optional(bool, false)
    cluster        = optional(object({ placement_group = optional(bool, false), efa_cards = optional(number, 0) }), {})
  })
  default = {}
}

variable "sagemaker" {
  description = "SageMaker training: types, hours, and whether this set-up owns the account's log group."
  type = object({
    instance_types   = optional(list(string), ["ml.p5.48xlarge"])
    max_run_hours    = optional(number, 24)
    create_log_group = optional(bool, true)
  })
  default = {}
}

variable "budget" {
  description = "Monthly limit in US dollars, who is told, and the billing alarm (us-east-1 only)."
  type = object({
    monthly_limit_usd = number
    alert_emails      = list(string)
    billing_alarm_usd = optional(number)
  })
}
