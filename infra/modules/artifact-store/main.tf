data "aws_caller_identity" "this" {}

data "aws_partition" "this" {}

locals {
  _tags    = merge(var.tags, { lorry = var.prefix })
  _account = data.aws_caller_identity.this.account_id
  _root    = "arn:${data.aws_partition.this.partition}:iam::${local._account}:root"
  _name    = coalesce(var.bucket_name, "${var.prefix}-artifacts-${local._account}-${var.region}")
}

resource "aws_kms_key" "this" {
  description             = "${var.prefix}: training sets, checkpoints and adapters"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  tags                    = local._tags

  # The account decides through IAM; without this statement nobody could manage the key.
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "AccountDecidesThroughIam"
      Effect    = "Allow"
      Principal = { AWS = local._root }
      Action    = "kms:*"
      Resource  = "*"
    }]
  })
}

resource "aws_kms_alias" "this" {
  name          = "alias/${var.prefix}-artifacts"
  target_key_id = aws_kms_key.this.key_id
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_18:Access logs need a second bucket; CloudTrail data events are the account's choice
  #checkov:skip=CKV_AWS_144:An adapter can be trained again from its recipe; a copy in another region is not worth its price
  #checkov:skip=CKV2_AWS_62:Nothing listens: every verb reads the job folder itself
  bucket        = local._name
  force_destroy = var.force_destroy
  tags          = local._tags
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "this" {
  bucket = aws_s3_bucket.this.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.this.arn
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  bucket = aws_s3_bucket.this.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "OnlyOverTls"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })

  depends_on = [aws_s3_bucket_public_access_block.this]
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    id     = "checkpoints"
    status = "Enabled"

    filter {
      tag {
        key   = "lorry-kind"
        value = "checkpoint"
      }
    }

    expiration {
      days = var.retention.checkpoint_days
    }
  }

  # A machine reads its launch folder once, minutes after it starts.
  rule {
    id     = "launch-folders"
    status = "Enabled"

    filter {
      prefix = "machines/"
    }

    expiration {
      days = 3
    }
  }

  rule {
    id     = "deleted-data-and-broken-uploads"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.retention.deleted_days
    }

    expiration {
      expired_object_delete_marker = true
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 3
    }
  }

  depends_on = [aws_s3_bucket_versioning.this]
}
