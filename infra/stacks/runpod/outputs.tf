output "datacenter" {
  description = "Runpod datacentre of the volume."
  value       = module.workspace.datacenter
}

output "volume_id" {
  description = "Id of the model volume."
  value       = module.workspace.volume_id
}

output "volume_mount_path" {
  description = "Where Pods mount the volume."
  value       = module.workspace.mount_path
}

output "volume_s3" {
  description = "Endpoint, region and bucket of the volume's S3 API."
  value       = module.workspace.volume_s3
}

output "pod_template_id" {
  description = "Template of training Pods."
  value       = module.workspace.template_id
}

output "registry_id" {
  description = "Registry login of the images, or null."
  value       = module.workspace.registry_id
}

output "gpu_types" {
  description = "GPU ids that training Pods may ask for."
  value       = module.workspace.gpu_types
}

output "training_endpoint_id" {
  description = "Queue endpoint for training."
  value       = module.training.endpoint_id
}

output "training_url" {
  description = "Base of the training endpoint's routes."
  value       = module.training.api_url
}

output "gateway_url" {
  description = "Where the front door answers, or null."
  value       = one(module.gateway[*].url)
}

output "serving_endpoint_id" {
  description = "Queue endpoint that serves the model and its adapters, or null."
  value       = one(module.serving[*].endpoint_id)
}

output "serving_openai_url" {
  description = "Base of the OpenAI-compatible routes, or null."
  value       = one(module.serving[*].openai_url)
}

output "secret_names" {
  description = "Runpod secrets that must exist before anything starts."
  value       = sort(distinct(flatten([for env in values(var.secret_env) : values(env)])))
}
