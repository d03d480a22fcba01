"""How much memory this process has needed at most."""

import re
import resource
import sys

import tensorflow as tf

from mptrain.workers import local_devices


def peak_memory() -> int:
    """Returns the most main memory that this process has held, in bytes.

    Linux's /proc and not getrusage, whose maximum a new process takes over from the one that started it.
    """
    try:
        with open("/proc/self/status") as file:
            return int(re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)[1]) * 1024
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_gpu_memory(strategy: tf.distribute.Strategy) -> int | None:
    """Returns the most that TensorFlow has held on one of the strategy's GPUs, in bytes; None where there are none."""
    gpus = [device for device in local_devices(strategy) if "GPU" in device]
    return max((tf.config.experimental.get_memory_info(_short(gpu))["peak"] for gpu in gpus), default=None)


def _short(device: str) -> str:
    """Returns "/job:localhost/replica:0/task:0/device:GPU:1" as "GPU:1", which is all that TensorFlow takes there."""
    return re.search(r"GPU:\d+", device)[0]
