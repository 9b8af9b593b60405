output "launch_template_id" {
  description = "Launch template, once its role may read and its group lets it out."
  value       = aws_launch_template.this.id
  depends_on = [
    aws_iam_role_policy.machine,
    aws_vpc_security_group_egress_rule.https,
    aws_vpc_security_group_egress_rule.nodes,
    aws_vpc_security_group_ingress_rule.nodes,
  ]
}

output "subnet_ids" {
  description = "Subnets a machine may start in."
  value       = var.network.subnet_ids
}

output "security_group_id" {
  description = "Group of the machines."
  value       = aws_security_group.machine.id
}

output "placement_group" {
  description = "Cluster placement group for jobs over several machines, or null."
  value       = one(aws_placement_group.this[*].name)
}

output "instance_types" {
  description = "Types the launcher may rent."
  value       = var.instance_types
}

output "launcher_policy_arn" {
  description = "Policy for the one who starts machines."
  value       = aws_iam_policy.launcher.arn
}

output "machine_role_id" {
  description = "First half of the name of a machine's launch folder: machines/<machine_role_id>:<instance id>/."
  value       = aws_iam_role.machine.unique_id
}

output "max_hours" {
  description = "After this a machine shuts itself down."
  value       = var.max_hours
}

output "user_data" {
  description = "What a machine runs at its first start, in plain text; it holds no secret."
  value       = local._user_data
}
