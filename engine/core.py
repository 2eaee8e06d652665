"""The engine: requests in, completions out, one step at a time. No threads, no sockets, no text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.pipeline import Pipeline, StepRunner
from spark_llm.engine.request import Completion, FinishReason, Request
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

if TYPE_CHECKING:
    from spark_llm.engine.text.pipeline import TextPipeline

log = logging.getLogger(__name__)

_CPU_BATCH_TOKENS = 1024  # from about here a larger batch multiplies no faster
_CPU_ROWS = 256  # that run at a time


@dataclass(slots=True)
class EngineStats:
    """Totals since the start, and what is there now. Seconds are wall time of the engine's thread.

    tokens: through the model so far, prompts and answers, also of rows that are not done.
    wasted_tokens: of these, computed for rows that had ended or gone while the step was in flight.
    forward_seconds: inside the model, on a GPU waiting for it; step_seconds: whole steps, forward pass included.
    """

    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    wasted_tokens: int = 0
    output_tokens: int = 0
    rows_answered: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    waiting: int = 0
    running: int = 0
    free_pages: int = 0
    total_pages: int = 0


class Engine:
    """One model, its K/V pool and its rows. Not thread-safe: one thread calls it.

    A step is a transaction: plan (which reserves), run, commit; a failed run is rolled back, its rows run
    again each alone, and a row that fails alone is answered with LLM_ENGINE_STEP_FAILED. With a runner of depth 2 a
    step is planned while the one before runs, and committed by the next call of ``step``.
    """

    def __init__(
        self, spec: EngineSpec, runner: StepRunner, cache: CacheManager, text: TextPipeline | None, dtype: str
    ) -> None:
        self.spec = spec
        self.text = text
        self.dtype = dtype
        self.runner = runner
        self.scheduler = Scheduler(
            cache,
            LongestPrefixFirst(),
            max_batch_tokens=spec.max_batch_tokens or _CPU_BATCH_TOKENS,
            max_running_rows=spec.max_running_rows or _CPU_ROWS,
        )
        config = self.model_config
        # A sliding window is not implemented; rows that it holds as a whole do not need it.
        longest = min(config.context_length, config.sliding_window or config.context_length)
        self.context_length = min(spec.context_length or longest, longest)
        self._pipeline = Pipeline(self.scheduler, runner, frozenset(config.eos_ids))
        self._refused: list[Completion] = []
        self._totals = EngineStats(total_pages=cache.pool.total)

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return self.runner.config

    def add(self, request: Request) -> None:
        """A request arrives. One that can never fit is answered with an error by the next ``step``."""
        cache = self.scheduler.cache
        limit = min(self.context_length, cache.pool.total * cache.page_size)
        length, max_tokens = len(request.prompt), request.params.max_tokens
        if not length:
            self._refuse(request, "LLM_INVALID_REQUEST", {"reason": "the prompt has no tokens"})
        elif max_tokens < 1:
            self._refuse(request, "LLM_INVALID_REQUEST", {"reason": f"max_tokens is {max_tokens}, below 1"})
        elif length + max_tokens > limit:
            parameters = {"length": str(length), "max_tokens": str(max_tokens), "limit": str(limit)}
            self._refuse(request, "LLM_CONTEXT_LENGTH_EXCEEDED", parameters)
        else:
            self.scheduler.add(request)

    def open(self, stream: int, query: str) -> None:
        """A stream begins, whose requests name it in their hints."""
        self.scheduler.cache.eviction.open(stream, query)

    def close(self, stream: int) -> None:
        """The stream has ended: its hints are void."""
        self.scheduler.cache.eviction.close(stream)

    def cancel(self, ids: Iterable[int]) -> None:
        """Forget rows and free their pages at once; they get no completion."""
        cancelled = set(ids)
        for request_id in cancelled:
            self.scheduler.cancel(request_id)
        self._refused = [refused for refused in self._refused if refused.id not in cancelled]

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._refused) or len(self.scheduler) > 0 or len(self._pipeline) > 0

    def step(self) -> list[Completion]:
        """Compute one batch; the rows that are done. An exception out of here is fatal for the engine."""
        start = time.perf_counter()
        done, self._refused = self._refused, []
        if len(self.scheduler) or len(self._pipeline):
            done += self._pipeline.advance()
            if self.spec.check_invariants:
                validate_invariants(self.scheduler)
        self._count(done)
        self._totals.step_seconds += time.perf_counter() - start
        return done

    def stats(self) -> EngineStats:
        """A live view of the totals; the gauges are brought up to date by this call."""
        totals, scheduler, pipeline = self._totals, self.scheduler, self._pipeline
        totals.waiting, totals.running = len(scheduler.waiting), scheduler.num_running
        totals.free_pages = scheduler.cache.available
        totals.preemptions, totals.wasted_tokens = scheduler.preemptions, scheduler.wasted_tokens
        totals.steps, totals.failed_steps = pipeline.steps, pipeline.failed_steps
        totals.tokens, totals.forward_seconds = pipeline.tokens, pipeline.forward_seconds
        return totals

    def _refuse(self, request: Request, condition: str, parameters: dict[str, str]) -> None:
        self._refused.append(
            Completion(
                id=request.id,
                output=[],
                finish_reason=FinishReason.ERROR,
                prompt_tokens=0,
                cached_tokens=0,
                computed_tokens=0,
                error=(condition, parameters),
            )
        )

    def _count(self, done: list[Completion]) -> None:
        totals = self._totals
        for completion in done:
            totals.prompt_tokens += completion.prompt_tokens
            totals.cached_tokens += completion.cached_tokens
            totals.computed_tokens += completion.computed_tokens
            totals.recomputed_tokens += completion.recomputed_tokens
            totals.output_tokens += len(completion.output)
            totals.rows_answered += completion.finish_reason is not FinishReason.ERROR
