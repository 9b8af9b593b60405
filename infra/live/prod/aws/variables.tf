variable "region" {
  description = "AWS region of everything here."
  type        = string
  default     = "us-east-1"
}

variable "bucket_name" {
  description = "Name of the artifact store; null makes it from prefix, account and region."
  type        = string
  default     = null
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
  description = "The GitHub repository, with its ids when it is younger than 2026-07-15, and the account's GitHub provider if there is one."
  type = object({
    owner         = string
    name          = string
    owner_id      = optional(string)
    repository_id = optional(string)
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
  description = "Digest (sha256:...) of the trainer image; null before the first push."
  type        = string
  default     = null
}

variable "ami_id" {
  description = "Machine image of GPU machines; null takes the newest Deep Learning AMI."
  type        = string
  default     = null
}

variable "reservation" {
  description = "Capacity reservation to start machines in, and whether it is a Capacity Block."
  type = object({
    id             = optional(string)
    capacity_block = optional(bool, false)
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
