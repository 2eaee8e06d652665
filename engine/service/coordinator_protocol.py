"""The words between the driver's coordinator, the engines that joined it, and tasks: a line of JSON each, over TCP.

The first line of a connection is a ``Hello`` with the application's key; without it the connection is closed. Then an
engine sends ``Register`` and a ``Beat`` now and then, and is told ``Registered``. A task asks ``Subscribe``,
``Dispatch`` and ``WindowAsk``, tells ``Finished`` and ``Lost``, and is told ``EngineList``, ``Gone`` and ``Stopped``.
"""

from __future__ import annotations

import ssl
from typing import Literal

import msgspec

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service.protocol import WindowRequest, learn
from spark_llm.engine.service.routing import PrefixGroup

MAX_LINE = 16 << 20
BEAT_SECONDS = 1.0  # between two signs of life of an engine
SILENT_SECONDS = 30.0  # an engine that is connected but shows none for so long is taken for lost


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files, the same on the driver and all executors: a certificate, its key, and who may have signed.

    A certificate names what its host is reached by: an engine's IP address, the driver's ``spark.driver.host``.
    """

    cert_file: str
    key_file: str
    ca_file: str

    def server(self) -> ssl.SSLContext:
        """Raises OSError where a file cannot be read or is not what it should be."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_file, self.key_file)
        return context

    def client(self) -> ssl.SSLContext:
        """Raises OSError where a file cannot be read or is not what it should be."""
        return ssl.create_default_context(cafile=self.ca_file)


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Where the coordinator of an application listens, and the key that it and the engines ask for.

    Travels in the closure of the UDFs, never in a configuration value, which the event log and the UI would show.
    """

    host: str
    port: int
    key: str
    tls: Tls | None = None

    def __repr__(self) -> str:
        return f"Cluster({self.host}:{self.port})"


class Endpoint(msgspec.Struct, frozen=True):
    """Where an engine listens for tasks of other executors."""

    host: str
    port: int

    @property
    def address(self) -> str:
        """``host:port``, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def pool_of(spec: EngineSpec) -> str:
    """Engines of equal pools give the same answers: they differ in which device of a kind they run on, and threads."""
    return msgspec.structs.replace(spec, device=spec.device.partition(":")[0], threads=0, instance=0).key


# ---- engines


class Join(msgspec.Struct, frozen=True):
    """The body of an engine's action ``join``: listen for tasks of other executors, and say so to the coordinator."""

    cluster: Cluster
    pool: str


class Joined(msgspec.Struct, frozen=True):
    """The answer: the engine's name in the cluster."""

    engine: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    key: str
    role: Literal["engine", "task"]

    def __repr__(self) -> str:
        return f"Hello({self.role})"


class Register(msgspec.Struct, frozen=True, tag=True):
    """An engine is there. pid: of its process, for logs."""

    engine: str
    pool: str
    endpoint: Endpoint
    pid: int


class Registered(msgspec.Struct, frozen=True, tag=True):
    pass


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The engine lives, and since the last beat it has evicted the prefixes that these hashes of blocks name."""

    evicted: list[int] = []


# ---- tasks


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """A task wants to know the engines of a pool, now and whenever they change. The reply is an EngineList."""

    ask: int
    pool: str


class EngineList(msgspec.Struct, frozen=True, tag=True):
    """The engines of a pool by name. ask: what it is the reply to, -1: nothing."""

    pool: str
    engines: dict[str, Endpoint]
    ask: int = -1


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    """Where are these groups' rows to go? policy: a name of ``routing.POLICIES``."""

    ask: int
    pool: str
    policy: str
    groups: list[PrefixGroup]


class Dispatched(msgspec.Struct, frozen=True, tag=True):
    """For each group its shares: (id, engine, rows), the first rows first. No shares at all: there is no engine."""

    ask: int
    shares: list[list[tuple[int, str, int]]]


class Done(msgspec.Struct, frozen=True, array_like=True):
    """``rows`` more rows of a share are done, and what they cost in all."""

    share: int
    rows: int
    computed_tokens: int
    output_tokens: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    pool: str
    policy: str
    done: list[Done]


class Lost(msgspec.Struct, frozen=True, tag=True):
    """The task has lost its connection to an engine. An engine that shows life later is used again."""

    engine: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """An engine has been silent for too long: give its rows to others, also where the connection seems to stand."""

    engine: str
    reason: str


class WindowAsk(msgspec.Struct, frozen=True, tag=True):
    """How many rows may a task ask next, under a LIMIT? Counted over all engines, so by the coordinator."""

    ask: int
    request: WindowRequest


class Granted(msgspec.Struct, frozen=True, tag=True):
    ask: int
    rows: int


class Stopped(msgspec.Struct, frozen=True, tag=True):
    """The query has as many rows of this node as its LIMIT asks for."""

    query: str
    node: str


FromEngine = Register | Beat
ToEngine = Registered
FromTask = Subscribe | Dispatch | Finished | Lost | WindowAsk
ToTask = EngineList | Dispatched | Gone | Granted | Stopped


learn(Join, Joined, Hello, FromEngine, ToEngine, FromTask, ToTask)


def line(message: msgspec.Struct) -> bytes:
    """The message as it travels."""
    return msgspec.json.encode(message) + b"\n"
