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

variable "repositories" {
  description = "Images to hold; each gets the repository PREFIX/NAME."
  type        = set(string)
  default     = ["trainer", "gateway"]

  validation {
    condition     = length(var.repositories) > 0 && alltrue([for name in var.repositories : can(regex("^[a-z0-9]+([._-][a-z0-9]+)*$", name))])
    error_message = "repositories must hold at least one name of lower-case letters, digits and single . _ -"
  }
}

variable "kms_key_arn" {
  description = "Key that encrypts the images; null uses the registry's own AES-256."
  type        = string
  default     = null
}

variable "keep_images" {
  description = "Tagged images kept per repository; older ones go."
  type        = number
  default     = 30

  validation {
    condition     = var.keep_images >= 3 && floor(var.keep_images) == var.keep_images
    error_message = "keep_images must be a whole number of at least 3, so that a rollback finds its image."
  }
}

variable "pull_principals" {
  description = "ARNs from other accounts that may pull, for example the user Runpod's delegation names."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.pull_principals : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/.+$", arn))])
    error_message = "pull_principals must be ARNs of IAM roles or users; a whole account (:root) is too wide."
  }
}

variable "force_destroy" {
  description = "Whether destroy may delete repositories that hold images."
  type        = bool
  default     = false
}
