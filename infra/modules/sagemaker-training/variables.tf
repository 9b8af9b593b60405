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

variable "data_policy_arn" {
  description = "Policy for training sets, models and adapters; the artifact store's trainer_policy_arn."
  type        = string

  validation {
    condition     = can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:policy/.+$", var.data_policy_arn))
    error_message = "data_policy_arn must be the ARN of an IAM policy."
  }
}

variable "repository_arns" {
  description = "ECR repositories that jobs may pull their image from."
  type        = list(string)
  default     = []
}

variable "network" {
  description = "VPC and subnets for jobs, or null to run in SageMaker's own network. The subnets need a way to S3, ECR and logs."
  type = object({
    vpc_id     = string
    subnet_ids = list(string)
  })
  default = null

  validation {
    condition     = var.network == null || try(length(var.network.subnet_ids) > 0, false)
    error_message = "network.subnet_ids must hold at least one subnet, or set network to null."
  }
}

variable "log_group" {
  description = "SageMaker writes every job of the account to one log group; create it here once per account to give it an end."
  type = object({
    create         = optional(bool, true)
    retention_days = optional(number, 365)
  })
  default = {}

  validation {
    condition     = contains([30, 60, 90, 120, 150, 180, 365, 400, 545, 731], var.log_group.retention_days)
    error_message = "log_group.retention_days must be 30, 60, 90, 120, 150, 180, 365, 400, 545 or 731, the terms CloudWatch knows."
  }
}

variable "limits" {
  description = "What the launcher may rent: instance types, and hours per job."
  type = object({
    instance_types = list(string)
    max_run_hours  = optional(number, 24)
  })

  validation {
    condition     = length(var.limits.instance_types) > 0 && alltrue([for t in var.limits.instance_types : startswith(t, "ml.")])
    error_message = "limits.instance_types must hold SageMaker types such as ml.p5.48xlarge; an EC2 type lacks the ml. in front."
  }

  validation {
    condition     = var.limits.max_run_hours >= 1 && var.limits.max_run_hours <= 672
    error_message = "limits.max_run_hours must be from 1 to 672: SageMaker ends every job after 28 days."
  }
}
