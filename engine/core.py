"""The engine: requests in, completions out, one step at a time. No threads, no sockets, no text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.pipeline import Pipeline, StepRunner
from spark_llm.engine.request import LEAST_WEIGHT, MOST_WEIGHT, Completion, FinishReason, Request, is_weight
from spark_llm.engine.scheduling.accounts import Service
from spark_llm.engine.scheduling.policies import waiting_queue
from spark_llm.engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from spark_llm.engine.constraints.matcher import CompiledConstraint
    from spark_llm.engine.text.pipeline import TextPipeline

log = logging.getLogger(__name__)

_CPU_BATCH_TOKENS = 1024  # from about here a larger batch multiplies no faster
_CPU_ROWS = 256  # that run at a time
_CPU_LATE_ROWS = 32  # and beyond these, of clients that have few running


@dataclass(slots=True)
class EngineStats:
    """Totals since the start, and what is there now. Seconds are wall time of the engine's thread.

    tokens: through the model so far, prompts and answers, also of rows that are not done: the sum of
    prefill_tokens (of prompts, for the first time), decode_tokens (of answers), repeated_tokens (computed before) and
    wasted_tokens (of answers that had ended, gone or gone back while the step was in flight). Other token counts are of
    rows that are done, recomputed_tokens with what failed steps computed.
    forced_tokens: of answers, that a constraint left no choice about, so that no step sampled them.
    refused_tokens: sampled without a mask, and refused by a constraint; what they cost is in the other counts.
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
    prefill_tokens: int = 0
    decode_tokens: int = 0
    repeated_tokens: int = 0
    wasted_tokens: int = 0
    output_tokens: int = 0
    forced_tokens: int = 0
    refused_tokens: int = 0
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
        batch = spec.max_batch_tokens or _CPU_BATCH_TOKENS
        self.scheduler = Scheduler(
            cache,
            # A smaller quantum would not let others come sooner, as a step is not interrupted; a larger one might.
            waiting_queue(spec.scheduler, spec.scheduler_quantum or batch),
            max_batch_tokens=batch,
            max_running_rows=spec.max_running_rows or _CPU_ROWS,
            late_rows=0 if spec.max_running_rows else _CPU_LATE_ROWS,
            ahead=runner.depth > 1,
        )
        config = self.model_config
        # A sliding window is not implemented; rows that it holds as a whole do not need it.
        longest = min(config.context_length, config.sliding_window or config.context_length)
        self.context_length = min(spec.context_length or longest, longest)
        self._limit = min(self.context_length, cache.pool.total * cache.page_size)
        if text is not None:
            text.keep_within(self._limit)
        self._pipeline = Pipeline(self.scheduler, runner, frozenset(config.eos_ids))
        self._at_once: list[Completion] = []
        self._totals = EngineStats(total_pages=cache.pool.total)

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return self.runner.config

    def add(self, request: Request) -> None:
        """A request arrives. One that can never fit is answered with an error by the next ``step``."""
        limit = self._limit
        length, max_tokens = len(request.prompt), request.params.max_tokens
        if not length:
            self._refuse(request, "LLM_INVALID_REQUEST", {"reason": "the prompt has no tokens"})
        elif max_tokens < 1:
            self._refuse(request, "LLM_INVALID_REQUEST", {"reason": f"max_tokens is {max_tokens}, below 1"})
        elif not is_weight(request.client.weight):
            reason = f"the client's weight is {request.client.weight}, not {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            self._refuse(request, "LLM_INVALID_REQUEST", {"reason": reason})
        elif request.constraint is not None and request.constraint.whole:
            self._at_once.append(_known_answer(request, request.constraint))
        elif length + max_tokens > limit:
            excess = f"The prompt has {length} tokens and max_tokens is {max_tokens}"
            remedy = "Shorten the fields (with left(col, n), or truncate => 'longest'), lower max_tokens"
            parameters = {"excess": excess, "limit": str(limit), "remedy": remedy}
            self._refuse(request, "LLM_CONTEXT_LENGTH_EXCEEDED", parameters)
        elif request.constraint is not None and len(request.constraint.forced) >= max_tokens:
            parameters = {"kind": request.constraint.kind, "max_tokens": str(max_tokens)}
            self._refuse(request, "LLM_ANSWER_INCOMPLETE", parameters)
        else:
            self.scheduler.add(request)

    def open(self, stream: int, query: str) -> None:
        """A stream begins, whose requests name it in their hints."""
        self.scheduler.cache.eviction.open(stream, query)

    def close(self, stream: int) -> None:
        """The stream has ended: its hints are void."""
        self.scheduler.cache.eviction.close(stream)

    def watch_evictions(self, evicted: Callable[[bytes, int, int], None]) -> None:
        """``evicted(key, start, end)`` is told that tokens [start, end) of the prompt with this sort key are not cached
        any more; it is called within steps, so it must be quick."""
        self.scheduler.cache.tree.on_evict = evicted

    def cancel(self, ids: Iterable[int]) -> None:
        """Forget rows and free their pages at once; they get no completion."""
        cancelled = set(ids)
        for request_id in cancelled:
            self.scheduler.cancel(request_id)
        self._at_once = [answer for answer in self._at_once if answer.id not in cancelled]

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._at_once) or len(self.scheduler) > 0 or len(self._pipeline) > 0

    def step(self) -> list[Completion]:
        """Compute one batch; the rows that are done. An exception out of here is fatal for the engine."""
        start = time.perf_counter()
        done, self._at_once = self._at_once, []
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
        totals.preemptions, totals.forced_tokens = scheduler.preemptions, scheduler.forced_tokens
        totals.refused_tokens = scheduler.refused_tokens
        computed = scheduler.charging.computed
        totals.prefill_tokens, totals.decode_tokens = computed.prefill, computed.decode
        totals.repeated_tokens, totals.wasted_tokens = computed.recomputed, computed.wasted
        totals.steps, totals.failed_steps = pipeline.steps, pipeline.failed_steps
        totals.tokens, totals.forward_seconds = pipeline.tokens, pipeline.forward_seconds
        return totals

    def clients(self) -> dict[str, Service]:
        """What each user with rows here has been given, and how many of its rows wait and run."""
        return self.scheduler.accounts.status()

    def _refuse(self, request: Request, condition: str, parameters: dict[str, str]) -> None:
        self._at_once.append(
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


def _known_answer(request: Request, constraint: CompiledConstraint) -> Completion:
    """The only answer that there is."""
    output = list(constraint.forced)
    matcher = constraint.start(output)
    return Completion(request.id, output, FinishReason.STOP, 0, 0, 0, text=matcher.text, confidence=matcher.confidence)
