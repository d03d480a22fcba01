"""Who the workers are: every source, and every way in which it can be wrong."""

import http.server
import json
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
        (tf_config({"worker": ["host..x:2222"]}), "has the address 'host..x:2222'"),
        (tf_config({"worker": [f"{'a' * 64}:2222"]}), "write it as host:port"),
        (tf_config({"worker": ["a:²"]}), "has the address 'a:²'"),
        (tf_config({"worker": ["a:٣"]}), "has the address 'a:٣'"),
        (tf_config({"worker": "a:1"}), "write a list of addresses"),
    ],
)
def test_tf_config_that_cannot_be_is_refused_in_one_line(devices_config, monkeypatch, text, message):
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as caught:
        cluster.find(devices_config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "", '{"task": {"type": "worker", "index": 0}}', '{"cluster": {}}', '{"cluster": null}'])
def test_tf_config_without_a_cluster_announces_none(devices_config, monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    assert not cluster.is_announced()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")  # which "auto" then reads
    with pytest.raises(InputError, match="SLURM_PROCID is not set"):
        cluster.find(devices_config)


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


@pytest.mark.parametrize(
    ("name", "value", "port", "message"),
    [
        ("SLURM_LOCALID", "x", 8470, "SLURM_LOCALID is 'x', which is no number"),
        ("SLURM_LOCALID", "²", 8470, "SLURM_LOCALID is '²', which is no number"),
        ("SLURM_PROCID", "x", 8470, "Slurm's environment cannot be read"),
        ("SLURM_LOCALID", "0", 65535, "take those up to 65536: write a port so low that all are below 65536"),
    ],
)
def test_slurms_environment_that_cannot_be_is_refused_in_one_line(devices_config, monkeypatch, name, value, port, message):
    environment = {"STEP_NODELIST": "node1", "STEP_NUM_TASKS": "2", "STEP_TASKS_PER_NODE": "2", "PROCID": "0", "LOCALID": "0"}
    for variable, content in environment.items():
        monkeypatch.setenv(f"SLURM_{variable}", content)
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setenv(name, value)
    devices_config.port = port
    with pytest.raises(InputError, match=message) as caught:
        cluster.find(devices_config)
    assert "\n" not in str(caught.value)


def test_slurm_outside_of_srun_is_refused(devices_config):
    devices_config.cluster = "slurm"
    with pytest.raises(InputError, match="SLURM_PROCID is not set: start the workers with srun"):
        cluster.find(devices_config)


class _KubernetesServer(http.server.BaseHTTPRequestHandler):
    """What the API server answers to a request for the pods of a namespace."""

    pods = ()
    going = ()  # names of those that are being deleted
    status = 200
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        items = [{"metadata": {"name": name}, "status": {"phase": phase, "podIP": ip}} for name, phase, ip in self.pods]
        for item in items:
            if item["metadata"]["name"] in self.going:
                item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        body = json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}).encode()
        self.send_response(self.status)
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


def test_kubernetes_pods_are_taken_by_their_own_addresses_in_the_order_of_their_names(kubernetes_server, monkeypatch):
    _KubernetesServer.asked.clear()
    _KubernetesServer.pods = [
        ("mnist-1-b", "Running", "127.0.0.1"),
        ("mnist-0-a", "Running", "192.0.2.7"),
        ("mnist-0-0", "Failed", "192.0.2.9"),
        ("mnist-0-1", "Running", "192.0.2.8"),
    ]
    monkeypatch.setattr(_KubernetesServer, "going", ["mnist-0-1"])
    assert cluster.find(kubernetes_server) == Cluster(("192.0.2.7:8470", "127.0.0.1:8470"), 1)
    assert _KubernetesServer.asked[0].startswith("/api/v1/namespaces/research/pods?labelSelector=job-name")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["Pending", "Running", None])  # the running one has no address yet
def test_kubernetes_pods_that_do_not_come_are_told_after_the_stated_time(kubernetes_server, phase):
    _KubernetesServer.pods = [("a", "Running", "127.0.0.1")] + ([("b", phase, None)] if phase else [])
    with pytest.raises(RunError, match="of 2 pods with the label job-name=mnist run after 3 s"):
        cluster.find(kubernetes_server)


def test_kubernetes_that_forbids_to_list_pods_says_what_to_allow(kubernetes_server, monkeypatch):
    monkeypatch.setattr(_KubernetesServer, "status", 403)
    with pytest.raises(
        InputError, match="403 Forbidden; let the pods' service account list pods, as docs/cluster.md"
    ) as caught:
        cluster.find(kubernetes_server)
    assert "\n" not in str(caught.value)


def test_kubernetes_without_its_fields_is_refused(devices_config):
    devices_config.cluster = "kubernetes"
    with pytest.raises(InputError, match="set devices.workers, the number of pods, and devices.kubernetes_pods"):
        cluster.find(devices_config)
