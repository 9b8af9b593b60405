"""Every module with its resources mocked: right inputs plan, wrong ones are refused. And the house form of modules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recipes.catalog import load_catalog
from scripts.terraform import Terraform
from tests.infra.conftest import INFRA

MODULES = sorted(path.name for path in (INFRA / "modules").iterdir())
AWS = [module for module in MODULES if not module.startswith("runpod-")]
RUNPOD = [module for module in MODULES if module.startswith("runpod-")]


def run_mocked_tests(modules, infra_copy, env):
    """Status of every run, "module/run" -> status. One Terraform for all modules: loading a provider takes seconds."""
    together = infra_copy / "modules" / "together"
    (together / "tests").mkdir(parents=True)
    shutil.copy(infra_copy / "modules" / modules[0] / "versions.tf", together)
    for module in modules:
        text = (infra_copy / "modules" / module / "tests" / f"{module}.tftest.hcl").read_text()
        here = f'  command = plan\n  module {{\n    source = "../{module}"\n  }}\n'
        (together / "tests" / f"{module}.tftest.hcl").write_text(text.replace("  command = plan\n", here))
    Terraform(together, env).init()
    done = subprocess.run(["terraform", "test", "-json"], cwd=together, env=env, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    spoken = [e["diagnostic"] for e in events if e["type"] == "diagnostic" and e["diagnostic"]["severity"] == "error"]
    assert done.returncode == 0, (spoken, done.stderr)
    runs = [e["test_run"] for e in events if e["type"] == "test_run" and e["test_run"]["progress"] == "complete"]
    return {f"{Path(run['path']).stem.removesuffix('.tftest')}/{run['run']}": run["status"] for run in runs}


def written_runs(modules):
    """Every run that stands in the modules' test files."""
    texts = {m: (INFRA / "modules" / m / "tests" / f"{m}.tftest.hcl").read_text() for m in modules}
    return {
        f"{module}/{run}" for module, text in texts.items() for run in re.findall(r'^run "(\w+)"', text, re.MULTILINE)
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_aws_modules_plan_right_inputs_and_refuse_wrong_ones(infra_copy, base_env, aws_provider):
    assert run_mocked_tests(AWS, infra_copy, base_env) == dict.fromkeys(written_runs(AWS), "pass")


def test_runpod_modules_plan_right_inputs_and_refuse_wrong_ones(infra_copy, base_env, runpod_provider, runpod_rest):
    env = {**base_env, "TF_REATTACH_PROVIDERS": runpod_provider}
    assert run_mocked_tests(RUNPOD, infra_copy, env) == dict.fromkeys(written_runs(RUNPOD), "pass")
    assert runpod_rest.account.is_empty()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_small_and_tests_every_rule_it_sets(module):
    folder = INFRA / "modules" / module
    text = (folder / "variables.tf").read_text()
    blocks = dict(re.findall(r'^variable "(\w+)" {\n(.*?)^}', text, re.DOTALL | re.MULTILINE))
    assert len(blocks) <= 15
    assert all("description" in body and "type " in body for body in blocks.values())
    tested = (folder / "tests" / f"{module}.tftest.hcl").read_text()
    ruled = {name for name, body in blocks.items() if "validation {" in body}
    untested = {name for name in ruled if f"expect_failures = [var.{name}]" not in tested}
    assert untested <= {"prefix", "region"}, "prefix and region carry one rule, tested once in artifact-store"


def test_the_shared_rules_are_written_alike_everywhere():
    for name in ("prefix", "region"):
        texts = {
            re.search(rf'^variable "{name}" {{\n.*?^}}', file.read_text(), re.DOTALL | re.MULTILINE).group()
            for file in INFRA.glob("modules/*/variables.tf")
            if f'variable "{name}"' in file.read_text()
        }
        assert len(texts) == 1


def test_the_environments_ask_for_the_same_things():
    for cloud in ("aws", "runpod"):
        dev, prod = (INFRA / "live" / env / cloud / "variables.tf" for env in ("dev", "prod"))
        assert dev.read_text() == prod.read_text()


def test_prod_rents_every_type_that_is_planned_with_and_dev_only_such():
    rented = {
        env: set(re.findall(r'"((?:ml\.)?[a-z0-9-]+\.\d+xlarge)"', (INFRA / "live" / env / "aws/main.tf").read_text()))
        for env in ("dev", "prod")
    }
    planned = {o.provider_type for o in load_catalog().offers.values() if o.backend in ("ec2", "sagemaker")}
    assert rented["prod"] == planned
    assert rented["dev"] < planned


def test_roots_hold_a_backend_and_a_stack_and_nothing_else():
    for root in INFRA.glob("live/*/*/main.tf"):
        environment, cloud = root.parts[-3:-1]
        text = root.read_text()
        blocks = re.findall(r"^(\w+)(?: .*)? {$", text, re.MULTILINE)
        assert blocks == ["terraform", "provider", "module", "output"] or blocks == ["terraform", "module", "output"]
        assert f'source = "../../../stacks/{cloud}"' in text
        assert re.search(rf'backend "s3" {{\n +key += "{environment}/{cloud}.tfstate"', text)
        assert re.search(r"use_lockfile = true\n +encrypt +=", text)


def test_all_terraform_files_are_formatted(base_env):
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", str(INFRA)], env=base_env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
