# Planned with the real catalogue: a mock cannot fill a list of objects. Nothing is made.
variables {
  prefix     = "lorry-dev"
  datacenter = "US-KS-2"
  gpu_types  = ["NVIDIA H200"]
  gpu_stock  = { "US-KS-2" = ["NVIDIA H200"], "CA-MTL-1" = [] }
  volume     = { size_gb = 300 }
  container  = { image = "ghcr.io/example/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" }
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = output.volume_s3.endpoint == "https://s3api-us-ks-2.runpod.io/"
    error_message = "The S3 address follows from the datacentre."
  }
  assert {
    condition     = runpod_template.pod.env["LORRY_MODELS"] == "/workspace/models"
    error_message = "The trainer must be told where the models are."
  }
}

run "secret_correct" {
  command = plan
  variables {
    container = { image = "ghcr.io/example/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", secret_env = { HF_TOKEN = "hf" } }
  }
  assert {
    condition     = runpod_template.pod.env["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf }}"
    error_message = "Only the name of a secret may stand here."
  }
}

run "registry_correct" {
  command = plan
  variables {
    registry = { username = "u", password = "p" }
  }
  assert {
    condition     = length(runpod_registry.this) == 1
    error_message = "A login was given."
  }
}

run "delegation_incorrect" {
  command = plan
  variables {
    ecr_repository_arns = { trainer = "lorry/trainer" }
  }
  expect_failures = [var.ecr_repository_arns]
}

run "unknown_datacenter_incorrect" {
  command = plan
  variables {
    datacenter = "US-KS-9"
  }
  expect_failures = [var.datacenter]
}

run "tier_incorrect" {
  command = plan
  variables {
    datacenter = "US-CA-2"
    gpu_stock  = {}
    volume     = { size_gb = 300, tier = "HIGH_PERFORMANCE" }
  }
  expect_failures = [var.datacenter]
}

run "no_s3_incorrect" {
  command = plan
  variables {
    datacenter = "CA-MTL-1"
    gpu_stock  = { "CA-MTL-1" = ["NVIDIA H200"] }
  }
  expect_failures = [var.datacenter]
}

run "no_s3_correct" {
  command = plan
  variables {
    datacenter = "CA-MTL-1"
    gpu_stock  = { "CA-MTL-1" = ["NVIDIA H200"] }
    volume     = { size_gb = 300, s3_api = false }
  }
  assert {
    condition     = output.volume_s3 == null
    error_message = "There is no S3 API to name."
  }
}

run "stock_incorrect" {
  command = plan
  variables {
    gpu_stock = { "US-KS-2" = [] }
  }
  expect_failures = [var.datacenter]
}

run "stock_not_looked_at_incorrect" {
  command = plan
  variables {
    gpu_stock = {}
  }
  expect_failures = [check.gpu_stock_was_looked_at]
}

run "community_gpu_incorrect" {
  command = plan
  variables {
    gpu_types = ["NVIDIA A40"]
  }
  expect_failures = [var.gpu_types]
}

run "no_gpu_incorrect" {
  command = plan
  variables {
    gpu_types = []
  }
  expect_failures = [var.gpu_types]
}

run "size_incorrect" {
  command = plan
  variables {
    volume = { size_gb = 5 }
  }
  expect_failures = [var.volume]
}

run "mount_incorrect" {
  command = plan
  variables {
    mount_path = "workspace/"
  }
  expect_failures = [var.mount_path]
}

run "unpinned_image_incorrect" {
  command = plan
  variables {
    container = { image = "ghcr.io/example/trainer:latest" }
  }
  expect_failures = [var.container]
}

run "clear_secret_incorrect" {
  command = plan
  variables {
    container = { image = "ghcr.io/example/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", env = { HF_TOKEN = "x" } }
  }
  expect_failures = [var.container]
}
