output "endpoint_ids" {
  description = "Endpoint of each service, once the machines may call it."
  value       = merge({ s3 = aws_vpc_endpoint.s3.id }, { for name, endpoint in aws_vpc_endpoint.service : name => endpoint.id })
  depends_on  = [aws_vpc_security_group_ingress_rule.https]
}
