output "role_arn" {
  description = "Role for the workflow's role-to-assume."
  value       = aws_iam_role.actions.arn
  depends_on  = [aws_iam_role_policy_attachment.this]
}

output "provider_arn" {
  description = "The account's GitHub identity provider."
  value       = local._provider
}

output "subjects" {
  description = "The exact subjects that are let in."
  value       = local._subjects
}
