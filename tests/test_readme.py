"""The README's code and commands are run as they stand there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from mptrain import config_check, default_config
from mptrain.sweep import mode as sweep_mode
from mptrain.sweep import search as sweep

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_own_trainer_of_the_readme_is_short_and_learns(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 40
    (tmp_path / "spirals.py").write_text(code)
    (flags,) = re.findall(r"`python -m mptrain.main (--config=spirals.py)`", README)
    finished = subprocess.run(
        [sys.executable, "-m", "mptrain.main", flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr
    (accuracy,) = re.findall(r"^  accuracy +([\d.]+)", finished.stdout, re.MULTILINE)
    assert float(accuracy) > 0.98
    assert len(list((tmp_path / "runs" / "spirals").iterdir())) == 1
    assert finished.stderr == "" or all(line.startswith("step ") for line in finished.stderr.splitlines())


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tracked and new files, with the tests' own Python as its .venv, so that make installs nothing."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in names:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(pathlib.Path(sys.executable).parent.parent)
    return tmp_path


def make(checkout, *arguments):
    up_to_date = ["-o", ".venv/.installed", "-o", ".venv/.installed-test"]
    return subprocess.run(["make", *up_to_date, *arguments], cwd=checkout, capture_output=True, text=True)


@pytest.mark.slow
def test_make_train_passes_flags_and_trains(checkout):
    (flags,) = re.findall(r'`make train ARGS="(--config.train.steps=\d+)"`', README)
    finished = make(checkout, "train", f"ARGS={flags} --workdir={checkout / 'run'}")
    assert finished.returncode == 0, finished.stderr
    assert "eval  step 200" in finished.stdout
    assert (checkout / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_make_test_runs_the_tests(checkout):
    finished = make(checkout, "test", "ARGS=-q tests/test_config.py")
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout


@pytest.mark.slow
def test_resume_command_of_the_readme_proves_what_it_says(command, tmp_path):
    (flags,) = re.findall(r"python -m mptrain.main (--config=configs/mnist.py --mode=verify_resume .*)", README)
    finished = command(*flags.split(), f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 0, finished.stderr
    assert "equal to the last bit after 3 kills" in finished.stdout


def test_flags_for_parameter_groups_and_the_sweep_of_the_readme_are_valid(tmp_path):
    (flags,) = re.findall(
        r"python -m mptrain.main (--config=configs/mnist.py --config.optimizer.name.*?)\n```", README, re.DOTALL
    )
    command = f"{sys.executable} -m mptrain.main {flags} --print_config"
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert "'learning_rate_factor': 0.1" in printed.stdout
    (code,) = re.findall(r"```text\n(def sweep.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    config = default_config()
    config.trainer, config.train.steps = "a.B", 1
    for parameters in sweep.as_search(names["sweep"]()).samples():
        config_check.validate(sweep_mode.config_of(config, parameters))
