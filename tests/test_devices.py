"""What is here, and the strategy that a config asks for."""

import json
import os
import subprocess
import sys

import pytest
import tensorflow as tf

from mptrain import default_config, devices, hardware, precision
from mptrain.errors import InputError
from mptrain.hardware import Gpu, Hardware
from tests.conftest import ROOT
from tests.test_multi_worker import free_ports


@pytest.fixture
def here(monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS"):
        monkeypatch.delenv(name, raising=False)
    return default_config().devices


def table(**environment):
    return subprocess.run(
        [sys.executable, "-m", "mptrain.devices"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


def test_table_names_the_cpu_and_what_auto_takes_and_tensorflow_is_silent():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    finished = subprocess.run(
        [sys.executable, "-m", "mptrain.devices"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0
    assert finished.stderr == ""
    chosen = precision.get("auto")
    assert hardware.hardware().cpu_name.split()[0] in finished.stdout
    assert f"precision.policy=auto takes {chosen.name} ({chosen.reason.removeprefix('auto: ')})" in finished.stdout
    assert "devices.strategy=auto takes one_device" in finished.stdout


@pytest.mark.slow
def test_table_takes_a_tf_config_without_a_cluster_for_none():
    finished = table(TF_CONFIG="{}")
    assert finished.returncode == 0, finished.stderr
    assert "devices.strategy=auto takes one_device" in finished.stdout


@pytest.mark.slow
def test_table_with_a_bad_tf_config_ends_in_one_line():
    finished = table(TF_CONFIG="{")
    assert finished.returncode == 2
    assert finished.stderr.startswith("mptrain: TF_CONFIG is no JSON")
    assert len(finished.stderr.splitlines()) == 1


def test_memory_of_gpus_comes_from_the_drivers_tool_by_their_names(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'Old, Thing, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert hardware._gpu_memories() == {"NVIDIA H200": 143771}


def test_hardware_is_told_in_one_line():
    gpu = Gpu("NVIDIA H200", (9, 0), 143771)
    told = str(Hardware(16, ("avx2", "avx512_bf16"), (gpu,)))
    assert told == "16 CPU cores (avx512_bf16), NVIDIA H200 (compute capability 9.0, 140 GiB)"
    assert gpu.sixteen_bit_features == "float16, bfloat16"
    assert Gpu("Tesla V100", (7, 0)).sixteen_bit_features == "float16"
    assert Gpu("Tesla P100", (6, 0)).sixteen_bit_features == "no 16-bit matrix units"


def test_tpu_that_is_not_there_says_what_was_looked_for(here):
    here.strategy = "tpu"
    with pytest.raises(InputError, match=r"looked for config.devices.tpu \(''\), TPU_NAME, .*/dev/accel.*; set devices.tpu"):
        devices.strategy(here)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no-such-tpu", "grpc://127.0.0.1:1", "local"])
def test_tpu_that_does_not_answer_is_one_line(name):
    code = (
        "import sys; from mptrain import default_config, devices; from mptrain.errors import InputError\n"
        f"config = default_config().devices; config.strategy, config.tpu = 'tpu', {name!r}\n"
        "try:\n    devices.strategy(config)\nexcept InputError as error:\n    print(error)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.stdout.startswith(f"the TPU {name!r} does not answer: "), finished.stderr
    assert len(finished.stdout.splitlines()) == 1


def test_nccl_without_gpus_is_refused(here):
    here.strategy, here.communication = "multi_worker", "nccl"
    with pytest.raises(InputError, match="communication is 'nccl' and there is no GPU"):
        devices.strategy(here)


def test_several_workers_come_too_late_once_tensorflow_has_started(here, monkeypatch):
    (port,) = free_ports(1)
    cluster = {"cluster": {"worker": [f"127.0.0.1:{port}"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    here.strategy = "multi_worker"
    tf.zeros(1).numpy()
    with pytest.raises(InputError, match="config.devices comes too late"):
        devices.strategy(here)


def test_memory_of_gpus_grows_from_before_they_are_touched(here, monkeypatch):
    calls, gpus = [], ["GPU 0", "GPU 1"]
    listed = tf.config.list_physical_devices
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: gpus if kind == "GPU" else listed(kind))
    monkeypatch.setattr(tf.config.experimental, "get_memory_growth", lambda gpu: gpu == "GPU 1")
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, grows: calls.append((gpu, grows)))
    monkeypatch.setattr(tf.distribute, "OneDeviceStrategy", lambda device: calls.append(device))
    here.strategy = "one_device"
    devices.strategy(here)
    assert calls == [("GPU 0", True), "GPU:0"]


@pytest.mark.parametrize(
    ("strategy", "virtual_cpus", "told"),
    [("one_device", 0, "OneDeviceStrategy, 1 replica"), ("mirrored", 3, "MirroredStrategy, 3 replicas")],
)
def test_what_a_run_computes_on_is_told_in_one_line(here, strategy, virtual_cpus, told):
    here.update(strategy=strategy, virtual_cpus=virtual_cpus)
    assert devices.describe(devices.strategy(here)) == f"{hardware.hardware()}; {told}"
