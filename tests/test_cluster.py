"""Who the workers are: every source, and every way in which it can be wrong."""

import http.server
import json
import socket
import threading

import pytest

from mptrain import cluster, default_config
from mptrain.cluster import Cluster
from mptrain.errors import InputError, RunError


@pytest.fixture
def devices_config(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    return default_config().devices


def tf_config(jobs, kind="worker", index=0):
    return json.dumps({"cluster": jobs, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("kind", "index", "place"), [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)], ids=["chief", "first", "second"]
)
def test_chief_stands_before_the_workers(devices_config, monkeypatch, kind, index, place):
    monkeypatch.setenv("TF_CONFIG", tf_config({"worker": ["b:1", "c:1"], "chief": ["a:1"]}, kind, index))
    assert cluster.find(devices_config) == Cluster(("a:1", "b:1", "c:1"), place)
    assert cluster.is_announced()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "set TF_CONFIG, as"),
        ("", "set TF_CONFIG, as"),
        ("{'cluster': 1}", "TF_CONFIG is no JSON"),
        ("[]", "TF_CONFIG has no cluster"),
        ('{"task": {"type": "worker", "index": 0}}', "TF_CONFIG has no cluster"),
        ('{"cluster": {"worker": ["a:1"]}}', "TF_CONFIG has no task with type and index"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}', "TF_CONFIG has no task with type and index"),
        (tf_config({"worker": ["a:1", "b:1"]}, index=2), "which is not in its cluster: there are 2 of type 'worker'"),
        (tf_config({"worker": ["a:1", "b:1"]}, index=-1), "which is not in its cluster"),
        (tf_config({"worker": ["a:1", "b:1"]}, index="1"), "which is not in its cluster"),
        (tf_config({"worker": ["a:1", "b:1"]}, index=True), "which is not in its cluster"),
        (tf_config({"worker": ["a:1", "b:1"]}, kind="chief"), "which is not in its cluster"),
        (tf_config({"worker": ["a:1"], "ps": ["b:1"]}), "parameter servers update asynchronously"),
        (tf_config({"worker": ["a:1"], "evaluator": ["b:1"]}), "tasks of the type 'evaluator'"),
        (tf_config({"worker": ["a:1", "a:1"]}), "gives two workers one address"),
        (tf_config({"worker": ["a"]}), "has the address 'a': write it as host:port"),
        (tf_config({"worker": ["a:0"]}), "has the address 'a:0'"),
        (tf_config({"worker": [7]}), "has the address 7"),
        (tf_config({"worker": "a:1"}), "write a list of addresses"),
    ],
)
def test_tf_config_that_cannot_be_is_refused_in_one_line(devices_config, monkeypatch, text, message):
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as caught:
        cluster.find(devices_config)
    assert "\n" not in str(caught.value)


def test_slurms_tasks_are_found_by_their_host_in_whatever_order_the_hosts_stand(devices_config, monkeypatch):
    environment = {
        "SLURM_STEP_NODELIST": "node[2,10]",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = []
    for rank, (host, local) in enumerate([("node2", 0), ("node2", 1), ("node10", 0), ("node10", 1)]):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURM_LOCALID", str(local))
        monkeypatch.setenv("SLURMD_NODENAME", host)
        found.append(cluster.find(devices_config))
        assert found[-1].addresses[found[-1].index] == f"{host}:{8470 + local}"
    assert len({each.addresses for each in found}) == 1
    assert sorted(each.index for each in found) == [0, 1, 2, 3]


def test_slurm_outside_of_srun_is_refused(devices_config):
    devices_config.cluster = "slurm"
    with pytest.raises(InputError, match="SLURM_PROCID is not set: start the workers with srun"):
        cluster.find(devices_config)


class _KubernetesServer(http.server.BaseHTTPRequestHandler):
    """What the API server answers to a request for the pods of a namespace."""

    pods = ()
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        items = [{"metadata": {"name": name}, "status": {"phase": phase, "podIP": ip}} for name, phase, ip in self.pods]
        body = json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def kubernetes_server(devices_config, monkeypatch, tmp_path):
    """A server that speaks as much of the Kubernetes API as is asked for, and a kubeconfig that names it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _KubernetesServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "research"}}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(content))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    devices_config.update(cluster="kubernetes", workers=2, kubernetes_pods="job-name=mnist", start_timeout=3.0)
    yield devices_config
    server.shutdown()
    server.server_close()


def test_kubernetes_pods_are_taken_by_their_own_addresses_in_the_order_of_their_names(kubernetes_server):
    _KubernetesServer.asked.clear()
    _KubernetesServer.pods = [
        ("mnist-1-b", "Running", "127.0.0.1"),
        ("mnist-0-a", "Running", "192.0.2.7"),
        ("mnist-0-0", "Failed", "192.0.2.9"),
    ]
    assert cluster.find(kubernetes_server) == Cluster(("192.0.2.7:8470", "127.0.0.1:8470"), 1)
    assert _KubernetesServer.asked[0].startswith("/api/v1/namespaces/research/pods?labelSelector=job-name")


@pytest.mark.parametrize("phase", ["Pending", None])
def test_kubernetes_pods_that_do_not_come_are_told_after_the_stated_time(kubernetes_server, phase):
    _KubernetesServer.pods = [("a", "Running", "127.0.0.1")] + ([("b", phase, None)] if phase else [])
    with pytest.raises(RunError, match="of 2 pods with the label job-name=mnist run after 3 s"):
        cluster.find(kubernetes_server)


def test_kubernetes_without_its_fields_is_refused(devices_config):
    devices_config.cluster = "kubernetes"
    with pytest.raises(InputError, match="set devices.workers, the number of pods, and devices.kubernetes_pods"):
        cluster.find(devices_config)


def test_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"worker 0 of 2: its port {port} is taken by another process"):
            cluster.wait_for_all(Cluster((f"localhost:{port}", "localhost:1"), 0), 5)


def test_worker_whose_host_is_unknown_is_missing():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(RunError, match=r"worker 1 at no-such-host.invalid:1 \(.+\) did not come within 0.5 s"):
        cluster.wait_for_all(Cluster((f"localhost:{port}", "no-such-host.invalid:1"), 0), 0.5)
