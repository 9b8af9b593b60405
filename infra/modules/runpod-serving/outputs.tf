output "endpoint_id" {
  description = "Id of the queue endpoint that serves the base model and its adapters."
  value       = runpod_serverless_endpoint.this.id
}

output "api_url" {
  description = "Base of the queue's routes, without a trailing slash."
  value       = "https://api.runpod.ai/v2/${runpod_serverless_endpoint.this.id}"
}

output "openai_url" {
  description = "Base of the OpenAI-compatible routes."
  value       = "https://api.runpod.ai/v2/${runpod_serverless_endpoint.this.id}/openai/v1"
}
