# Planned with the real catalogue: a mock cannot fill a list of objects. Nothing is made.
variables {
  prefix    = "lorry-dev"
  container = { image = "ghcr.io/example/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" }
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = runpod_serverless_endpoint.this.endpoint_type == "LOAD_BALANCER"
    error_message = "The front door speaks HTTP itself."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.workers_min == 0
    error_message = "It must scale to zero."
  }
  assert {
    condition     = runpod_serverless_endpoint.this.env["PORT_HEALTH"] == "8000"
    error_message = "The load balancer must know where to ping."
  }
}

run "cpu_incorrect" {
  command = plan
  variables {
    cpu = { vcpus = 1 }
  }
  expect_failures = [var.cpu]
}

run "port_incorrect" {
  command = plan
  variables {
    port = 80
  }
  expect_failures = [var.port]
}

run "workers_incorrect" {
  command = plan
  variables {
    workers = { max = 0 }
  }
  expect_failures = [var.workers]
}

run "idle_incorrect" {
  command = plan
  variables {
    workers = { idle_seconds = 4000 }
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
