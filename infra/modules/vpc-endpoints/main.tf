locals {
  _tags = merge(var.tags, { lorry = var.prefix })
}

resource "aws_vpc_endpoint" "s3" {
  vpc_id            = var.network.vpc_id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = var.network.route_table_ids
  tags              = merge(local._tags, { Name = "${var.prefix}-s3" })
}

resource "aws_vpc_endpoint" "service" {
  for_each = var.services

  vpc_id              = var.network.vpc_id
  service_name        = "com.amazonaws.${var.region}.${each.key}"
  vpc_endpoint_type   = "Interface"
  subnet_ids          = var.network.subnet_ids
  security_group_ids  = [aws_security_group.endpoints.id]
  private_dns_enabled = true
  tags                = merge(local._tags, { Name = "${var.prefix}-${each.key}" })
}

resource "aws_security_group" "endpoints" {
  name        = "${var.prefix}-endpoints"
  description = "AWS services: in over HTTPS from the machines of ${var.prefix}"
  vpc_id      = var.network.vpc_id
  tags        = local._tags
}

resource "aws_vpc_security_group_ingress_rule" "https" {
  for_each = var.clients

  security_group_id            = aws_security_group.endpoints.id
  description                  = "HTTPS from ${each.key}"
  referenced_security_group_id = each.value
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
  tags                         = local._tags
}
