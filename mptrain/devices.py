"""What hardware is here, and the `tf.distribute` strategy that a config asks for."""

import dataclasses
import functools
import os

import tensorflow as tf
from ml_collections import ConfigDict

from mptrain.errors import InputError

_CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_fp16", "avx512_bf16", "amx_bf16", "amx_fp16")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: its name and compute capability, as (8, 0); (0, 0) where the driver does not tell."""

    name: str
    compute_capability: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices of this host.

    Attributes:
        cpu_cores: cores that this process may use.
        cpu_features: those of the CPU's instruction sets that matter for 16 bits, by their Linux names.
        gpus: the GPUs that TensorFlow sees.
        tpus: number of TPU cores that TensorFlow sees.
    """

    cpu_cores: int
    cpu_features: tuple[str, ...]
    gpus: tuple[Gpu, ...] = ()
    tpus: int = 0

    def __str__(self) -> str:
        sixteen = [name for name in self.cpu_features if name.endswith(("fp16", "bf16"))]
        parts = [f"{self.cpu_cores} CPU cores ({', '.join(sixteen) or 'no 16-bit arithmetic'})"]
        for gpu in self.gpus:
            parts.append(f"{gpu.name} (compute capability {'.'.join(map(str, gpu.compute_capability))})")
        if not self.gpus and not self.tpus:
            parts.append("no GPU")
        if self.tpus:
            parts.append(f"{self.tpus} TPU cores")
        return ", ".join(parts)


@functools.cache
def hardware() -> Hardware:
    """Returns the devices of this host, without starting any of them."""
    gpus = []
    for device in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        gpus.append(Gpu(details.get("device_name", device.name), tuple(details.get("compute_capability", (0, 0)))))
    return Hardware(
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_features=_cpu_features(),
        gpus=tuple(gpus),
        tpus=len(tf.config.list_physical_devices("TPU")),
    )


def _cpu_features() -> tuple[str, ...]:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except FileNotFoundError:  # not Linux: nothing is known, so nothing is claimed
        return ()
    return tuple(name for name in _CPU_FEATURES if name in flags)


def strategy(config: ConfigDict) -> tf.distribute.Strategy:
    """Returns the strategy for `config.devices`; sets memory growth and logical CPUs first.

    Raises:
        InputError: if TensorFlow has started its devices already and can no longer be told.
    """
    replicas = config.virtual_cpus
    gpus = tf.config.list_physical_devices("GPU")
    _configure_devices(gpus, replicas)
    if config.strategy == "mirrored" or config.strategy == "auto" and (replicas > 1 or len(gpus) > 1):
        if replicas or not gpus:
            # Collectives between CPUs of one process are keyed by process: two strategies of different sizes would clash.
            devices = [f"CPU:{i}" for i in range(max(replicas, 1))]
            return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(gpus))])
    return tf.distribute.OneDeviceStrategy("GPU:0" if gpus and not replicas else "CPU:0")


def _configure_devices(gpus: list, virtual_cpus: int) -> None:
    try:
        for gpu in gpus:
            if not tf.config.experimental.get_memory_growth(gpu):
                tf.config.experimental.set_memory_growth(gpu, True)
        if virtual_cpus > 1:
            cpu = tf.config.list_physical_devices("CPU")[0]
            present = tf.config.get_logical_device_configuration(cpu) or []
            if len(present) < virtual_cpus:
                logical = [tf.config.LogicalDeviceConfiguration()] * virtual_cpus
                tf.config.set_logical_device_configuration(cpu, logical)
    except RuntimeError as error:
        raise InputError(
            "config.devices comes too late: TensorFlow has started its devices already; build the trainer before the first"
            " TensorFlow operation of the program"
        ) from error


def describe(strategy: tf.distribute.Strategy) -> str:
    """Returns the line that tells the user what the run computes on."""
    count = strategy.num_replicas_in_sync
    return f"{hardware()}; {type(strategy).__name__}, {count} replica{'s' if count > 1 else ''}"
