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
  description = "Name of the bucket; null makes it from prefix, account and region. Names are shared by all AWS accounts."
  type        = string
  default     = null

  validation {
    condition     = var.bucket_name == null || can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "bucket_name must be 3 to 63 lower-case letters, digits and hyphens; dots break TLS names."
  }
}

variable "gateway_principals" {
  description = "ARNs of the IAM users or roles that run the front door; they may take the gateway role and, for a job, the trainer role."
  type        = list(string)

  validation {
    condition     = length(var.gateway_principals) > 0 && alltrue([for arn in var.gateway_principals : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/.+$", arn))])
    error_message = "gateway_principals must name at least one IAM role or user by ARN; a whole account (:root) is too wide."
  }
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
  description = "ARNs of the IAM users or roles that may fetch finished adapters, for example the serving side."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.reader_principals : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/.+$", arn))])
    error_message = "reader_principals must be ARNs of IAM roles or users; a whole account (:root) is too wide."
  }
}

variable "launcher_policy_arns" {
  description = "What the front door may rent, by short name: policies of sagemaker-training and ec2-gpu."
  type        = map(string)
  default     = {}
}

variable "workflows" {
  description = "GitHub Actions that launch jobs: the account's GitHub provider and the exact subjects that may take the trainer role, always with a job's session policy."
  type = list(object({
    provider_arn = string
    subjects     = list(string)
  }))
  default = []

  validation {
    condition     = alltrue([for w in var.workflows : length(w.subjects) > 0 && alltrue([for s in w.subjects : can(regex("^repo:[^*?]+:environment:[A-Za-z0-9_-]+$", s))])])
    error_message = "workflows[*].subjects must be of the form repo:OWNER/NAME:environment:NAME, without wildcards: only what is deployed from a named environment launches."
  }
}

variable "retention" {
  description = "Days until tagged checkpoints go, and days until overwritten or deleted data (a deleted client's too) is gone for good."
  type = object({
    checkpoint_days = optional(number, 14)
    deleted_days    = optional(number, 30)
  })
  default = {}

  validation {
    condition     = var.retention.checkpoint_days >= 1 && var.retention.deleted_days >= 1
    error_message = "retention days must be at least 1."
  }
}

variable "force_destroy" {
  description = "Whether destroy may remove a bucket that still holds adapters. Only for throw-away set-ups."
  type        = bool
  default     = false
}
