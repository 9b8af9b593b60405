locals {
  # To launch within the limits: for the front door, and for GitHub Actions.
  _launchers = merge(
    { sagemaker = module.sagemaker.launcher_policy_arn },
    { for name, arn in { ec2 = one(module.ec2[*].launcher_policy_arn) } : name => arn if var.trainer_digest != null },
  )
}

module "store" {
  source = "../../modules/artifact-store"

  prefix             = var.prefix
  tags               = var.tags
  region             = var.region
  bucket_name        = var.bucket_name
  gateway_principals = var.gateway_principals
  users              = var.users
  reader_principals  = var.reader_principals
  retention          = var.retention
  force_destroy      = var.force_destroy

  launcher_policy_arns = local._launchers
  workflows = [{
    provider_arn = module.github.provider_arn
    subjects     = [for subject in module.github.subjects : subject if strcontains(subject, ":environment:")]
  }]
}

module "registry" {
  source = "../../modules/image-registry"

  prefix        = var.prefix
  tags          = var.tags
  kms_key_arn   = module.store.kms_key_arn
  force_destroy = var.force_destroy
}

module "sagemaker" {
  source = "../../modules/sagemaker-training"

  prefix          = var.prefix
  tags            = var.tags
  region          = var.region
  data_policy_arn = module.store.trainer_policy_arn
  repository_arns = [module.registry.repository_arns["trainer"]]
  network         = var.network
  log_group       = { create = var.sagemaker.create_log_group }
  limits          = { instance_types = var.sagemaker.instance_types, max_run_hours = var.sagemaker.max_run_hours }
}

module "ec2" {
  source = "../../modules/ec2-gpu"
  count  = var.trainer_digest == null ? 0 : 1

  prefix         = var.prefix
  tags           = var.tags
  region         = var.region
  network        = var.network
  bucket         = { name = module.store.bucket, arn = module.store.bucket_arn, kms_key_arn = module.store.kms_key_arn }
  image          = { reference = "${module.registry.repository_urls["trainer"]}@${var.trainer_digest}", repository_arn = module.registry.repository_arns["trainer"] }
  instance_types = var.ec2.instance_types
  ami            = { id = var.ec2.ami_id }
  max_hours      = var.ec2.max_hours
  reservation    = { id = var.ec2.reservation_id, capacity_block = var.ec2.capacity_block }
  cluster        = var.ec2.cluster
}

module "endpoints" {
  source = "../../modules/vpc-endpoints"
  count  = var.network.endpoints == null ? 0 : 1

  prefix  = var.prefix
  tags    = var.tags
  region  = var.region
  network = { vpc_id = var.network.vpc_id, subnet_ids = var.network.subnet_ids, route_table_ids = var.network.endpoints.route_table_ids }
  clients = merge(
    { sagemaker = module.sagemaker.vpc_config.SecurityGroupIds[0] },
    { for machine in module.ec2 : "ec2" => machine.security_group_id },
  )
}

module "github" {
  source = "../../modules/github-oidc"

  prefix       = var.prefix
  tags         = var.tags
  repository   = { owner = var.github.owner, name = var.github.name, owner_id = var.github.owner_id, repository_id = var.github.repository_id }
  subjects     = var.github.subjects
  provider_arn = var.github.provider_arn
  # To build images, to launch, and to look after jobs (reap, tick) on a schedule.
  policy_arns = merge({ push = module.registry.push_policy_arn, jobs = module.store.gateway_policy_arn }, local._launchers)
}

module "cost" {
  source = "../../modules/cost-guard"

  prefix            = var.prefix
  tags              = var.tags
  region            = var.region
  monthly_limit_usd = var.budget.monthly_limit_usd
  alert_emails      = var.budget.alert_emails
  billing_alarm_usd = var.budget.billing_alarm_usd
}
