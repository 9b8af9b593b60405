"""What the user data of a machine calls, on this machine: aws against a local AWS, docker that runs the command itself.

python -m tests.ec2.tools aws|docker WORDS...      # MACHINE_ID: "role:instance", as STS would say
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def aws(words: list[str]) -> int:
    import boto3

    if words[:2] == ["sts", "get-caller-identity"]:
        print(os.environ["MACHINE_ID"])
    elif words[:2] == ["s3", "cp"]:
        url, to = words[-2:]
        bucket, _, key = url.removeprefix("s3://").partition("/")
        s3 = boto3.client("s3")
        try:
            Path(to).write_bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        except s3.exceptions.NoSuchKey:
            return 1
    return 0


def docker(words: list[str]) -> int:
    if words[0] != "run":
        return 0
    given = {name: words[words.index(name) + 1] for name in ("--env-file", "--volume")}
    scratch = given["--volume"].removesuffix(":/scratch")
    command = [word.replace("/scratch", scratch) for word in words[words.index("python") :]]
    lines = Path(given["--env-file"]).read_text().splitlines()
    told = {name: value.replace("/scratch", scratch) for name, value in (line.split("=", 1) for line in lines)}
    kept = ("PATH", "HOME", "LANG", "PYTHONPATH", "AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT")
    given_apart = [words[at + 1] for at, word in enumerate(words) if word == "--env"]
    told |= dict(pair.split("=", 1) for pair in given_apart)
    environment = {name: os.environ[name] for name in kept if name in os.environ} | told
    os.execve(sys.executable, [sys.executable, *command[1:]], environment)


if __name__ == "__main__":
    sys.exit({"aws": aws, "docker": docker}[sys.argv[1]](sys.argv[2:]))
