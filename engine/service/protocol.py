"""The words that a task and an engine exchange: Arrow schemas and the header of a stream.

A stream is one Flight DoExchange: the descriptor's command is a JSON ``StreamOpen``; the task sends record
batches of ``REQUEST_SCHEMA`` (a window each) and gets batches of ``ANSWER_SCHEMA`` in the order in which rows
finish. The engine sends its schema as soon as it has taken the stream in. Closing the stream cancels what is
unanswered; half-closing it (done writing) does not. What stops the whole stream comes as a message without rows
whose metadata is a JSON ``StreamFailure``.

Each request batch may bring its own dictionary: Arrow's stream format replaces dictionaries, also nested ones
(tried with pyarrow 18 and 26), and sends one again only if it has changed. A batch travels with its whole
dictionary, so build each window's from the segments of that window.
"""

from __future__ import annotations

import msgspec
import pyarrow as pa

from spark_llm.engine.request import SamplingParams

PROTOCOL_VERSION = 2

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),  # unique within the stream, chosen by the task
        # user message of the row: its segments joined are the text; a repeated segment travels once a batch
        pa.field("segments", pa.list_(pa.dictionary(pa.int32(), pa.utf8())), nullable=False),
        pa.field("seed", pa.int64()),  # NULL unless sampling with a seed
        pa.field("key", pa.binary()),  # digest of the row's canonical arguments; NULL: never folded
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
    ]
)


class StreamOpen(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a stream: all that is constant for its rows.

    query: the Spark execution id ("" outside a query: nothing folds there). client: whom scheduling charges.
    instruction_segments: how many leading segments of each row are instruction, not data.
    later_calls: how many further calls of the query will ask, later, prompts that begin with the same
    ``shared_segments`` leading segments as these rows (several calls over the same fields). A hint.
    reuse: False bypasses the prefix cache (the naive baseline).
    """

    version: int = PROTOCOL_VERSION
    query: str = ""
    client: str = ""
    params: SamplingParams = SamplingParams()
    system: str | None = None
    instruction_segments: int = 1
    later_calls: int = 0
    shared_segments: int = 0
    reuse: bool = True


class StreamFailure(msgspec.Struct, frozen=True):
    """An LlmError that ends a stream, for example of a chat template that cannot be rendered."""

    condition: str
    parameters: dict[str, str]


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the ``status`` action answers; counters are totals since the engine started.

    rows_folded: of rows_answered, those that got the answer of an equal row; tokens count what was computed.
    owner: pid of the process whose end ends the engine (the executor's JVM).
    tokens_per_second: tokens through the model, prompts and answers, over the last few seconds.
    """

    pid: int
    model: str
    dtype: str
    uptime: float
    owner: int = 0
    rows_received: int = 0
    rows_answered: int = 0
    rows_folded: int = 0
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
    queries: dict[str, tuple[int, int]] = {}  # query -> (rows received, rows answered)
