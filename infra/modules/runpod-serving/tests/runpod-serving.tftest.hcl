# Planned with the real catalogue: a mock cannot fill a list of objects. Nothing is made.
variables {
  prefix    = "lorry-dev"
  gpu       = { pools = ["HOPPER_141"], count = 2 }
  volume    = { id = "v", datacenter = "US-KS-2" }
  model     = { path = "/runpod-volume/models/a", served_name = "a" }
  container = { image = "ghcr.io/example/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" }
}

run "defaults_correct" {
  command = plan
  variables {
    lora = { adapters = [{ name = "x", path = "/runpod-volume/adapters/x" }] }
  }
  assert {
    condition     = jsondecode(runpod_serverless_endpoint.this.env["LORA_MODULES"])[0].name == "x"
    error_message = "The adapters go in as a JSON list."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.env["MAX_LORAS"] == "2" && runpod_serverless_endpoint.this.env["MAX_LORA_RANK"] == "16"
    error_message = "A live adapter and a canary, at the rank of the recipes."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.env["TENSOR_PARALLEL_SIZE"] == "2"
    error_message = "The model is split over the GPUs of a worker."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.timeout == 4200000
    error_message = "A request waits for a cold start."
  }
}

run "model_incorrect" {
  command = plan
  variables {
    model = { path = "Qwen/Qwen3", served_name = "a" }
  }
  expect_failures = [var.model]
}

run "adapter_incorrect" {
  command = plan
  variables {
    lora = { adapters = [{ name = "x", path = "s3://bucket/x" }] }
  }
  expect_failures = [var.lora]
}

run "rank_incorrect" {
  command = plan
  variables {
    lora = { max_rank = 48 }
  }
  expect_failures = [var.lora]
}

run "pool_incorrect" {
  command = plan
  variables {
    gpu = { pools = [] }
  }
  expect_failures = [var.gpu]
}

run "count_incorrect" {
  command = plan
  variables {
    gpu = { pools = ["HOPPER_141"], count = 0 }
  }
  expect_failures = [var.gpu]
}

run "workers_incorrect" {
  command = plan
  variables {
    workers = { max = 9 }
  }
  expect_failures = [var.workers]
}

run "idle_incorrect" {
  command = plan
  variables {
    workers = { idle_seconds = 0 }
  }
  expect_failures = [var.workers]
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
