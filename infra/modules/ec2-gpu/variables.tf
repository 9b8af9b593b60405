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

variable "bucket" {
  description = "The artifact store: name, ARN and key. A machine reads its own folder machines/ROLE_ID:INSTANCE_ID/ there and nothing else."
  type = object({
    name        = string
    arn         = string
    kms_key_arn = string
  })
}

variable "network" {
  description = "VPC and subnets for machines. The subnets need a way to S3 and to the image registry."
  type = object({
    vpc_id     = string
    subnet_ids = list(string)
  })

  validation {
    condition     = length(var.network.subnet_ids) > 0
    error_message = "network.subnet_ids must hold at least one subnet."
  }
}

variable "instance_types" {
  description = "What the launcher may rent; the first is the template's own."
  type        = list(string)
  default     = ["p5.48xlarge"]

  validation {
    condition     = length(var.instance_types) > 0 && alltrue([for t in var.instance_types : can(regex("^(p4d|p4de|p5|p5e|p5en|p6-b200|p6-b300|g5|g6|g6e|g7e)\\.[0-9]*x?large$", t))])
    error_message = "instance_types must be EC2 GPU types such as p5.48xlarge or g6e.12xlarge."
  }
}

variable "ami" {
  description = "The machine image: an id, or the SSM parameter that names the newest Deep Learning AMI."
  type = object({
    id            = optional(string)
    ssm_parameter = optional(string, "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id")
  })
  default = {}

  validation {
    condition     = var.ami.id == null || can(regex("^ami-[0-9a-f]{8,17}$", var.ami.id))
    error_message = "ami.id must look like ami-0123456789abcdef0, or be null to use ami.ssm_parameter."
  }
}

variable "image" {
  description = "Trainer image, pinned by digest, and the ARN of its ECR repository (null when it is public)."
  type = object({
    reference      = string
    repository_arn = optional(string)
  })

  validation {
    condition     = can(regex("^[^@[:space:]]+@sha256:[0-9a-f]{64}$", var.image.reference))
    error_message = "image.reference must be pinned by digest (registry/name@sha256:...)."
  }
}

variable "max_hours" {
  description = "A machine shuts itself down after this, whatever runs on it."
  type        = number
  default     = 24

  validation {
    condition     = var.max_hours >= 1 && var.max_hours <= 168
    error_message = "max_hours must be from 1 to 168."
  }
}

variable "root_disk_gb" {
  description = "Root disk; model and checkpoints lie on the instance store, which costs nothing more."
  type        = number
  default     = 200

  validation {
    condition     = var.root_disk_gb >= 100 && var.root_disk_gb <= 16384
    error_message = "root_disk_gb must be from 100 to 16384: the image alone needs about 60."
  }
}

variable "cluster" {
  description = "For jobs over several machines: a cluster placement group, and EFA on this many network cards. One 8-GPU machine needs neither."
  type = object({
    placement_group = optional(bool, false)
    efa_cards       = optional(number, 0)
  })
  default = {}

  validation {
    condition     = var.cluster.efa_cards >= 0 && var.cluster.efa_cards <= 32
    error_message = "cluster.efa_cards must be from 0 to 32, the most network cards a machine has."
  }
}

variable "reservation" {
  description = "Use a capacity reservation by id (capacity_block tells that it is a Capacity Block), or create one that is paid whether used or not. Capacity Blocks are never bought here."
  type = object({
    id             = optional(string)
    capacity_block = optional(bool, false)
    create = optional(object({
      count             = number
      availability_zone = string
      end               = string
    }))
  })
  default = {}

  validation {
    condition     = var.reservation.id == null || var.reservation.create == null
    error_message = "reservation.id and reservation.create exclude each other: use a reservation or make one."
  }

  validation {
    condition     = !var.reservation.capacity_block || var.reservation.id != null
    error_message = "reservation.capacity_block needs reservation.id: Terraform would buy a block anew on every replacement, so buy it by hand and give its id."
  }

  validation {
    condition     = !(var.reservation.capacity_block && var.cluster.placement_group)
    error_message = "reservation.capacity_block and cluster.placement_group exclude each other: a block places its machines itself."
  }

  validation {
    condition     = var.reservation.create == null || can(formatdate("YYYY", var.reservation.create.end))
    error_message = "reservation.create.end must be a time such as 2027-01-31T18:00:00Z: a reservation without an end is billed for ever."
  }
}
