output "endpoint_id" {
  description = "Id of the load-balancer endpoint of the front door."
  value       = runpod_serverless_endpoint.this.id
}

output "url" {
  description = "Where the front door answers, without a trailing slash."
  value       = "https://${runpod_serverless_endpoint.this.id}.api.runpod.ai"
}
