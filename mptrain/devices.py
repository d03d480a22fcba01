"""The `tf.distribute` strategy that a config asks for; `python -m mptrain.devices` shows what there is to choose from."""

# ruff: noqa: E402
import contextlib
import glob
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator

if __name__ == "__main__":  # TensorFlow reads this when it is imported, and would greet the user
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import rich.box
import rich.console
import rich.table
import tensorflow as tf
from ml_collections import ConfigDict

from mptrain import cluster, precision, rendezvous
from mptrain.config import default_config
from mptrain.errors import InputError, RunError, speak_as
from mptrain.hardware import hardware
from mptrain.watchdog import ends_process_after
from mptrain.workers import Workers, reason

_TPU_VARIABLES = ("TPU_NAME", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS")
_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def strategy(config: ConfigDict) -> tf.distribute.Strategy:
    """Returns the strategy for `config.devices`; sets memory growth and logical CPUs first.

    Under "multi_worker" returns once all workers are there.

    Raises:
        InputError: if the hardware or the cluster cannot serve it, or TensorFlow has started its devices already and can no
            longer be told.
        RunError: if workers are missing.
    """
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    gpus = tf.config.list_physical_devices("GPU")
    _configure_devices(gpus, config.virtual_cpus)
    name = _choose(config, len(gpus)) if config.strategy == "auto" else config.strategy
    makers = {"one_device": _one_device, "mirrored": _mirrored, "multi_worker": _multi_worker, "tpu": _tpu}
    return makers[name](config, len(gpus))


def is_multi_worker(config: ConfigDict) -> bool:
    """Whether `config.devices` asks for several worker processes."""
    return config.strategy == "multi_worker" or config.strategy == "auto" and _choose(config, 0) == "multi_worker"


def _choose(config: ConfigDict, gpus: int) -> str:
    if config.virtual_cpus == 0 and cluster.is_announced():
        return "multi_worker"
    if config.virtual_cpus == 0 and hardware().tpus:
        return "tpu"
    return "mirrored" if config.virtual_cpus > 1 or gpus > 1 and not config.virtual_cpus else "one_device"


def _one_device(config: ConfigDict, gpus: int) -> tf.distribute.Strategy:
    return tf.distribute.OneDeviceStrategy("GPU:0" if gpus and not config.virtual_cpus else "CPU:0")


def _mirrored(config: ConfigDict, gpus: int) -> tf.distribute.Strategy:
    if config.virtual_cpus or not gpus:
        # Collectives between CPUs of one process are keyed by process: two strategies of different sizes would clash.
        devices = [f"CPU:{i}" for i in range(max(config.virtual_cpus, 1))]
        return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(gpus)])


def _multi_worker(config: ConfigDict, gpus: int) -> tf.distribute.Strategy:
    if config.communication == "nccl" and not gpus:
        raise InputError("config.devices.communication is 'nccl' and there is no GPU: write 'auto' or 'ring'")
    workers = cluster.find(config)
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation[config.communication.upper()]
    )
    if len(workers.addresses) > 1:
        speak_as(str(workers))
    rendezvous.wait_for_all(workers, config.start_timeout)
    late = f"{workers}: TensorFlow did not connect the workers within {config.start_timeout:g} s; start all again"
    try:
        with ends_process_after(config.start_timeout, late), _without_greeting():
            return tf.distribute.MultiWorkerMirroredStrategy(workers.resolver(), options)
    except tf.errors.OpError as error:
        raise RunError(f"{workers}: TensorFlow could not connect the workers; start all again ({reason(error)})") from error
    except RuntimeError as error:
        raise _too_late() from error
    finally:
        _hear_sigterm_again()


def _hear_sigterm_again() -> None:
    """Puts Python's handler back, which TensorFlow's notifier of preemptions replaced by one that hears and does nothing."""
    handler = signal.getsignal(signal.SIGTERM)  # as Python knows it, whatever is installed
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """Keeps the notice of TensorFlow's server that it has started, which no setting silences, off the terminal."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        except tf.errors.OpError:
            caught.truncate(0)  # the error says the same
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            caught.seek(0)
            lines = [line for line in caught if not re.search(rb"before absl::InitializeLog|Started server with target", line)]
            os.write(2, b"".join(lines))


def _tpu(config: ConfigDict, gpus: int) -> tf.distribute.Strategy:
    looked = [f"config.devices.tpu ({config.tpu!r})", *_TPU_VARIABLES, *_TPU_FILES]
    if not config.tpu and not any(name in os.environ for name in _TPU_VARIABLES) and not any(map(glob.glob, _TPU_FILES)):
        raise InputError(
            f"devices.strategy is 'tpu' and there is none: looked for {', '.join(looked)}; set devices.tpu to the TPU's name or"
            " address, to 'local' on a TPU VM, or another strategy"
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(config.tpu or None)
        address = resolver.master().removeprefix("grpc://")
        if address and (fault := rendezvous.fault_of(address)):  # which TensorFlow would try for ever
            raise ConnectionError(fault)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except Exception as error:  # of many kinds: Cloud's API, the network, the TPU's own driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the TPU {config.tpu or os.environ.get('TPU_NAME', 'of this host')!r} does not answer: {reason}"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


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
        raise _too_late() from error


def _too_late() -> InputError:
    return InputError(
        "config.devices comes too late: TensorFlow has started its devices already; build the trainer before the first"
        " TensorFlow operation of the program"
    )


def describe(strategy: tf.distribute.Strategy) -> str:
    """Returns the line that tells the user what the run computes on."""
    count, workers = strategy.num_replicas_in_sync, Workers(strategy).count
    where = f" on {workers} workers" if workers > 1 else ""
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)  # whose class has another name
    name = "MultiWorkerMirroredStrategy" if several else type(strategy).__name__
    return f"{hardware()}; {name}, {count} replica{'s' if count > 1 else ''}{where}"


def main() -> None:
    """Prints what hardware is here, and what `auto` makes of it."""
    here = hardware()
    table = rich.table.Table("device", "what", "16 bits", title="Devices", box=rich.box.SIMPLE_HEAD)
    table.add_row("CPU", f"{here.cpu_name}, {here.cpu_cores} cores", here.sixteen_bit_features)
    for number, gpu in enumerate(here.gpus):
        table.add_row(f"GPU:{number}", str(gpu), gpu.sixteen_bit_features)
    if here.tpus:
        table.add_row("TPU", f"{here.tpus} cores", "bfloat16")
    console = rich.console.Console(highlight=False)
    console.print(table)
    config = default_config()
    chosen = precision.get("auto")
    console.print(f"precision.policy=auto takes {chosen.name} ({chosen.reason.removeprefix('auto: ')})", soft_wrap=True)
    console.print(f"devices.strategy=auto takes {_choose(config.devices, len(here.gpus))}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"mptrain: {error}", file=sys.stderr)
        sys.exit(2)
