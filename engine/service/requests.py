"""The reading end of a stream: what becomes of each row that comes in, decided in the stream's own thread.

A row waits for an equal one, is found in the result cache, is refused beyond the budget, or is tokenised and computed.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.prefix import shared_with_next
from spark_llm.engine.request import Client, Completion, FinishReason, Hints, Request
from spark_llm.engine.service.folding import Claim, Stream
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.loop import EngineLoop
    from spark_llm.engine.text.pipeline import TextPipeline

log = logging.getLogger("requests")


class Requests(threading.Thread):
    """Reads a stream's requests, tokenises them and passes them to the engine's loop.

    rows: rows passed on so far. done: the client sends no more. error: why reading stopped early.
    """

    def __init__(
        self,
        loop: EngineLoop,
        text: TextPipeline,
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
        claim = self._loop.folding.claim(self._stream, batch.column("id").to_pylist(), batch.column("key").to_pylist())
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
        is_stopped = self._text.stop_checker(header.params.stop)
        client = Client(header.client, header.query)
        following = shared_with_next(prompts)
        if loop.held is not None:
            loop.held.note(header.system, batch, prompts, following)
        return [
            Request(
                id=loop.next_id(),
                prompt=prompt,
                params=header.params,
                client=client,
                instruction_tokens=tokens,
                seed=seed,
                is_stopped=is_stopped,
                reuse=header.reuse,
                hints=Hints(self._stream.id, header.query, shared_next, header.later_calls, shared),
            )
            for prompt, tokens, shared, shared_next, seed in zip(
                prompts,
                instruction_tokens.tolist(),
                shared_tokens.tolist(),
                following,
                batch.column("seed").to_pylist(),
                strict=True,
            )
        ]


def as_llm_error(error: Exception) -> LlmError:
    """What tells a client that ``error`` has ended its stream."""
    if isinstance(error, LlmError):
        return error
    return LlmError("LLM_INVALID_REQUEST", reason=f"{type(error).__name__}: {error}")


def _refused(error: tuple[str, dict[str, str]]) -> Completion:
    return Completion(-1, [], FinishReason.ERROR, 0, 0, 0, error=error)


def _rows(batch: pa.RecordBatch, positions: list[int]) -> pa.RecordBatch:
    return batch if len(positions) == batch.num_rows else batch.take(pa.array(positions, pa.int64()))
