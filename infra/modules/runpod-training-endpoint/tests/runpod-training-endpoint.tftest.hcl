# Planned with the real catalogue: a mock cannot fill a list of objects. Nothing is made.
variables {
  prefix    = "lorry-dev"
  gpu       = { pools = ["HOPPER_141"] }
  container = { image = "ghcr.io/example/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" }
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = runpod_serverless_endpoint.this.timeout == 86400000
    error_message = "24 hours in milliseconds."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.workers_min == 0 && runpod_serverless_endpoint.this.workers_max == 1
    error_message = "Nothing runs without a job."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.scaling_type == "REQUEST_COUNT"
    error_message = "One worker per job."
  }
}

run "volume_correct" {
  command = plan
  variables {
    volume = { id = "v", datacenter = "US-KS-2" }
  }
  assert {
    condition     = runpod_serverless_endpoint.this.data_center_ids == tolist(["US-KS-2"])
    error_message = "Workers must run where the volume is."
  }
}

run "pool_incorrect" {
  command = plan
  variables {
    gpu = { pools = ["HOPPER"] }
  }
  expect_failures = [var.gpu]
}

run "count_incorrect" {
  command = plan
  variables {
    gpu = { pools = ["HOPPER_141"], count = 9 }
  }
  expect_failures = [var.gpu]
}

run "workers_incorrect" {
  command = plan
  variables {
    max_workers = 6
  }
  expect_failures = [var.max_workers]
}

run "hours_incorrect" {
  command = plan
  variables {
    max_run_hours = 200
  }
  expect_failures = [var.max_run_hours]
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
