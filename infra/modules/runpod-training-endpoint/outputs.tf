output "endpoint_id" {
  description = "Id of the queue endpoint for training."
  value       = runpod_serverless_endpoint.this.id
}

output "api_url" {
  description = "Base of the queue's routes (/run, /status/ID, ...), without a trailing slash."
  value       = "https://api.runpod.ai/v2/${runpod_serverless_endpoint.this.id}"
}

output "max_run_hours" {
  description = "The longest job this endpoint lets run."
  value       = var.max_run_hours
}
