"""The words that a task and an engine exchange: Arrow schemas and the header of a stream.

A stream is one Flight DoExchange: the descriptor's command is a JSON ``StreamOpen``; the task sends record
batches of ``REQUEST_SCHEMA`` (a window each) and gets batches of ``ANSWER_SCHEMA`` in the order in which rows
finish. The engine sends its schema as soon as it has taken the stream in. Closing the stream cancels what is
unanswered; half-closing it (done writing) does not. What stops the whole stream comes as a message without rows
whose metadata is a JSON ``StreamFailure``, or ``StreamStop`` where the query has enough rows.

Each request batch may bring its own dictionary: Arrow's stream format replaces dictionaries, also nested ones
(tried with pyarrow 18 and 26), and sends one again only if it has changed. A batch travels with its whole
dictionary, so build each window's from the segments of that window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa

from spark_llm.engine.request import Constraint, SamplingParams

PROTOCOL_VERSION = 4

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),  # unique within the stream, chosen by the task
        # user message of the row: its segments joined are the text; a repeated segment travels once a batch
        pa.field("segments", pa.list_(pa.dictionary(pa.int32(), pa.utf8())), nullable=False),
        pa.field("seed", pa.int64()),  # NULL unless sampling with a seed
        pa.field("key", pa.binary()),  # digest of the row's canonical arguments; NULL: never folded
        # what the row's answer may be, one of these texts; NULL: the stream's constraint holds
        pa.field("choices", pa.list_(pa.utf8())),
    ]
)

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("text", pa.utf8()),  # NULL when the row failed
        pa.field("finish_reason", pa.utf8(), nullable=False),
        pa.field("error", pa.utf8()),  # "[CONDITION] message SQLSTATE: code", NULL when the row was answered
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("instruction_tokens", pa.int64(), nullable=False),  # of prompt_tokens: template + instruction
        pa.field("cached_tokens", pa.int64(), nullable=False),  # of prompt_tokens: found in the prefix cache
        pa.field("cached_instruction_tokens", pa.int64(), nullable=False),  # of cached_tokens
        pa.field("computed_tokens", pa.int64(), nullable=False),  # prompt_tokens - cached_tokens
        pa.field("recomputed_tokens", pa.int64(), nullable=False),  # again, after preemption or rollback
        pa.field("output_tokens", pa.int64(), nullable=False),
        # True: the answer is that of a request of the query with an equal key; all token counts are 0
        pa.field("folded", pa.bool_(), nullable=False),
        # True: the answer comes from the result cache, of this query's past or another's; all token counts are 0
        pa.field("stored", pa.bool_(), nullable=False),
        # probability of the answer among the choices, by the model's own distribution; NULL where there are none
        pa.field("confidence", pa.float64()),
    ]
)


def request_rows(
    ids: Sequence[int] | pa.Array,
    segments: pa.ListArray,
    *,
    seeds: Sequence[int | None] | pa.Array | None = None,
    keys: Sequence[bytes | None] | pa.Array | None = None,
    choices: Sequence[Sequence[str] | None] | pa.Array | None = None,
) -> pa.RecordBatch:
    """A batch of REQUEST_SCHEMA; a column that is None is NULL in all rows."""
    columns: dict[str, object] = {"id": ids, "segments": segments, "seed": seeds, "key": keys, "choices": choices}
    arrays = []
    for field in REQUEST_SCHEMA:
        given = columns[field.name]
        array = pa.nulls(len(segments), field.type) if given is None else given
        arrays.append(array if isinstance(array, pa.Array) else pa.array(array, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=REQUEST_SCHEMA)


class ResultCache(msgspec.Struct, frozen=True, kw_only=True):
    """Where answers of earlier queries are looked up, and kept.

    path: a folder on any file system that pyarrow knows, "": in the engine's memory only. memory: bytes that the engine
    keeps in memory, of all paths. max_size: bytes of the folder, the oldest answers go first; 0: no limit.
    cleared: seconds since the epoch; answers stored before do not count any more.
    """

    path: str = ""
    memory: int = 256 << 20
    max_size: int = 0
    cleared: float = 0.0


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine may spend on a query, in all its streams; 0: no limit.

    calls: rows computed. length: tokens of their prompts and answers. seconds: since the query's first row came.
    Rows beyond it are answered with the error LLM_BUDGET_EXCEEDED.
    """

    calls: int = 0
    length: int = 0
    seconds: float = 0.0


class StreamOpen(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a stream: all that is constant for its rows.

    query: the Spark execution id ("" outside a query: nothing folds there). client: whom scheduling charges, of whom
    the query is one; client_weight: its share of the engine beside other clients', above 0.
    instruction_segments: how many leading segments of each row are instruction, not data.
    later_calls: how many further calls of the query will ask, later, prompts that begin with the same
    ``shared_segments`` leading segments as these rows (several calls over the same fields). A hint.
    reuse: False bypasses the prefix cache (the naive baseline).
    constraint: what all answers keep to, where a row has no choices of its own; None: they are free text.
    truncate: cut the longest segment of a prompt that is longer than the context; False: such a row fails.
    cache: the result cache of rows that have a key; None: there is none. budget: None: there is none.
    limit, node: the query needs ``limit`` rows of those that its filter over this call keeps (0: all); tasks ask for
    their windows by the action ``window``, which counts hits by query and node.
    """

    version: int = PROTOCOL_VERSION
    query: str = ""
    client: str = ""
    client_weight: float = 1.0
    params: SamplingParams = SamplingParams()
    system: str | None = None
    instruction_segments: int = 1
    later_calls: int = 0
    shared_segments: int = 0
    reuse: bool = True
    constraint: Constraint | None = None
    truncate: bool = False
    cache: ResultCache | None = None
    budget: Budget | None = None
    limit: int = 0
    node: str = ""


class WindowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of the action ``window``: a task asks how many rows to ask next, and reports what it has done.

    partition: whose rows they are. attempt: Spark's id of the task attempt, unique in the application.
    rows, hits: totals of the attempt: rows of its finished windows, and how many of these the query's conditions keep.
    Being totals they can be told twice. ended: there is no further window; the answer does not matter.

    A task that Spark retries must not ask, and must not stop early: hits that its first attempt counted are lost, and
    others have stopped for them.
    """

    query: str
    node: str
    limit: int
    partition: int = 0
    attempt: int = 0
    rows: int = 0
    hits: int = 0
    ended: bool = False


class WindowGrant(msgspec.Struct, frozen=True):
    """How many rows the task may ask next: 1, 2, 4 ... over all tasks of the query; 0: the limit is reached."""

    rows: int


class StreamStop(msgspec.Struct, frozen=True):
    """Metadata of a message without rows: the limit is reached, and the stream's open rows will not be answered."""

    stop: bool = True


class StreamFailure(msgspec.Struct, frozen=True):
    """An LlmError that ends a stream, for example of a chat template that cannot be rendered."""

    condition: str
    parameters: dict[str, str]


def ending(metadata: bytes) -> StreamStop | StreamFailure:
    """What a message without rows says."""
    found = msgspec.json.decode(metadata)
    return StreamStop() if "stop" in found else msgspec.convert(found, StreamFailure)


class ClientStatus(msgspec.Struct, frozen=True):
    """What a client has been given, in weighted tokens, with which weight, and how many of its rows wait and run."""

    service: float
    weight: float
    waiting: int
    running: int


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the ``status`` action answers; counters are totals since the engine started.

    rows_folded: of rows_answered, those that got the answer of an equal row; rows_stored: from the result cache. Tokens
    count what was computed. cache_answers, cache_bytes: the result cache in memory; cache_segments: files of it in use.
    owner: pid of the process whose end ends the engine (the executor's JVM).
    tokens_per_second: tokens through the model, prompts and answers, over the last few seconds.
    address: host:port at which it listens for tasks of other executors, "": it does not.
    """

    pid: int
    model: str
    dtype: str
    uptime: float
    owner: int = 0
    address: str = ""
    rows_received: int = 0
    rows_answered: int = 0
    rows_folded: int = 0
    rows_stored: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    tokens_per_second: float = 0.0
    waiting: int = 0
    running: int = 0
    free_pages: int = 0
    total_pages: int = 0
    streams: int = 0
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    cache_answers: int = 0
    cache_bytes: int = 0
    cache_segments: int = 0
    queries: dict[str, tuple[int, int]] = {}  # query -> (rows received, rows answered)
    clients: dict[str, ClientStatus] = {}  # those with rows in the engine, by user


def learn(*kinds: Any) -> None:
    """Lets msgspec learn how to decode ``kinds``. It does so at the first message otherwise, and two threads that get
    theirs at the same time crash the process (a NULL pointer in msgspec 0.22), so modules do it on import."""
    for kind in kinds:
        msgspec.json.Decoder(kind)


learn(StreamOpen, WindowRequest, WindowGrant, StreamFailure, EngineStatus)
