output "bucket" {
  description = "Name of the bucket, once it is encrypted, versioned, private and TLS-only."
  value       = aws_s3_bucket.this.id
  depends_on = [
    aws_s3_bucket_policy.this,
    aws_s3_bucket_public_access_block.this,
    aws_s3_bucket_server_side_encryption_configuration.this,
    aws_s3_bucket_versioning.this,
  ]
}

output "bucket_arn" {
  description = "ARN of the bucket."
  value       = aws_s3_bucket.this.arn
}

output "kms_key_arn" {
  description = "Key that encrypts the bucket."
  value       = aws_kms_key.this.arn
}

output "gateway_role_arn" {
  description = "Role of the front door."
  value       = aws_iam_role.gateway.arn
  depends_on  = [aws_iam_role_policy_attachment.gateway, aws_iam_role_policy_attachment.launcher]
}

output "gateway_policy_arn" {
  description = "Policy of the gateway role, for the cron that looks after jobs."
  value       = aws_iam_policy.gateway.arn
}

output "trainer_role_arn" {
  description = "Role of one training job; take it with trainer_session_policy."
  value       = aws_iam_role.trainer.arn
  depends_on  = [aws_iam_role_policy_attachment.trainer]
}

output "trainer_policy_arn" {
  description = "Policy of the trainer role, for machines that cannot take a session."
  value       = aws_iam_policy.trainer.arn
}

output "trainer_session_policy" {
  description = "Session policy as JSON text: put the job's prefix (jobs/JOB, or jobs/clients/CLIENT/jobs/JOB) in place of JOB_PREFIX."
  value       = jsonencode(local._trainer.session)
}

output "reader_role_arn" {
  description = "Role that fetches adapters, or null."
  value       = one(aws_iam_role.reader[*].arn)
}
