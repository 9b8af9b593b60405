output "role_arn" {
  description = "Execution role of jobs, once it holds all it needs."
  value       = aws_iam_role.execution.arn
  depends_on  = [aws_iam_role_policy.machine, aws_iam_role_policy_attachment.data]
}

output "launcher_policy_arn" {
  description = "Policy for the one who submits jobs."
  value       = aws_iam_policy.launcher.arn
}

output "job_name_prefix" {
  description = "Job names must start with this; the launcher may not use others."
  value       = "${var.prefix}-"
}

output "vpc_config" {
  description = "Subnets and SecurityGroupIds for CreateTrainingJob, or null."
  value = var.network == null ? null : {
    Subnets          = var.network.subnet_ids
    SecurityGroupIds = aws_security_group.jobs[*].id
  }
  depends_on = [
    aws_vpc_security_group_egress_rule.https,
    aws_vpc_security_group_egress_rule.hosts,
    aws_vpc_security_group_ingress_rule.hosts,
  ]
}

output "log_group" {
  description = "Where SageMaker writes job logs."
  value       = local._log_group
  depends_on  = [aws_cloudwatch_log_group.jobs]
}
