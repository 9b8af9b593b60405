"""READMEs tell the truth: tables are those of the code, and every example is applied."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from scripts.terraform import Terraform
from tests.infra.conftest import INFRA
from tests.infra.readme_tables import examples, inputs_table, outputs_table, with_section
from tests.infra.test_aws_roots import variables
from tests.infra.test_modules import AWS, MODULES, RUNPOD

SKIP = re.compile(r"#checkov:skip=(\w+):(.+)")


def readmes():
    """README path -> what it should say."""
    wanted = {}
    for module in MODULES:
        folder = INFRA / "modules" / module
        text = (folder / "README.md").read_text()
        text = with_section(text, "## Inputs", inputs_table(folder))
        wanted[folder / "README.md"] = with_section(text, "## Outputs", outputs_table(folder))
    text = (INFRA / "README.md").read_text()
    for stack in ("runpod", "aws"):
        text = with_section(text, f"### {stack}", outputs_table(INFRA / "stacks" / stack))
    wanted[INFRA / "README.md"] = with_section(text, "### Reasons", accepted_findings())
    return wanted


def accepted_findings():
    """One row per accepted finding, from the comments beside the resources."""
    rows = [
        f"| {file.parent.name} | {finding} | {reason} |"
        for file in sorted(INFRA.glob("modules/*/*.tf"))
        for finding, reason in SKIP.findall(file.read_text())
    ]
    return "\n".join(["| module | finding | reason |", "|---|---|---|", *rows])


def test_tables_are_those_of_the_code():
    for path, wanted in readmes().items():
        if os.environ.get("UPDATE_README"):
            path.write_text(wanted)
        assert path.read_text() == wanted, "run with UPDATE_README=1 to write the tables anew"


def gathered(modules, infra_copy):
    """One root that holds every example of these modules, first examples first."""
    root = infra_copy / "examples"
    root.mkdir()
    texts = [examples((INFRA / "modules" / module / "README.md").read_text()) for module in modules]
    assert all(texts), "every README has an example"
    (root / "main.tf").write_text("\n".join(block for blocks in texts for block in blocks).replace('"./', '"../'))
    shutil.copy(infra_copy / "modules" / modules[0] / "versions.tf", root)
    return root


def test_runpod_examples_apply(infra_copy, base_env, runpod_provider, runpod_rest):
    root = Terraform(gathered(RUNPOD, infra_copy), {**base_env, "TF_REATTACH_PROVIDERS": runpod_provider})
    root.init()
    assert root.plan()
    root.apply()
    assert len(runpod_rest.account.held["serverless"]) == 3
    assert not root.plan()
    root.destroy()
    assert runpod_rest.account.is_empty()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_aws_examples_apply(infra_copy, base_env, aws_provider, aws_fake):
    folder = gathered(AWS, infra_copy)
    network = "variable network {\n type = object({ vpc_id = string, subnet_ids = list(string) })\n}\n"
    (folder / "variables.tf").write_text(network)
    given = {"network": variables(aws_fake)["network"]}
    root = Terraform(folder, {**base_env, "AWS_ENDPOINT_URL": aws_fake}, given)
    root.init()
    assert root.plan()
    root.apply()
    assert not root.plan()
    root.destroy()
    assert root.show().get("values") is None
