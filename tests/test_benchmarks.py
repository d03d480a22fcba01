"""Benchmarks run as their docstrings say, here at the smallest size."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("setting", ["2 replicas", pytest.param("2 workers", marks=pytest.mark.slow)])
def test_scaling_prints_times_and_ratios_of_the_three(setting):
    command = [sys.executable, "-m", "benchmarks.scaling", "--steps=2", "--rounds=1", "--settings", setting]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    _, _, header, _, row = finished.stdout.splitlines()
    assert header.startswith("| setting | by hand, ms a step | mptrain | Keras fit | mptrain / by hand |")
    milliseconds, ratio = r"\d+\.\d", r"\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\) \| \d+\.\d\d"
    assert re.fullmatch(rf"\| {setting} (\| {milliseconds} ){{3}}(\| {ratio} ){{2}}\|", row)
