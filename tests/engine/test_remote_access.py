"""Who may talk to engines and coordinator over TCP: those with the key, and with TLS nobody can listen in."""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

import msgspec
import psutil
import pyarrow.flight as flight
import pytest
from fake_cluster import FakeCluster, fake_cluster
from fake_service import answers, batch_of, wait_until

from spark_llm.engine.service.coordinator_link import Link
from spark_llm.engine.service.coordinator_protocol import Cluster, Endpoint, Hello, Subscribe, Tls, ToTask, line
from spark_llm.engine.service.coordinator_server import CoordinatorServer
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.service.remote import RemoteEngine

WRONG = "0" * 64


def endpoint(cluster: FakeCluster, number: int) -> Endpoint:
    executor = cluster.executors[number]
    wait_until(lambda: executor.client._own_name in executor.client._engines)
    return executor.client._engines[executor.client._own_name]


def remote(cluster: FakeCluster, number: int, given: Cluster) -> RemoteEngine:
    return RemoteEngine(cluster.executors[number].own.spec, given, endpoint(cluster, number))


def calls(engine: RemoteEngine) -> None:
    """Each kind of call that a stranger could try; all must fail alike."""
    channel = engine.channel()
    options = flight.FlightCallOptions(timeout=10)

    def exchange() -> None:
        _, reader = channel.do_exchange(flight.FlightDescriptor.for_command(b"{}"), options)
        reader.read_chunk()

    for call in (
        exchange,
        lambda: list(channel.list_actions(options)),
        lambda: list(channel.do_action(flight.Action("status", b""), options)),
        lambda: list(channel.do_action(flight.Action("shutdown", b""), options)),
        lambda: list(channel.list_flights(b"", options)),
    ):
        with pytest.raises(flight.FlightUnauthenticatedError, match="key is missing or wrong"):
            call()


def test_an_engine_answers_nobody_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cluster(tmp_path, monkeypatch) as cluster:
        engine = cluster.add()
        known = cluster.coordinator.cluster
        calls(remote(cluster, 0, msgspec.structs.replace(known, key=WRONG)))
        bare = flight.FlightClient(f"grpc+tcp://{endpoint(cluster, 0).address}")
        with pytest.raises(flight.FlightUnauthenticatedError):
            list(bare.list_actions())
        # with the key rows are answered; actions are for the engine's own host in any case
        channel = remote(cluster, 0, known).channel()
        with pytest.raises(NotImplementedError):
            list(channel.do_action(flight.Action("shutdown", b"")))
        assert not engine.engine.seen


def test_the_coordinator_hangs_up_on_whoever_has_no_key(tmp_path: Path) -> None:
    server = CoordinatorServer()
    known = server.cluster
    try:
        for hello in (line(Hello(WRONG, "task")), b"{}\n", b"GET / HTTP/1.1\r\n\r\n", line(Hello("é", "engine"))):
            with socket.create_connection((known.host, known.port), 5) as stranger:
                stranger.settimeout(5)
                stranger.sendall(hello + line(Subscribe(0, "pool")))
                assert _all(stranger) == b""
        link = Link(known, "task", ToTask, lambda message: None)
        assert link.ask(lambda ask: Subscribe(ask, "pool")).engines == {}
        link.close()
        with pytest.raises(ConnectionError):
            link.ask(lambda ask: Subscribe(ask, "pool"))
    finally:
        server.close()
    with pytest.raises(OSError, match=r".+"):
        Link(known, "task", ToTask, lambda message: None)


def test_neither_key_shows_where_a_cluster_is_logged() -> None:
    cluster = Cluster(host="10.0.0.1", port=1, key=WRONG)
    assert WRONG not in repr(cluster) + str(Hello(WRONG, "task"))


def certificate(folder: Path, name: str) -> Tls:
    """A self-signed certificate of 127.0.0.1, by the openssl command; it is its own authority."""
    folder.mkdir()
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return Tls(cert_file=str(cert), key_file=str(key), ca_file=str(cert))


def test_with_tls_everything_between_hosts_is_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls, other = certificate(tmp_path / "own", "engines"), certificate(tmp_path / "other", "engines")
    with fake_cluster(tmp_path, monkeypatch, policy="roundRobin", tls=tls) as cluster:
        first, second = cluster.add(), cluster.add()
        wait_until(lambda: first.client.known_engines == 2)
        with first.client.stream(StreamOpen(query="q")) as stream:
            stream.send(batch_of({k: ["ask\n", f"{k // 2}\n", f"{k}"] for k in range(10)}))
            assert len(answers(stream)) == 10
        assert first.engine.seen
        assert second.engine.seen
        known = cluster.coordinator.cluster
        at = endpoint(cluster, 1)
        for address in ((known.host, known.port), (at.host, at.port)):
            with socket.create_connection(address, 5) as plain:
                context = ssl.create_default_context(cafile=tls.ca_file)
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted:
                    assert encrypted.version() == "TLSv1.3"
        for stranger in (msgspec.structs.replace(known, tls=other), msgspec.structs.replace(known, tls=None)):
            with pytest.raises(OSError, match=r".+"):
                Link(stranger, "task", ToTask, lambda message: None).ask(lambda ask: Subscribe(ask, "pool"))
            channel = remote(cluster, 1, stranger).channel()
            with pytest.raises((flight.FlightUnavailableError, flight.FlightTimedOutError)):
                list(channel.list_actions(flight.FlightCallOptions(timeout=3)))
        calls(remote(cluster, 1, msgspec.structs.replace(known, key=WRONG)))


def test_nothing_listens_before_a_task_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cluster(tmp_path, monkeypatch) as cluster:
        before = listening()
        cluster.add()
        assert len(listening() - before) == 1
        cluster.executors[0].client.join()
        assert len(listening() - before) == 1


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections(kind="tcp")
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}


def _all(connection: socket.socket) -> bytes:
    found = b""
    while chunk := connection.recv(4096):
        found += chunk
    return found
