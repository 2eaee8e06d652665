"""The reading end of a stream: what becomes of each row that comes in, decided in the stream's own thread.

A row waits for an equal one, is found in the result cache, is refused beyond the budget, or is tokenised and computed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.flight as flight
from msgspec.structs import replace

from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.constraints.matcher import CompiledConstraint
from spark_llm.engine.prefix import shared_with_next
from spark_llm.engine.request import (
    Client,
    Completion,
    Constraint,
    FinishReason,
    Hints,
    Request,
    SamplingParams,
)
from spark_llm.engine.service.folding import Claim, Stream
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.loop import EngineLoop
    from spark_llm.engine.service.served import ServedText

log = logging.getLogger("requests")


class Requests(threading.Thread):
    """Reads a stream's requests, tokenises them and passes them to the engine's loop.

    rows: rows passed on so far. done: the client sends no more. error: why reading stopped early.
    """

    def __init__(
        self,
        loop: EngineLoop,
        text: ServedText,
        header: StreamOpen,
        stream: Stream,
        reader: flight.MetadataRecordBatchReader,
    ) -> None:
        super().__init__(name="requests", daemon=True)
        self._loop = loop
        self._text = text
        self._header = header
        self._stream = stream
        self._reader = reader
        self.rows = 0
        self.done = False
        self.error: LlmError | None = None

    def run(self) -> None:
        try:
            if self._stream.cache is not None:
                self._loop.results.begin(self._stream.cache, self._header.query)
            while self._stream.stopped or not self._stream.closed:
                self.pass_on(self._reader.read_chunk().data)
        except StopIteration:
            self.done = True
        except Exception as error:
            if not isinstance(error, LlmError):
                log.exception("requests of query=%r cannot be read", self._header.query)
            self.error = as_llm_error(error)
        self._stream.outbox.put([])  # wakes the writer

    def pass_on(self, batch: pa.RecordBatch) -> None:
        """Takes in the rows of a REQUEST_SCHEMA batch."""
        claim = self._loop.folding.claim(self._stream, batch.column("id").to_pylist(), _keys(batch))
        self.rows += batch.num_rows
        try:
            outcomes = self._outcomes(batch, claim)
        except Exception as error:
            self._loop.folding.give_up(claim.flights, as_llm_error(error))
            raise
        self._loop.submit(self._stream, batch.num_rows, claim, outcomes)

    def _outcomes(self, batch: pa.RecordBatch, claim: Claim) -> list[Request | Completion]:
        """For each flight of the claim: its answer from the result cache, a refusal beyond the budget, or a request."""
        found: list[Completion | None] = [None] * len(claim.flights)
        if self._stream.cache is not None:
            keys = [None if flight.key is None else flight.key[1] for flight in claim.flights]
            found = self._loop.results.find(self._stream.cache, keys)
        column = batch.column("choices")
        if column.null_count < len(column):
            for at, position in enumerate(claim.positions):
                if found[at] is None and column[position].is_valid:
                    found[at] = _without_choice(column[position].as_py())
        new = [position for position, known in zip(claim.positions, found, strict=True) if known is None]
        computed = iter(self._within_budget(_rows(batch, new)))
        return [next(computed) if known is None else known for known in found]

    def _within_budget(self, batch: pa.RecordBatch) -> list[Request | Completion]:
        query, budget = self._header.query, self._header.budget
        if budget is None or not query:
            return list(self._requests(batch))
        budgets = self._loop.budgets
        refusal = budgets.exceeded(query, budget)
        if refusal is not None:
            return [_refused(refusal)] * batch.num_rows
        requests = self._requests(batch)
        admitted, refusal = budgets.admit(query, budget, [len(request.prompt) for request in requests])
        if refusal is None:
            return list(requests)
        return [*requests[:admitted], *[_refused(refusal)] * (len(requests) - admitted)]

    def _requests(self, batch: pa.RecordBatch) -> list[Request]:
        if not batch.num_rows:
            return []
        header, loop = self._header, self._loop
        prompts, instruction_tokens, shared_tokens = self._text.encode_rows(header, batch)
        constraints = self._constraints(batch)
        is_stopped = self._text.stop_checker(header.params.stop)
        params = {constraint: _bounded(header.params, constraint) for constraint in set(constraints)}
        client = Client(header.client, header.query, header.client_weight)
        following = shared_with_next(prompts)
        if loop.held is not None:
            loop.held.note(header.system, batch, prompts, following)
        return [
            Request(
                id=loop.next_id(),
                prompt=prompt,
                params=params[constraint],
                client=client,
                instruction_tokens=tokens,
                seed=seed,
                is_stopped=is_stopped,
                constraint=constraint,
                reuse=header.reuse,
                hints=Hints(self._stream.id, header.query, shared_next, header.later_calls, shared),
            )
            for prompt, tokens, shared, shared_next, seed, constraint in zip(
                prompts,
                instruction_tokens.tolist(),
                shared_tokens.tolist(),
                following,
                batch.column("seed").to_pylist(),
                constraints,
                strict=True,
            )
        ]

    def _constraints(self, batch: pa.RecordBatch) -> list[CompiledConstraint | None]:
        """Of each row. Raises LLM_INVALID_CONSTRAINT."""
        header, column = self._header, batch.column("choices")
        whole = None if header.constraint is None else self._text.constrain(header.system, header.constraint)
        if header.params.stop and (whole is not None or column.null_count < len(column)):
            reason = "stop strings would end answers before they keep to a constraint: leave out one of the two"
            raise LlmError("LLM_INVALID_REQUEST", reason=reason)
        if column.null_count == len(column):
            return [whole] * len(column)
        own = (None if texts is None else _choices(texts) for texts in column.to_pylist())
        return [whole if choices is None else self._text.constrain(header.system, choices) for choices in own]


def _keys(batch: pa.RecordBatch) -> list[bytes | None]:
    """What must be equal for rows of a stream to share an answer: their key, and their choices."""
    keys: list[bytes | None] = batch.column("key").to_pylist()
    column = batch.column("choices")
    if column.null_count == len(column):
        return keys
    texts = column.to_pylist()
    return [
        key if key is None or own is None else key + msgspec.json.encode(own)
        for key, own in zip(keys, texts, strict=True)
    ]


def _choices(texts: Sequence[str]) -> Constraint:
    return Constraint(kind="choices", choices=tuple(texts))


def _without_choice(texts: Sequence[str | None]) -> Completion | None:
    """The refusal of a row that leaves no choice."""
    if texts and None not in texts:
        return None
    reason = "the row has none" if not texts else "one of the row's is NULL"
    return _refused(("LLM_INVALID_CONSTRAINT", {"kind": "choices", "reason": reason}))


def _bounded(params: SamplingParams, constraint: CompiledConstraint | None) -> SamplingParams:
    """Choices bound the answer themselves."""
    return replace(params, max_tokens=constraint.max_tokens) if isinstance(constraint, Labels) else params


def as_llm_error(error: Exception) -> LlmError:
    """What tells a client that ``error`` has ended its stream."""
    if isinstance(error, LlmError):
        return error
    return LlmError("LLM_INVALID_REQUEST", reason=f"{type(error).__name__}: {error}")


def _refused(error: tuple[str, dict[str, str]]) -> Completion:
    return Completion(-1, [], FinishReason.ERROR, 0, 0, 0, error=error)


def _rows(batch: pa.RecordBatch, positions: list[int]) -> pa.RecordBatch:
    return batch if len(positions) == batch.num_rows else batch.take(pa.array(positions, pa.int64()))
