"""scripts.terraform against the real Terraform, with a root that needs no provider."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from scripts.terraform import Terraform, TerraformError
from tests.infra.conftest import REPOSITORY

ROOT = """
variable "word" {
  type      = string
  sensitive = true

  validation {
    condition     = length(var.word) > 2
    error_message = "word must be longer than two letters."
  }
}

variable "many" {
  type    = map(list(number))
  default = {}
}

resource "terraform_data" "this" {
  input = nonsensitive(var.word)
}

output "room" {
  value = { word = terraform_data.this.output, many = var.many }
}
"""


@pytest.fixture
def root(tmp_path, base_env):
    """root(word="hello") -> an initialised Terraform in the same folder."""
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "main.tf").write_text(ROOT)
    Terraform(folder, base_env).init()

    def make(environment=None, **variables):
        return Terraform(folder, {**base_env, **(environment or {})}, variables)

    return make


def test_plan_tells_of_changes_and_apply_carries_out_exactly_the_plan(root):
    first = root(word="hello", many={"a": [1, 2]})
    assert first.plan()
    assert first.show(plan=True)["planned_values"]["root_module"]["resources"][0]["address"] == "terraform_data.this"
    root(word="other").apply()
    assert first.output() == {"room": {"word": "hello", "many": {"a": [1, 2]}}}
    assert not first.plan()


def test_events_are_told_while_they_happen(root):
    told = []
    made = root(word="hello")
    made.plan()
    made.apply(on_event=lambda event: told.append(event["type"]))
    assert told.index("apply_start") < told.index("apply_complete") < told.index("change_summary")
    made.destroy(on_event=lambda event: told.append(event["type"]))
    assert "values" not in made.show()


def test_a_broken_rule_is_its_own_sentence(root):
    with pytest.raises(TerraformError) as caught:
        root(word="no").plan()
    assert str(caught.value) == "terraform plan: word must be longer than two letters."
    assert (caught.value.command, caught.value.rc, caught.value.exit_code) == ("plan", 1, 8)


def test_a_value_that_is_missing_or_of_the_wrong_kind_is_named(root):
    with pytest.raises(TerraformError, match='The root module input variable "word" is not set'):
        root().plan()
    with pytest.raises(TerraformError, match="many"):
        root(word="hello", many="text").plan()


def test_a_misspelt_variable_is_an_error_not_a_warning(root):
    with pytest.raises(TerraformError, match=r'"wrod".*; remove it or correct its spelling'):
        root(word="hello", wrod="x").plan()


def test_a_trace_that_floods_the_error_stream_does_not_hang(root):
    assert root({"TF_LOG": "TRACE"}, word="hello").plan()


def test_values_leave_nothing_behind_in_the_temporary_folder(root, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    root(word="hello").plan()
    with pytest.raises(TerraformError):
        root(word="no").plan()
    assert list(folder.iterdir()) == []


def test_a_command_before_init_says_to_run_init(tmp_path, base_env):
    (tmp_path / "main.tf").write_text('terraform {\n backend "s3" {\n  key = "k"\n }\n}\n')
    with pytest.raises(TerraformError, match="run init first"):
        Terraform(tmp_path, base_env).plan()


def test_validate_names_the_place(tmp_path, base_env):
    (tmp_path / "main.tf").write_text('output "x" {\n value = var.nothing\n}\n')
    with pytest.raises(TerraformError, match="Reference to undeclared input variable"):
        Terraform(tmp_path, base_env).validate()


SAVING = """#!{python}
import signal, sys, time
def stop(*_):
    for n in range(3):  # a write to an output that nobody holds open ends it here
        print('{{"type": "log", "@message": "saving"}}', flush=True)
        time.sleep(0.3)
    open("saved", "w").close()
    sys.exit(1)
signal.signal(signal.SIGINT, stop)
print('{{"type": "log", "@message": "creating"}}', flush=True)
time.sleep(100)
"""
DRIVER = """
import os, pathlib, sys
from scripts.terraform import Terraform
def on_event(event):
    print(event["@message"], flush=True)
    {deed}
Terraform(pathlib.Path.cwd(), dict(os.environ)).apply(on_event=on_event)
"""


@pytest.mark.parametrize("deed", ["raise BrokenPipeError", "raise ValueError", "pass"])
def test_terraform_saves_its_state_although_nobody_listens_or_somebody_is_impatient(tmp_path, deed):
    """A listener that is gone, one that fails at every line, and Ctrl-C twice."""
    (tmp_path / "terraform").write_text(SAVING.format(python=sys.executable))
    (tmp_path / "terraform").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(deed=deed)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "creating\n"
    if deed == "pass":
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "saving\n"
        child.send_signal(signal.SIGINT)
    child.stdout.read()
    assert child.wait(60) != 0
    assert (tmp_path / "saved").exists()
