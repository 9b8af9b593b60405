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

variable "network" {
  description = "VPC, private subnets that get an address of each service (one per availability zone: AWS refuses two), and the route tables through which they reach S3."
  type = object({
    vpc_id          = string
    subnet_ids      = list(string)
    route_table_ids = list(string)
  })

  validation {
    condition     = length(var.network.subnet_ids) > 0 && length(var.network.route_table_ids) > 0
    error_message = "network needs at least one of subnet_ids and one of route_table_ids: machines reach S3 by a route."
  }
}

variable "clients" {
  description = "Security groups of the machines that may call the services, by a name of yours."
  type        = map(string)

  validation {
    condition     = length(var.clients) > 0
    error_message = "clients must name at least one security group, or nobody could use the endpoints."
  }
}

variable "services" {
  description = "AWS services with an endpoint beside S3: what a machine calls to fetch its image and write its log, and for keys."
  type        = set(string)
  default     = ["ecr.api", "ecr.dkr", "logs", "sts"]

  validation {
    condition     = alltrue([for name in var.services : can(regex("^[a-z0-9-]+([.][a-z0-9-]+)*$", name)) && name != "s3"])
    error_message = "services must be names such as ecr.api or sagemaker.runtime; S3 has its gateway in any case."
  }
}
