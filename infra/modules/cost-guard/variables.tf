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

variable "monthly_limit_usd" {
  description = "Budget of the whole account for a month, in US dollars."
  type        = number

  validation {
    condition     = var.monthly_limit_usd > 0
    error_message = "monthly_limit_usd must be more than 0."
  }
}

variable "alert_emails" {
  description = "Who is told."
  type        = list(string)

  validation {
    condition     = length(var.alert_emails) > 0 && length(var.alert_emails) <= 10 && alltrue([for a in var.alert_emails : can(regex("^[^@[:space:]]+@[^@[:space:]]+$", a))])
    error_message = "alert_emails must hold 1 to 10 e-mail addresses: an alert without a reader is none."
  }
}

variable "thresholds_percent" {
  description = "Shares of the budget that are reported once spent; the forecast is reported at 100."
  type        = list(number)
  default     = [50, 80, 100]

  validation {
    condition     = length(var.thresholds_percent) > 0 && alltrue([for t in var.thresholds_percent : t > 0 && t <= 1000])
    error_message = "thresholds_percent must hold numbers above 0 and at most 1000."
  }
}

variable "billing_alarm_usd" {
  description = "Alarm when the account's estimated charges of the month pass this; null leaves the alarm out."
  type        = number
  default     = null

  validation {
    condition     = var.billing_alarm_usd == null || var.region == "us-east-1"
    error_message = "billing_alarm_usd works in us-east-1 only, where AWS keeps its billing metrics; set it to null in ${var.region}."
  }
}
