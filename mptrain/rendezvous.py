"""The workers of a run find each other before TensorFlow starts its server, and check that they mean the same cluster.

TensorFlow waits for a missing worker inside one call that nothing can interrupt, and takes whatever listens at an address for
the worker that should be there. So each worker first greets every other on a plain connection, a line of JSON each way: a
digest of all addresses, the own index, and a number that no other process has. Who sees all tells worker 0 so, on a
connection that stays open, and goes on when worker 0 says that everybody does: a worker that goes away until then is noticed.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import sys
import threading

from mptrain.cluster import Cluster
from mptrain.errors import InputError, RunError

_PATIENCE = 2.0  # seconds for one greeting, from the look-up of the name to the answer
_TOLD_AFTER = 5.0  # seconds of waiting before the user is told for whom
_LINGER = 3.0  # seconds in which a worker that refuses still tells the others why
_PAUSES = (0.1, 1.6)  # seconds before a worker is greeted again: at first, at most
_AT_ONCE = 256  # greetings under way, well below the usual limit of open files
_LONGEST_LINE = 2**20  # bytes; the addresses of thousands of workers fit
_FAILURES = (OSError, ValueError, asyncio.TimeoutError)  # of one greeting; the next may go better
_FOREIGN = "what answers there is no worker that starts now"


def wait_for_all(cluster: Cluster, timeout: float) -> None:
    """Returns when all workers see each other; leaves the own port free again.

    Args:
        cluster: the workers.
        timeout: seconds.

    Raises:
        InputError: if the own port is taken, or the workers were told of different clusters.
        RunError: if workers are missing after `timeout`, naming them.
    """
    with _listen(cluster) as listener:
        asyncio.run(_Rendezvous(cluster).meet(listener, timeout))


def fault_of(address: str) -> str | None:
    """Returns None if something listens at "host:port", else why it cannot be reached."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, UnicodeError) as error:
        return _reason(error)
    return None


def _listen(cluster: Cluster) -> socket.socket:
    port = int(cluster.addresses[cluster.index].rsplit(":", 1)[1])
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", port), backlog=len(cluster.addresses), **both)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise InputError(
            f"{cluster}: its port {port} {'is taken by another process' if taken else f'cannot be used ({_reason(error)})'};"
            " give this worker another one"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return "no answer"
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Refused(ValueError):
    """The workers of this greeting were told of different clusters."""


class _Rendezvous:
    """One worker's part in it: answers the others' greetings while it greets them itself."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._greeting = {
            "mptrain": hashlib.sha256("\n".join(cluster.addresses).encode()).hexdigest(),
            "index": cluster.index,
            "nonce": secrets.token_hex(8),
        }
        self._others = [index for index in range(len(cluster.addresses)) if index != cluster.index]
        self._missing = dict.fromkeys(self._others, "not tried yet")
        self._ready = {}  # on worker 0: index -> the open connection of a worker that sees all
        self._refused = asyncio.Event()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def meet(self, listener: socket.socket, timeout: float) -> None:
        server = await asyncio.start_server(self._answer, sock=listener, limit=_LONGEST_LINE)
        steps = [asyncio.ensure_future(step) for step in (self._see_all(), self._refused.wait(), self._tell_after_a_while())]
        await asyncio.wait(steps[:2], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        steps[2].cancel()
        if self._refused.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*map(self._pass_on, self._others)), _LINGER)
            raise InputError(f"{self._cluster}: {self._greeting['fault']}")
        server.close()
        if not steps[0].done():
            raise RunError(f"{self._cluster}: {self._names()} did not come within {timeout:g} s; start all workers")
        steps[0].result()

    async def _see_all(self) -> None:
        await asyncio.gather(*map(self._see, self._others))
        await (self._give_the_sign() if self._cluster.index == 0 else self._await_the_sign())

    async def _see(self, place: int) -> None:
        async for _ in _pauses():
            try:
                async with self._slots:
                    _, writer = await asyncio.wait_for(self._greet(place), _PATIENCE)
                writer.close()
                del self._missing[place]
                return
            except _FAILURES as error:
                self._missing[place] = _reason(error)

    async def _greet(self, place: int, **more) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Returns the connection to the worker at `place`, once both have found that they mean the same cluster."""
        reader, writer = await _connected(self._cluster.addresses[place])
        try:
            _write(writer, {**self._greeting, **more})
            other = await _read(reader)
            same = other["mptrain"] == self._greeting["mptrain"]
            if not same:
                _write(writer, {"addresses": self._cluster.addresses})
            self._check(other, None if same else list(other.get("addresses", ())), place)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = asyncio.CancelledError  # with the loop; Python 3.11 would print it
        with contextlib.closing(writer), contextlib.suppress(*_FAILURES, ended):
            other = await asyncio.wait_for(_read(reader), _PATIENCE)
            same = other["mptrain"] == self._greeting["mptrain"]
            _write(writer, self._greeting if same else {**self._greeting, "addresses": self._cluster.addresses})
            addresses = None if same else (await asyncio.wait_for(_read(reader, "addresses"), _PATIENCE))["addresses"]
            self._check(other, addresses)
            if other.get("ready") and self._cluster.index == 0:
                self._ready[other["index"]] = writer
                await reader.read()  # to the end: it has heard the sign, or it has gone
                if self._ready.get(other["index"]) is writer:
                    del self._ready[other["index"]]

    def _check(self, other: dict, addresses: list | None, place: int | None = None) -> None:
        """Refuses a worker that means another cluster than this one; `place`: the one in whose stead it answered."""
        fault = other.get("fault") or self._fault(other, addresses, place)
        if fault and not self._refused.is_set():
            self._greeting["fault"] = fault
            self._refused.set()
        if fault:
            raise _Refused(fault)

    def _fault(self, other: dict, addresses: list | None, place: int | None) -> str | None:
        own, ours, index = self._cluster.index, self._cluster.addresses, other["index"]
        if other["nonce"] == self._greeting["nonce"]:
            return place is not None and (
                f"at worker {place}'s address, {ours[place]}, answers worker {own} itself: give each worker its own index and"
                " address"
            )
        if addresses is not None:
            return f"worker {index} has {_difference(addresses, ours, f'worker {own}')}: give all workers the same addresses"
        if place is not None and index != place:
            return (
                f"at worker {place}'s address, {ours[place]}, answers one that was told to be worker {index}: give each worker"
                " its own index"
            )
        return f"two processes were told to be worker {own}: give each worker its own index" if index == own else None

    async def _pass_on(self, place: int) -> None:
        """Tells another worker why this one refuses, so that it does not wait for it."""
        async for _ in _pauses():
            try:
                (await asyncio.wait_for(self._greet(place), _PATIENCE))[1].close()
                return
            except _Refused:
                return
            except _FAILURES:
                continue

    async def _give_the_sign(self) -> None:
        while waiting := [index for index in self._others if index not in self._ready]:
            self._missing = dict.fromkeys(waiting, "has not said that it sees all")
            for writer in self._ready.values():
                _write(writer, {"missing": waiting[:4]})
            await asyncio.sleep(0.2)
        self._missing = {}
        for writer in self._ready.values():
            _write(writer, {"go": True})
        for _ in range(int(_PATIENCE / 0.02)):  # until they have heard it
            if not self._ready:
                return
            await asyncio.sleep(0.02)

    async def _await_the_sign(self) -> None:
        self._missing = {0: "has not said that all see each other"}
        async for _ in _pauses():
            try:
                reader, writer = await asyncio.wait_for(self._greet(0, ready=True), _PATIENCE)
                with contextlib.closing(writer):
                    while not (said := await _read(reader, None)).get("go"):
                        self._missing = dict.fromkeys(said["missing"], "worker 0 waits for it")
                return
            except _FAILURES as error:
                self._missing = {0: _reason(error)}

    async def _tell_after_a_while(self) -> None:
        await asyncio.sleep(_TOLD_AFTER)
        print(f"mptrain: {self._cluster}: waiting for {self._names()}", file=sys.stderr, flush=True)

    def _names(self) -> str:
        shown = list(self._missing.items())[:4]
        names = [f"worker {index} at {self._cluster.addresses[index]} ({fault})" for index, fault in shown]
        return ", ".join(names) + (f" and {len(self._missing) - 4} more" if len(self._missing) > 4 else "")


def _difference(theirs: list, ours: tuple[str, ...], own: str) -> str:
    if len(theirs) != len(ours):
        return f"{len(theirs)} addresses and {own} has {len(ours)}"
    place = next(place for place, (left, right) in enumerate(zip(theirs, ours, strict=True)) if left != right)
    return f"{theirs[place]} as the address of worker {place}, and {own} has {ours[place]}"


async def _pauses():
    """Yields at once, and then after longer and longer pauses."""
    pause, longest = _PAUSES
    while True:
        yield
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest)


async def _connected(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Returns a connection to "host:port", by the first of the host's IP addresses that takes it."""
    host, port = address.rsplit(":", 1)
    found = await _looked_up(host.strip("[]"))
    for ip in found:
        try:
            return await asyncio.wait_for(asyncio.open_connection(ip, int(port), limit=_LONGEST_LINE), _PATIENCE / len(found))
        except _FAILURES as error:
            failure = error
    raise failure


async def _looked_up(host: str) -> list[str]:
    """Returns a host's IP addresses, at least one; in a thread that nobody waits for, since a look-up cannot be ended.

    (asyncio's own are waited for when the loop ends.)
    """
    answer = concurrent.futures.Future()

    def look_up() -> None:
        try:
            answer.set_result([found[4][0] for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:
            answer.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    while not answer.done():
        await asyncio.sleep(0.005)
    return answer.result()


def _write(writer: asyncio.StreamWriter, content: dict) -> None:
    writer.write(json.dumps(content).encode() + b"\n")


async def _read(reader: asyncio.StreamReader, kind: str | None = "mptrain") -> dict:
    """Returns a line's content; a ValueError says that it is none of ours: everybody may write to an open port."""
    line = await reader.readline()
    try:
        content = json.loads(line)
    except ValueError:
        raise ValueError("it has gone again" if kind is None and not line else _FOREIGN) from None
    greeting = {"mptrain": str, "index": int, "nonce": str} if kind == "mptrain" else {"addresses": list} if kind else {}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), wanted) for name, wanted in greeting.items()):
        raise ValueError(_FOREIGN)
    return content
