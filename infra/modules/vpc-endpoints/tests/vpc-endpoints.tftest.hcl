mock_provider "aws" {
  source          = "../../mocks/aws"
  override_during = plan
}

variables {
  prefix  = "lorry-dev"
  region  = "us-east-1"
  network = { vpc_id = "vpc-1", subnet_ids = ["subnet-1", "subnet-2"], route_table_ids = ["rtb-1"] }
  clients = { sagemaker = "sg-1", ec2 = "sg-2" }
}

run "defaults_correct" {
  command = plan
  assert {
    condition     = toset(keys(output.endpoint_ids)) == toset(["s3", "ecr.api", "ecr.dkr", "logs", "sts"])
    error_message = "A machine in a private subnet needs exactly these to train."
  }
  assert {
    condition     = aws_vpc_endpoint.s3.vpc_endpoint_type == "Gateway" && aws_vpc_endpoint.s3.route_table_ids == toset(["rtb-1"])
    error_message = "S3 is reached by a route, which costs nothing."
  }
  assert {
    condition = alltrue([for endpoint in aws_vpc_endpoint.service :
    endpoint.private_dns_enabled && endpoint.subnet_ids == toset(["subnet-1", "subnet-2"]) && endpoint.security_group_ids == toset([aws_security_group.endpoints.id])])
    error_message = "The services' own names must lead to them, in every subnet, and through the group."
  }
  assert {
    condition = alltrue([for name, rule in aws_vpc_security_group_ingress_rule.https :
    rule.from_port == 443 && rule.to_port == 443 && rule.referenced_security_group_id == var.clients[name]])
    error_message = "Only the machines may call them, and only over HTTPS."
  }
}

run "services_correct" {
  command = plan
  variables {
    services = ["sagemaker.runtime"]
  }
  assert {
    condition     = aws_vpc_endpoint.service["sagemaker.runtime"].service_name == "com.amazonaws.us-east-1.sagemaker.runtime"
    error_message = "The name of a service is that of its region."
  }
}

run "services_incorrect" {
  command = plan
  variables {
    services = ["s3"]
  }
  expect_failures = [var.services]
}

run "network_incorrect" {
  command = plan
  variables {
    network = { vpc_id = "vpc-1", subnet_ids = ["subnet-1"], route_table_ids = [] }
  }
  expect_failures = [var.network]
}

run "clients_incorrect" {
  command = plan
  variables {
    clients = {}
  }
  expect_failures = [var.clients]
}
