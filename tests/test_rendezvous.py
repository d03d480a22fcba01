"""Workers that find each other, on real sockets: each way in which they can miss each other ends in one line."""

import concurrent.futures
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from mptrain import rendezvous
from mptrain.cluster import Cluster
from mptrain.errors import InputError, RunError
from tests.conftest import ROOT
from tests.test_multi_worker import free_ports

pytestmark = pytest.mark.slow  # left out by `make test-fast`

_ONE_WORKER = """
import json, os, sys
from mptrain import rendezvous
from mptrain.cluster import Cluster
rendezvous.wait_for_all(Cluster(tuple(json.loads(sys.argv[1])), int(sys.argv[2])), 60)
"""


def loopback(count, host="127.0.0.1"):
    return tuple(f"{host}:{port}" for port in free_ports(count))


def outcome(cluster, timeout):
    """Returns None, or what `wait_for_all` raised."""
    try:
        return rendezvous.wait_for_all(cluster, timeout)
    except (InputError, RunError) as error:
        return error


@contextlib.contextmanager
def meeting(*clusters, timeout=30.0):
    """The outcomes, as futures, of workers that wait for each other, each in a thread with a loop of its own."""
    with concurrent.futures.ThreadPoolExecutor(len(clusters)) as pool:
        yield [pool.submit(outcome, cluster, timeout) for cluster in clusters]


def told(refusals):
    assert all(isinstance(error, (InputError, RunError)) for error in refusals), refusals
    assert not [error for error in refusals if "\n" in str(error)]
    return [str(error) for error in refusals]


@pytest.mark.parametrize("hosts", [["127.0.0.1"] * 5, ["[::1]"] * 2, ["[::1]", "127.0.0.1", "localhost"]])
def test_all_workers_see_each_other_and_leave_their_ports_free(hosts):
    addresses = tuple(f"{host}:{port}" for host, port in zip(hosts, free_ports(len(hosts)), strict=True))
    with meeting(*(Cluster(addresses, index) for index in range(len(hosts)))) as outcomes:
        pass
    assert [each.result() for each in outcomes] == [None] * len(hosts)
    for address in addresses:
        socket.create_server(("", int(address.rsplit(":", 1)[1]))).close()


def test_worker_with_another_list_is_named_with_the_address_that_differs():
    addresses = loopback(3)
    other = (*addresses[:2], loopback(1)[0])
    with meeting(Cluster(addresses, 0), Cluster(other, 1), Cluster(addresses, 2)) as outcomes:
        pass
    messages = told([each.result() for each in outcomes])
    for index, message in enumerate(messages):
        assert message.startswith(f"worker {index} of 3: worker ")
        assert {other[2], addresses[2]} <= set(re.findall(r"127[.\d]+:\d+", message))
        assert "as the address of worker 2, and worker " in message


def test_worker_with_a_longer_list_is_named():
    addresses = loopback(3)
    with meeting(Cluster(addresses[:2], 0), Cluster(addresses, 1)) as outcomes:
        pass
    for message in told([each.result() for each in outcomes]):  # each may tell what the other found first
        assert re.search(
            r"worker (1 has 3 addresses and worker 0 has 2|0 has 2 addresses and worker 1 has 3): give all", message
        )


def test_address_that_leads_back_to_the_worker_itself_is_refused():
    (port,) = free_ports(1)
    cluster = Cluster((f"127.0.0.1:{port}", f"127.0.0.2:{port}"), 0)
    with pytest.raises(InputError, match=r"at worker 1's address, 127.0.0.2:\d+, answers worker 0 itself"):
        rendezvous.wait_for_all(cluster, 20)


def greet(address, **content):
    host, port = address.rsplit(":", 1)
    for _ in range(400):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as peer:
            peer.sendall(json.dumps(content).encode() + b"\n")
            return json.loads(peer.makefile().readline())
        time.sleep(0.05)
    raise AssertionError(f"nobody listens at {address}")


def test_second_process_with_the_same_index_is_refused():
    addresses = loopback(2)
    with meeting(Cluster(addresses, 0)) as outcomes:
        digest = rendezvous._Rendezvous(Cluster(addresses, 0))._greeting["mptrain"]
        answer = greet(addresses[0], mptrain=digest, index=0, nonce="of another process")
    assert (answer["mptrain"], answer["index"]) == (digest, 0)
    (message,) = told([outcomes[0].result()])
    assert message == "worker 0 of 2: two processes were told to be worker 0: give each worker its own index"


def test_worker_that_answers_in_anothers_stead_is_refused():
    addresses = loopback(3)
    listener = socket.create_server(("127.0.0.1", int(addresses[2].rsplit(":", 1)[1])))
    digest = rendezvous._Rendezvous(Cluster(addresses, 0))._greeting["mptrain"]

    def answer():
        with listener.accept()[0] as peer:
            peer.recv(1000)
            peer.sendall(json.dumps({"mptrain": digest, "index": 1, "nonce": "n"}).encode() + b"\n")

    with listener:
        threading.Thread(target=answer, daemon=True).start()
        error = outcome(Cluster(addresses, 0), 20)
    assert f"at worker 2's address, {addresses[2]}, answers one that was told to be worker 1" in str(error)


def test_foreign_listener_is_no_worker_and_foreign_guests_disturb_nobody():
    addresses = loopback(2)
    with socket.create_server(("127.0.0.1", int(addresses[1].rsplit(":", 1)[1]))) as foreign:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with foreign.accept()[0] as peer:
                        peer.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=serve, daemon=True).start()
        with meeting(Cluster(addresses, 0), timeout=3) as outcomes:
            for line in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b"{}\n", b""):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(addresses[0][10:]))) as guest:
                    guest.sendall(line)
    (message,) = told([outcomes[0].result()])
    assert f"worker 1 at {addresses[1]} (what answers there is no worker that starts now) did not come within 3 s" in message


def test_worker_that_saw_all_and_went_away_before_the_sign_is_named():
    addresses = loopback(3)
    digest = rendezvous._Rendezvous(Cluster(addresses, 0))._greeting["mptrain"]
    listener = socket.create_server(("127.0.0.1", int(addresses[2].rsplit(":", 1)[1])))

    def see_and_go():  # answers both, tells worker 0 nothing, and is gone
        for _ in range(2):
            with listener.accept()[0] as peer:
                peer.recv(1000)
                peer.sendall(json.dumps({"mptrain": digest, "index": 2, "nonce": "n"}).encode() + b"\n")
        listener.close()

    threading.Thread(target=see_and_go, daemon=True).start()
    with meeting(Cluster(addresses, 0), Cluster(addresses, 1), timeout=3) as outcomes:
        pass
    first, second = told([each.result() for each in outcomes])
    assert f"worker 2 at {addresses[2]} (has not said that it sees all) did not come within 3 s" in first
    assert f"worker 2 at {addresses[2]} (worker 0 waits for it)" in second or "worker 0 at" in second


def test_time_is_kept_where_addresses_drop_packets_and_names_are_unknown():
    silent = tuple(f"192.0.2.{host}:1" for host in range(1, 12))  # of TEST-NET-1, which nobody has
    begin = time.monotonic()
    error = outcome(Cluster((*loopback(1), *silent, "no-such-host.invalid:1"), 0), 3)
    assert 2.9 < time.monotonic() - begin < 5
    assert "and 8 more did not come within 3 s" in str(error)


def test_look_up_that_hangs_does_not_hold_the_worker(monkeypatch):
    release, plain = threading.Event(), socket.getaddrinfo

    def hang(host, *arguments, **options):
        if host == "slow.example":
            release.wait()
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return plain(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    begin = time.monotonic()
    error = outcome(Cluster((*loopback(1), "slow.example:1"), 0), 1)
    assert time.monotonic() - begin < 2.5
    assert "worker 1 at slow.example:1" in str(error)
    release.set()


def test_host_is_reached_by_the_second_of_its_addresses_where_the_first_is_dead(monkeypatch):
    first, second = free_ports(2)
    addresses, plain = (f"127.0.0.1:{first}", f"two.example:{second}"), socket.getaddrinfo

    def two(host, *arguments, **options):
        if host == "two.example":
            return plain("192.0.2.1", *arguments, **options) + plain("127.0.0.1", *arguments, **options)
        return plain(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with meeting(Cluster(addresses, 0), Cluster(addresses, 1), timeout=15) as outcomes:
        pass
    assert [each.result() for each in outcomes] == [None, None]


def test_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"worker 0 of 2: its port {port} is taken by another process"):
            rendezvous.wait_for_all(Cluster((f"localhost:{port}", "localhost:1"), 0), 5)


def test_worker_whose_host_is_unknown_is_missing():
    (port,) = free_ports(1)
    with pytest.raises(RunError, match=r"worker 1 at no-such-host.invalid:1 \(.+\) did not come within 0.5 s"):
        rendezvous.wait_for_all(Cluster((f"localhost:{port}", "no-such-host.invalid:1"), 0), 0.5)


def test_waiting_worker_ends_at_once_by_ctrl_c():
    code = _ONE_WORKER.replace("rendezvous.wait", "print(flush=True); rendezvous.wait")
    arguments = [sys.executable, "-c", code, json.dumps(loopback(2)), "0"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(2)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
