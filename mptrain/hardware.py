"""What hardware is here: CPUs with their 16-bit instruction sets, GPUs, TPUs. Looking starts no device."""

import dataclasses
import functools
import os
import shutil
import subprocess

import tensorflow as tf

_CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_fp16", "avx512_bf16", "amx_bf16", "amx_fp16")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as the driver calls it.
        compute_capability: as (8, 0); (0, 0) where the driver does not tell.
        memory_mib: in MiB; 0 where the driver does not tell.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_mib: int = 0

    @property
    def sixteen_bit_features(self) -> str:
        """What the GPU computes in 16 bits, in words: its compute capability tells."""
        if self.compute_capability >= (8, 0):
            return "float16, bfloat16"
        return "float16" if self.compute_capability >= (7, 0) else "no 16-bit matrix units"

    def __str__(self) -> str:
        capability = "compute capability " + ".".join(map(str, self.compute_capability))
        return f"{self.name} ({capability}{f', {self.memory_mib / 1024:.0f} GiB' if self.memory_mib else ''})"


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices of this host.

    Attributes:
        cpu_cores: cores that this process may use.
        cpu_features: those of the CPU's instruction sets that matter for 16 bits, by their Linux names.
        gpus: the GPUs that TensorFlow sees.
        tpus: number of TPU cores that TensorFlow sees.
        cpu_name: as the system calls it.
    """

    cpu_cores: int
    cpu_features: tuple[str, ...]
    gpus: tuple[Gpu, ...] = ()
    tpus: int = 0
    cpu_name: str = "CPU"

    @property
    def sixteen_bit_features(self) -> str:
        """The CPU's instruction sets that compute in 16 bits, in words."""
        return ", ".join(name for name in self.cpu_features if name.endswith(("fp16", "bf16"))) or "no 16-bit arithmetic"

    def __str__(self) -> str:
        parts = [f"{self.cpu_cores} CPU cores ({self.sixteen_bit_features})", *map(str, self.gpus)]
        if not self.gpus and not self.tpus:
            parts.append("no GPU")
        if self.tpus:
            parts.append(f"{self.tpus} TPU cores")
        return ", ".join(parts)


@functools.cache
def hardware() -> Hardware:
    """Returns the devices of this host, without starting any of them."""
    gpus, memories = [], _gpu_memories()
    for device in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        name = details.get("device_name", device.name)
        gpus.append(Gpu(name, tuple(details.get("compute_capability", (0, 0))), memories.get(name, 0)))
    cpu = _cpu()
    return Hardware(
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_features=tuple(name for name in _CPU_FEATURES if name in cpu.get("flags", "").split()),
        gpus=tuple(gpus),
        tpus=len(tf.config.list_physical_devices("TPU")),
        cpu_name=cpu.get("model name", "CPU"),
    )


def of(strategy: tf.distribute.Strategy) -> Hardware:
    """Returns the devices of this host, with a TPU strategy's cores, which may be another host's."""
    tpus = strategy.num_replicas_in_sync if isinstance(strategy, tf.distribute.TPUStrategy) else hardware().tpus
    return dataclasses.replace(hardware(), tpus=tpus)


def _cpu() -> dict[str, str]:
    """Returns what Linux says about the first CPU; elsewhere nothing is known, so nothing is claimed."""
    try:
        with open("/proc/cpuinfo") as file:
            pairs = (line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
            return {name.strip(): value.strip() for name, value in pairs}
    except FileNotFoundError:
        return {}


def _gpu_memories() -> dict[str, int]:
    """Returns {name: memory in MiB}: TensorFlow tells memory only once it has started a GPU, the driver's tool before."""
    if shutil.which("nvidia-smi") is None:
        return {}
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    pairs = (line.rsplit(",", 1) for line in lines if line.count(","))
    return {name.strip(): int(memory) for name, memory in pairs if memory.strip().isdigit()}
