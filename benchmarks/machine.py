"""What a benchmark ran on: processor, memory, versions, and how busy the machine was."""

import importlib.metadata
import os
import pathlib
import platform
import time

from mptrain.hardware import hardware

IDLE = 0.5  # load average, at most
PACKAGES = ("tensorflow", "keras", "tf_keras", "tf-models-official", "numpy")


def description() -> list[str]:
    """Returns lines about the machine and the software, as Markdown."""
    here = hardware()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return [
        f"- {here.cpu_name}, {here.cpu_cores} cores; {', '.join(here.cpu_features) or 'no 16-bit instructions'}",
        f"- {', '.join(map(str, here.gpus)) or 'no GPU'}",
        f"- {memory:.0f} GiB of memory; {platform.platform()}",
        f"- Python {platform.python_version()}, {versions}{_torch_versions()}",
    ]


def _torch_versions() -> str:
    """Returns the versions in the Python that PyTorch has of its own; they are read from the names of its folders."""
    from benchmarks.frame import TORCH_PYTHON

    found = []
    for package in ("torch", "lightning"):
        folders = sorted(TORCH_PYTHON.parent.parent.glob(f"lib/python*/site-packages/{package}-*.dist-info"))
        found += [f"{package} {folder.name.removesuffix('.dist-info').split('-')[1]}" for folder in folders]
    return "".join(f", {each}" for each in found) or "; no PyTorch (make bench-torch installs it)"


def load() -> str:
    """Returns the load average of the last minute, after three minutes at most in which it falls to that of an idle machine."""
    end = time.monotonic() + 180
    while os.getloadavg()[0] > IDLE and time.monotonic() < end:
        time.sleep(5)
    return f"{os.getloadavg()[0]:.1f}"


def cpu_flags() -> str:
    """Returns all of the processor's flags, where the system tells them."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "unknown")
