output "volume_id" {
  description = "Id of the network volume."
  value       = runpod_network_volume.this.id
}

output "datacenter" {
  description = "Where the volume is; Pods and workers that mount it must run there."
  value       = runpod_network_volume.this.data_center
}

output "mount_path" {
  description = "Where Pods mount the volume."
  value       = var.mount_path
}

output "volume_s3" {
  description = "How to reach the volume's files from outside: endpoint, region and bucket; null without the S3 API."
  value = var.volume.s3_api ? {
    endpoint = "https://s3api-${lower(runpod_network_volume.this.data_center)}.runpod.io/"
    region   = runpod_network_volume.this.data_center
    bucket   = runpod_network_volume.this.id
  } : null
}

output "template_id" {
  description = "Id of the Pod template, once Runpod may pull its image."
  value       = runpod_template.pod.id
  depends_on  = [runpod_registry_delegation.this]
}

output "registry_id" {
  description = "Id of the registry login, or null."
  value       = one(runpod_registry.this[*].id)
}

output "gpu_types" {
  description = "GPU ids that this place was checked for."
  value       = var.gpu_types
}
