output "region" {
  description = "AWS region of everything here."
  value       = var.region
}

output "store_url" {
  description = "LORRY_STORE: where jobs live; a client's are below it, in clients/CLIENT/jobs."
  value       = "s3://${module.store.bucket}/jobs"
}

output "kms_key_arn" {
  description = "Key that encrypts the artifact store."
  value       = module.store.kms_key_arn
}

output "gateway_role_arn" {
  description = "Role of the front door."
  value       = module.store.gateway_role_arn
}

output "trainer_role_arn" {
  description = "Role of one training job, always taken with trainer_session_policy."
  value       = module.store.trainer_role_arn
}

output "trainer_session_policy" {
  description = "Session policy (JSON text) with JOB_PREFIX where the job's prefix goes."
  value       = module.store.trainer_session_policy
}

output "reader_role_arn" {
  description = "Role that fetches adapters, or null."
  value       = module.store.reader_role_arn
}

output "repository_urls" {
  description = "Image name -> address to push to."
  value       = module.registry.repository_urls
}

output "repository_arns" {
  description = "Image name -> ARN, for Runpod's delegation."
  value       = module.registry.repository_arns
}

output "sagemaker_role_arn" {
  description = "Execution role of SageMaker training jobs."
  value       = module.sagemaker.role_arn
}

output "sagemaker_job_name_prefix" {
  description = "Names of SageMaker training jobs must start with this."
  value       = module.sagemaker.job_name_prefix
}

output "sagemaker_vpc_config" {
  description = "VpcConfig of CreateTrainingJob."
  value       = module.sagemaker.vpc_config
}

output "ec2_launch_template_id" {
  description = "Launch template of GPU machines, or null before the first image."
  value       = one(module.ec2[*].launch_template_id)
}

output "ec2_machine_role_id" {
  description = "First half of the name of a machine's launch folder, or null."
  value       = one(module.ec2[*].machine_role_id)
}

output "ec2_instance_types" {
  description = "EC2 types that may be rented."
  value       = flatten(module.ec2[*].instance_types)
}

output "ec2_security_group_id" {
  description = "Group of GPU machines, or null."
  value       = one(module.ec2[*].security_group_id)
}

output "ec2_placement_group" {
  description = "Cluster placement group for jobs over several machines, or null."
  value       = one(module.ec2[*].placement_group)
}

output "ec2_max_hours" {
  description = "After this a GPU machine shuts itself down, or null."
  value       = one(module.ec2[*].max_hours)
}

output "ec2_subnet_ids" {
  description = "Subnets GPU machines may start in."
  value       = flatten(module.ec2[*].subnet_ids)
}

output "github_role_arn" {
  description = "Role for role-to-assume in GitHub Actions."
  value       = module.github.role_arn
}

output "alerts_topic_arn" {
  description = "SNS topic of cost alerts."
  value       = module.cost.topic_arn
}
