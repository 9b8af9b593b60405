#!/bin/bash
# The first start of a GPU machine: arm the deadline, fetch the launch file, run the trainer, shut down.
# Shutting down ends the machine for good (the launch template says so). Nothing secret may stand here: every account
# user who may describe instances can read it.
shutdown -h +1440 "deadline of this machine"
set -uo pipefail
trap 'shutdown -h now' EXIT

readonly LAUNCH=/run/lorry.env SCRATCH=/opt/dlami/nvme
mkdir -p "$SCRATCH" && chmod 1777 "$SCRATCH"
umask 077
export AWS_DEFAULT_REGION=us-east-1 AWS_STS_REGIONAL_ENDPOINTS=regional

# The launcher learns the instance id only after the start, so the file appears some seconds later: wait 10 minutes.
# It holds the job's variables, one NAME=value a line: LORRY_STORE, LORRY_JOB and the session that reaches this job only.
me=$(aws sts get-caller-identity --query UserId --output text) || exit 1
for _ in $(seq 60); do
  aws s3 cp --quiet "s3://lorry-dev-artifacts-123456789012-us-east-1/machines/$me/launch.env" "$LAUNCH" && break
  sleep 10
done
[ -f "$LAUNCH" ] || exit 1
store=$(sed -n 's/^LORRY_STORE=//p' "$LAUNCH") job=$(sed -n 's/^LORRY_JOB=//p' "$LAUNCH")

# The job's own deadline is sooner; its container has 15 minutes more to bring everything home.
deadline=$(sed -n 's/^LORRY_DEADLINE=//p' "$LAUNCH")
left=$(((${deadline:-0} - $(date +%s)) / 60 + 20))
if [ "$left" -gt 0 ] && [ "$left" -lt 1440 ]; then
  shutdown -h "+$left" "deadline of this job"
fi

aws ecr get-login-password | docker login --username AWS --password-stdin 123456789012.dkr.ecr.us-east-1.amazonaws.com || exit 1
docker pull --quiet 123456789012.dkr.ecr.us-east-1.amazonaws.com/lorry-dev/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa || exit 1
fabric=()
[ -e /dev/infiniband ] && fabric=(--device /dev/infiniband --ulimit memlock=-1)
docker run --rm --gpus all --ipc host --network host "${fabric[@]}" --stop-timeout 110 \
  --env-file "$LAUNCH" --env LORRY_TRAINER_IMAGE=123456789012.dkr.ecr.us-east-1.amazonaws.com/lorry-dev/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa --volume "$SCRATCH:/scratch" \
  123456789012.dkr.ecr.us-east-1.amazonaws.com/lorry-dev/trainer@sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa python -m scripts.container --store "$store" --job "$job" --work "/scratch/$job"
