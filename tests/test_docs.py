"""What stands in docs/ is true as it stands there."""

import contextlib
import inspect
import io
import os
import re
import subprocess
import sys

import pytest
import yaml

from mptrain import Trainer, config, config_check, default_config
from tests.conftest import ROOT
from tests.test_multi_worker import free_ports

CLUSTER = (ROOT / "docs" / "cluster.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", CLUSTER, re.DOTALL | re.MULTILINE)


def test_every_flag_is_a_config_field_with_a_value_that_it_takes():
    found = re.findall(r"--config\.([\w.]+)=([^\s\],`]+)", CLUSTER)
    assert len(found) > 10
    known = dict(config.fields(default_config()))
    for path, value in found:
        kind = type(known[path]) if known[path] is not None else int
        values = {**known, "trainer": "a.B", "train.steps": 1, path: kind(value)}
        config_check.validate(config.from_fields(values))


def test_manifests_are_yaml_and_scripts_are_bash():
    kinds = [[manifest["kind"] for manifest in yaml.safe_load_all(block)] for block in blocks("yaml")]
    assert kinds == [["TFJob"], ["ServiceAccount", "Role", "RoleBinding", "Job"], ["TrainingRuntime", "TrainJob"]]
    for block in blocks("sh"):
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_service_account_that_the_jobs_name_may_list_pods():
    account, role, binding, job = yaml.safe_load_all(blocks("yaml")[1])
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": account["kind"], "name": account["metadata"]["name"]}]
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]


@pytest.mark.parametrize(("status", "restarts", "requeued"), [(0, 0, 0), (2, 0, 0), (1, 0, 1), (137, 9, 1), (143, 10, 0)])
def test_slurm_script_starts_again_what_failed_and_ends_with_its_status(tmp_path, status, restarts, requeued):
    (script,) = [block for block in blocks("sh") if "srun" in block]
    for name, end in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" >> {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{end}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/", "SLURM_JOB_ID": "7"}
    if restarts:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
    assert subprocess.run(["bash", "-c", script], env=environment).returncode == status
    told = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert told == "requeue 7\n" * requeued


def test_arithmetic_of_scaling_prints_what_stands_below_it():
    (code,) = blocks("python")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"```\n{printed}```\n" in CLUSTER


@pytest.mark.slow
def test_two_workers_by_hand_train(tmp_path):
    (script,) = [block for block in blocks("sh") if "TF_CONFIG" in block]
    for written, free in zip(("2222", "2223"), free_ports(2), strict=True):
        script = script.replace(written, str(free))
    script = script.replace("runs/two", str(tmp_path / "two")).replace("python ", f"{sys.executable} ")
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    finished = subprocess.run(["bash", "-ec", script], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert "eval  step 20" in finished.stdout


@pytest.mark.slow
def test_extending_prints_what_stands_below_it_and_quotes_what_stands_in_the_experiments():
    text = (ROOT / "docs" / "extending.md").read_text()
    namespace = {}
    for code, printed in re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", text, re.DOTALL | re.MULTILINE):
        quoted, _, rest = code.partition("\n")
        if quoted.startswith("# experiments/"):
            assert rest in (ROOT / quoted.removeprefix("# ")).read_text()
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, namespace)
        assert output.getvalue() == printed


def test_extending_lists_every_method_that_is_to_be_overridden():
    text = (ROOT / "docs" / "extending.md").read_text()
    for name in re.findall(r"^\| `(\w+)\(", text, re.MULTILINE):
        assert hasattr(Trainer, name)
    source = inspect.getsource(Trainer).partition("# What a researcher overrides")[2].partition("# What a researcher calls")[0]
    for name in re.findall(r"^    def (\w+)", source, re.MULTILINE):
        assert f"| `{name}(" in text
