"""Who the workers of a run are: every source ends as one list of addresses, in the order that all see, the chief's first."""

import dataclasses
import ipaddress
import json
import os
import socket

import tensorflow as tf
from ml_collections import ConfigDict

from mptrain.errors import InputError

_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
        addresses: "host:port" of each worker, the chief's first.
        index: this worker's place among them.
    """

    addresses: tuple[str, ...]
    index: int

    def __str__(self) -> str:
        return f"worker {self.index} of {len(self.addresses)}"

    def resolver(self) -> tf.distribute.cluster_resolver.ClusterResolver:
        """Returns what `MultiWorkerMirroredStrategy` reads the cluster from: all workers alike, the chief as number 0."""
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(self.addresses)}),
            task_type="worker",
            task_id=self.index,
            num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
            rpc_layer="grpc",
        )


def is_announced() -> bool:
    """Whether `TF_CONFIG` names a cluster of several workers, which `devices.strategy="auto"` follows."""
    return _has_cluster(os.environ.get("TF_CONFIG")) and len(_from_tf_config().addresses) > 1


def _has_cluster(text: str | None) -> bool:
    """Whether `TF_CONFIG` means to name a cluster; some launchers leave an empty one, which means none."""
    if not text:
        return False
    try:
        content = json.loads(text)
    except ValueError:
        return True  # which is told as a mistake when it is read
    return not isinstance(content, dict) or bool(content.get("cluster"))


def find(config: ConfigDict) -> Cluster:
    """Returns the cluster that `config.devices` names a source for.

    Raises:
        InputError: if the source is not there, or what it says cannot be.
    """
    sources = {
        "tf_config": _from_tf_config,
        "slurm": lambda: _from_slurm(config),
        "kubernetes": lambda: _from_kubernetes(config),
    }
    kind = config.cluster
    if kind == "auto":
        named = _has_cluster(os.environ.get("TF_CONFIG"))
        kind = "slurm" if not named and "SLURM_STEP_NODELIST" in os.environ else "tf_config"
    return sources[kind]()


def _from_tf_config() -> Cluster:
    text = os.environ.get("TF_CONFIG")
    if not text:
        raise InputError(f"multi_worker needs to know its workers: set TF_CONFIG, as {_EXAMPLE}, or config.devices.cluster")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"TF_CONFIG is no JSON ({error}): write it as {_EXAMPLE}") from error
    jobs = content.get("cluster") if isinstance(content, dict) else None
    if not isinstance(jobs, dict) or not jobs:
        raise InputError(f"TF_CONFIG has no cluster: write it as {_EXAMPLE}")
    others = sorted(jobs.keys() - {"chief", "worker"})
    if others:
        why = ": parameter servers update asynchronously, so a skipped step cannot be agreed on" if "ps" in others else ""
        raise InputError(f"TF_CONFIG has tasks of the type {others[0]!r}{why}: write only 'chief' and 'worker'")
    for name, addresses in jobs.items():
        _check_addresses(name, addresses)
    places = [(name, index) for name in ("chief", "worker") for index in range(len(jobs.get(name, [])))]
    addresses = tuple(jobs[name][index] for name, index in places)
    if len(set(addresses)) < len(addresses):
        raise InputError("TF_CONFIG gives two workers one address: give each its own host and port")
    task = content.get("task")
    if not isinstance(task, dict) or not {"type", "index"} <= task.keys():
        raise InputError(f"TF_CONFIG has no task with type and index: write it as {_EXAMPLE}")
    own = (task["type"], task["index"])
    if isinstance(own[1], bool) or own not in places:
        raise InputError(
            f"TF_CONFIG's task is {own[0]!r} {own[1]!r}, which is not in its cluster: there are"
            f" {', '.join(f'{len(addresses)} of type {name!r}' for name, addresses in jobs.items())}, counted from 0"
        )
    return Cluster(addresses, places.index(own))


def _check_addresses(name: str, addresses: object) -> None:
    if not isinstance(addresses, list):
        raise InputError(f"TF_CONFIG's {name} is {addresses!r}: write a list of addresses, as {_EXAMPLE}")
    for address in addresses:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        if not _can_be_host(host) or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
            raise InputError(f"TF_CONFIG's {name} has the address {address!r}: write it as host:port")


def _can_be_host(host: str) -> bool:
    try:
        return bool(host.encode("idna"))  # as it is written before it is looked up: no empty label, none over 63 characters
    except UnicodeError:
        return False


def _from_slurm(config: ConfigDict) -> Cluster:
    """The resolver sorts the hosts by name while Slurm counts tasks in its own order, so a task is found by its host here."""
    needed = ("PROCID", "STEP_NUM_TASKS", "STEP_NODELIST", "STEP_TASKS_PER_NODE", "LOCALID")
    absent = [f"SLURM_{name}" for name in needed if f"SLURM_{name}" not in os.environ]
    absent += [] if "SLURMD_NODENAME" in os.environ else ["SLURMD_NODENAME"]
    if absent:
        raise InputError(f"devices.cluster is 'slurm' and {absent[0]} is not set: start the workers with srun")
    if not (os.environ["SLURM_LOCALID"].isascii() and os.environ["SLURM_LOCALID"].isdecimal()):
        raise InputError(f"SLURM_LOCALID is {os.environ['SLURM_LOCALID']!r}, which is no number: start the workers with srun")
    gpus = len(tf.config.list_physical_devices("GPU"))  # srun's own binding says which; the resolver shall not change it
    try:
        spec = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=config.port, gpus_per_node=2**20, gpus_per_task=max(gpus, 1), auto_set_gpu=False
        ).cluster_spec()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"Slurm's environment cannot be read: {error}") from error
    addresses = tuple(spec.as_dict()["worker"])
    if (highest := max(int(address.rsplit(":", 1)[1]) for address in addresses)) >= 2**16:
        raise InputError(
            f"config.devices.port is {config.port}, and Slurm's tasks on one host take those up to {highest}: write a port so"
            " low that all are below 65536"
        )
    own = f"{os.environ['SLURMD_NODENAME']}:{config.port + int(os.environ['SLURM_LOCALID'])}"
    if own not in addresses:
        raise InputError(f"Slurm's environment names {', '.join(addresses[:4])} ... and this task is {own}: start it with srun")
    return Cluster(addresses, addresses.index(own))


def _from_kubernetes(config: ConfigDict) -> Cluster:
    if not config.workers or not config.kubernetes_pods:
        raise InputError(
            "devices.cluster is 'kubernetes': set devices.workers, the number of pods, and devices.kubernetes_pods, the label"
            " that they share, as job-name=mnist"
        )
    try:
        from mptrain import kubernetes_pods  # the only one that needs the kubernetes package
    except ImportError as error:
        raise InputError("devices.cluster is 'kubernetes': pip install kubernetes, or set TF_CONFIG as TFJob does") from error
    addresses = kubernetes_pods.addresses(config.kubernetes_pods, config.port, config.workers, config.start_timeout)
    own = [index for index, address in enumerate(addresses) if _is_own(address.rsplit(":", 1)[0])]
    if len(own) != 1:
        raise InputError(
            f"none of the pods' addresses, {', '.join(addresses[:4])}, is this pod's: check devices.kubernetes_pods"
        )
    return Cluster(addresses, own[0])


def _is_own(host: str) -> bool:
    """Whether an IP address is this host's: only such can be listened on."""
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
