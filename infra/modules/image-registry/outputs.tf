output "repository_urls" {
  description = "Name -> address to push to."
  value       = { for name, repository in aws_ecr_repository.this : name => repository.repository_url }
  depends_on  = [aws_ecr_lifecycle_policy.this]
}

output "repository_arns" {
  description = "Name -> ARN, for policies and for Runpod's delegation."
  value       = { for name, repository in aws_ecr_repository.this : name => repository.arn }
  depends_on  = [aws_ecr_repository_policy.this]
}

output "push_policy_arn" {
  description = "Policy for the one who builds images."
  value       = aws_iam_policy.push.arn
}
