"""Embeds rows as EngineLoop expects it of an engine: texts in, vectors out as JSON, one batch a step. No sockets."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from spark_llm.engine.backend.turns import Turns
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import EngineStats
from spark_llm.engine.encoder.config import Head
from spark_llm.engine.encoder.vectors import Vectors, excess, json_vectors
from spark_llm.engine.request import LEAST_WEIGHT, MOST_WEIGHT, Completion, FinishReason, Request, is_weight
from spark_llm.engine.scheduling.accounts import Service
from spark_llm.engine.service.served import ModelName

if TYPE_CHECKING:
    from spark_llm.engine.encoder.text import EncoderText

log = logging.getLogger(__name__)

_CPU_BATCH_TOKENS = 2048  # padding included
_GPU_BATCH_TOKENS = 32768
_BATCHES = 8  # taken in turn and sorted by length together: more pad less, and let a newcomer wait longer
_MAX_ATTEMPTS = 2


class Embedder(Protocol):
    """A model that makes vectors of texts. window: most tokens of a text. width: of a vector.

    ``embed`` takes ids, int64 [rows, most tokens], with any valid id where a text has ended, and lengths, int64 [rows];
    it returns float32 [rows, width] on the CPU.
    """

    name: str
    vocab_size: int
    window: int
    width: int
    head: Head
    device: torch.device

    def embed(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor: ...


class EncoderEngine:
    """One model that embeds, and its rows. Not thread-safe: one thread calls it.

    Clients take turns by what they have been given, as with a server elsewhere; what is taken together is sorted by
    length, so that batches have little padding. A batch that fails is computed again, each row alone; a row that fails
    alone is answered with LLM_ENGINE_STEP_FAILED. Sampling parameters mean nothing here.
    ``spec.deterministic`` computes each row alone: what it is computed beside changes the last bits otherwise.
    """

    def __init__(self, spec: EngineSpec, model: Embedder, text: EncoderText, dtype: str) -> None:
        self.spec = spec
        self.text = text
        self.dtype = dtype
        self.model_config = ModelName(model.name)
        self.context_length = text.window
        self.width = model.width
        self._model = model
        least = _CPU_BATCH_TOKENS if model.device.type == "cpu" else _GPU_BATCH_TOKENS
        self._batch_tokens = spec.max_batch_tokens or least
        self._turns = Turns(lambda request: len(request.prompt))
        self._rows: dict[int, Request] = {}  # without an answer
        self._batches: deque[list[Request]] = deque()
        self._attempts: dict[int, int] = {}  # of rows that failed in a batch
        self._at_once: list[Completion] = []
        self._totals = EngineStats()

    @property
    def identity(self) -> str:
        """What vectors depend on beside the model's files."""
        return f"{self.dtype} embed {self._model.head} {self.context_length}"

    def open(self, stream: int, query: str) -> None:
        """A stream begins; nothing is kept of it."""

    def close(self, stream: int) -> None:
        """The stream has ended."""

    def watch_evictions(self, evicted: Callable[[bytes, int, int], None]) -> None:
        """Nothing is cached that could be evicted."""

    def add(self, request: Request) -> None:
        """A request arrives. One that is too long is answered with an error by the next ``step``."""
        refusal = self._refusal(request)
        if refusal is not None:
            self._at_once.append(Completion.failed(request.id, *refusal))
        else:
            self._rows[request.id] = request
            self._turns.push(request)

    def cancel(self, ids: Iterable[int]) -> None:
        """Forget rows; they get no completion."""
        cancelled = set(ids)
        for request_id in cancelled:
            self._rows.pop(request_id, None)
            self._attempts.pop(request_id, None)
        self._turns.drop(cancelled)
        self._at_once = [answer for answer in self._at_once if answer.id not in cancelled]

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._rows or self._at_once)

    def step(self) -> list[Completion]:
        """Compute one batch; the rows that are done."""
        start = time.perf_counter()
        done, self._at_once = self._at_once, []
        batch = self._next_batch()
        if batch:
            done += self._computed(batch)
        for completion in done:
            self._rows.pop(completion.id, None)
            self._attempts.pop(completion.id, None)
            self._count(completion)
        if self.spec.check_invariants:
            self._check()
        self._totals.step_seconds += time.perf_counter() - start
        return done

    def stats(self) -> EngineStats:
        """A live view of the totals."""
        self._totals.waiting = len(self._turns)
        self._totals.running = len(self._rows) - len(self._turns)
        return self._totals

    def clients(self) -> Mapping[str, Service]:
        """What each user with waiting rows has been given, and how many of its rows wait and run."""
        running = Counter(request.client.user for batch in self._batches for request in batch)
        return {user: of._replace(running=running[user]) for user, of in self._turns.clients().items()}

    def _refusal(self, request: Request) -> tuple[str, dict[str, str]] | None:
        length, weight = len(request.prompt), request.client.weight
        if not is_weight(weight):
            reason = f"the client's weight is {weight}, not {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            return "LLM_INVALID_REQUEST", {"reason": reason}
        if not length:  # where the tokenizer adds none of its own
            return "LLM_INVALID_REQUEST", {"reason": "the text has no tokens"}
        if length > self.context_length:
            remedy = "Shorten it (with left(col, n), or truncate => 'longest')"
            return "LLM_CONTEXT_LENGTH_EXCEEDED", excess(length, self.context_length, remedy)
        return None

    def _next_batch(self) -> list[Request]:
        """Rows that are still wanted; none where nobody waits."""
        while True:
            if not self._batches:
                self._batches.extend(self._cut(self._taken()))
                if not self._batches:
                    return []
            batch = [request for request in self._batches.popleft() if request.id in self._rows]
            if batch:
                return batch

    def _taken(self) -> list[Request]:
        """The rows whose turn it is, shortest first: about as many tokens as ``_BATCHES`` batches have."""
        found: list[Request] = []
        tokens = 0
        while len(self._turns) and tokens < _BATCHES * self._batch_tokens:
            found.append(self._turns.pop())
            tokens += len(found[-1].prompt)
        return sorted(found, key=lambda request: len(request.prompt))

    def _cut(self, rows: list[Request]) -> list[list[Request]]:
        """Rows, shortest first, into batches that have no more tokens than allowed, with their padding."""
        batches: list[list[Request]] = []
        for request in rows:
            fits = bool(batches) and (len(batches[-1]) + 1) * len(request.prompt) <= self._batch_tokens
            if fits and not self.spec.deterministic:
                batches[-1].append(request)
            else:
                batches.append([request])
        return batches

    def _computed(self, batch: list[Request]) -> list[Completion]:
        totals = self._totals
        totals.steps += 1
        start = time.perf_counter()
        try:
            vectors = self._vectors(batch)
        except Exception as error:
            log.exception("step %d failed (%d rows)", totals.steps, len(batch))
            totals.failed_steps += 1
            return self._given_up(batch, error)
        finally:
            totals.forward_seconds += time.perf_counter() - start
        tokens = sum(len(request.prompt) for request in batch)
        totals.tokens += tokens
        totals.prefill_tokens += tokens
        return [_answer(request, text) for request, text in zip(batch, json_vectors(vectors), strict=True)]

    def _vectors(self, batch: list[Request]) -> Vectors:
        lengths = np.array([len(request.prompt) for request in batch], np.int64)
        tokens = np.zeros((len(batch), lengths.max()), np.int64)
        for row, request in enumerate(batch):
            tokens[row, : len(request.prompt)] = request.prompt
        found: Vectors = self._model.embed(torch.from_numpy(tokens), torch.from_numpy(lengths)).numpy()
        return found

    def _given_up(self, batch: list[Request], error: Exception) -> list[Completion]:
        """The failures of rows that have failed too often; the others are computed next, each alone."""
        failed = []
        for request in batch:
            attempts = self._attempts[request.id] = self._attempts.get(request.id, 0) + 1
            if attempts >= _MAX_ATTEMPTS:
                parameters = {"attempts": str(attempts), "reason": f"{type(error).__name__}: {error}"}
                failed.append(Completion.failed(request.id, "LLM_ENGINE_STEP_FAILED", parameters))
            else:
                self._batches.appendleft([request])
        return failed

    def _count(self, completion: Completion) -> None:
        totals = self._totals
        totals.prompt_tokens += completion.prompt_tokens
        totals.computed_tokens += completion.computed_tokens
        totals.rows_answered += completion.error is None

    def _check(self) -> None:
        """AssertionError unless each row without an answer is in one place."""
        taken = [request.id for batch in self._batches for request in batch if request.id in self._rows]
        assert len(taken) == len(set(taken)), "a row is in two batches"
        assert len(taken) + len(self._turns) == len(self._rows), "a row is lost"


def _answer(request: Request, vector: str | None) -> Completion:
    if vector is None:
        reason = "a number of its vector is not finite"
        return Completion.failed(request.id, "LLM_ENGINE_STEP_FAILED", {"attempts": "1", "reason": reason})
    length = len(request.prompt)
    return Completion(request.id, [], FinishReason.STOP, length, 0, length, text=vector)
