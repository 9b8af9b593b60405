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

variable "repository" {
  description = "The GitHub repository. Repositories made, renamed or moved after 2026-07-15 sign with their ids: give both."
  type = object({
    owner         = string
    name          = string
    owner_id      = optional(string)
    repository_id = optional(string)
  })

  validation {
    condition     = can(regex("^[A-Za-z0-9-]+$", var.repository.owner)) && can(regex("^[A-Za-z0-9._-]+$", var.repository.name))
    error_message = "repository.owner and repository.name must be plain names without wildcards: a wildcard would let other repositories in."
  }

  validation {
    condition     = (var.repository.owner_id == null) == (var.repository.repository_id == null)
    error_message = "repository.owner_id and repository.repository_id belong together: give both or neither."
  }

  validation {
    condition     = can(regex("^[0-9]+$", coalesce(var.repository.owner_id, "0"))) && can(regex("^[0-9]+$", coalesce(var.repository.repository_id, "0")))
    error_message = "repository.owner_id and repository.repository_id must be numbers."
  }
}

variable "subjects" {
  description = "Which runs may take the role: environment:NAME or ref:refs/heads/BRANCH."
  type        = list(string)

  validation {
    condition     = length(var.subjects) > 0 && alltrue([for s in var.subjects : can(regex("^(environment:[A-Za-z0-9_-]+|ref:refs/(heads|tags)/[A-Za-z0-9._/-]+)$", s))])
    error_message = "subjects must be of the form environment:NAME or ref:refs/heads/BRANCH, without wildcards; pull requests run code that nobody has read yet."
  }
}

variable "policy_arns" {
  description = "What those runs may do, by short name."
  type        = map(string)
}

variable "provider_arn" {
  description = "ARN of the account's GitHub identity provider when it exists already (an account has only one); null makes it."
  type        = string
  default     = null
}
