"""The addresses of a job's pods, from TensorFlow's Kubernetes resolver.

The resolver asks for the pods of all namespaces, which a job is rarely allowed, takes the address of the pod's host, on which
its port is not open, and looks for credentials outside of the cluster only. So it is handed a client that knows better.
"""

import time
import types

import kubernetes
import tensorflow as tf

from mptrain.errors import InputError, RunError

_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


class _Pods:
    """The part of a Kubernetes client that the resolver calls: the pods of this namespace, by their own addresses."""

    def __init__(self):
        try:
            kubernetes.config.load_incluster_config()
            with open(_NAMESPACE) as file:
                self._namespace = file.read().strip()
        except kubernetes.config.ConfigException:
            kubernetes.config.load_kube_config()
            context = kubernetes.config.list_kube_config_contexts()[1]["context"]
            self._namespace = context.get("namespace", "default")
        self._client = kubernetes.client.CoreV1Api()

    def list_pod_for_all_namespaces(self, label_selector: str):
        found = self._client.list_namespaced_pod(self._namespace, label_selector=label_selector)
        coming = [pod for pod in found.items if not _is_of_an_earlier_try(pod)]
        for pod in coming:
            pod.status.host_ip = pod.status.pod_ip
            if not pod.status.pod_ip:  # a running pod may be listed before its address is
                pod.status.phase = "Pending"
        return types.SimpleNamespace(items=coming)


def _is_of_an_earlier_try(pod: kubernetes.client.V1Pod) -> bool:
    """Whether a pod has ended or, as one that is being deleted, is called "Running" until it has."""
    return pod.metadata.deletion_timestamp is not None or pod.status.phase in ("Succeeded", "Failed")


def addresses(label: str, port: int, workers: int, timeout: float) -> tuple[str, ...]:
    """Returns "ip:port" of the job's pods, in the order of their names, once all of them run.

    Args:
        label: label selector that all pods of the job, and no others, carry.
        port: on which each listens.
        workers: how many there are.
        timeout: seconds.

    Raises:
        InputError: if Kubernetes cannot be asked.
        RunError: if they do not run within `timeout`.
    """
    start = time.monotonic()
    while True:
        try:
            resolver = tf.distribute.cluster_resolver.KubernetesClusterResolver(
                {"worker": [label]}, tf_server_port=port, override_client=_Pods()
            )
            found, state = resolver.cluster_spec().as_dict().get("worker", []), ""
        except RuntimeError as error:  # one of them does not run yet
            found, state = [], f" ({error})"
        except kubernetes.client.ApiException as error:
            hint = "; let the pods' service account list pods, as docs/cluster.md shows" if error.status == 403 else ""
            raise InputError(f"Kubernetes does not tell the pods: {error.status} {error.reason}{hint}") from error
        except Exception as error:  # of the client: no credentials, no connection
            raise InputError(f"Kubernetes cannot be asked for the pods: {str(error).splitlines()[0]}") from error
        if len(found) == workers:
            return tuple(found)
        if time.monotonic() - start > timeout:
            raise RunError(f"{len(found)} of {workers} pods with the label {label} run after {timeout:g} s{state}")
        time.sleep(1)
