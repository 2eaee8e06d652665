"""The engine: requests in, completions out, one step at a time. No threads, no sockets, no text."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool
from spark_llm.engine.model.linear import fastest_dtype
from spark_llm.engine.model.loader import iter_weights, load_config
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import Completion, FinishReason, Request
from spark_llm.engine.runner import Runner
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.scheduler import Scheduler, StepPlan
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.errors import LlmError

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 2  # failed steps after which a row is given up; the second one is the row's alone
_CPU_BATCH_TOKENS = 1024  # from about here a larger batch multiplies no faster
_CPU_ROWS = 256  # that run at a time
_MAX_AUTO_POOL = 4 << 30
_AUTO_POOL_SHARE = 0.25  # of the memory that is available when the engine starts


@dataclass(slots=True)
class EngineStats:
    """Totals since the start, and what is there now. Seconds are wall time of the engine's thread.

    tokens: through the model so far, prompts and answers, also of rows that are not done.
    forward_seconds: inside the model; step_seconds: whole steps, forward pass included.
    """

    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
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

    ``step`` is a transaction: plan (which reserves), run, commit; a failed run is rolled back, its rows run
    again each alone, and a row that fails alone is answered with LLM_ENGINE_STEP_FAILED.
    """

    def __init__(self, spec: EngineSpec, runner: Runner, cache: CacheManager, text: TextPipeline, dtype: str) -> None:
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
        self._eos_ids = frozenset(self.model_config.eos_ids)
        self._refused: list[Completion] = []
        self._totals = EngineStats(total_pages=cache.pool.total)

    @classmethod
    def load(cls, spec: EngineSpec) -> Engine:
        """Read the model and size the pool. LlmError: the model, its tokenizer or the memory is not there."""
        if spec.threads:
            torch.set_num_threads(spec.threads)
        source = resolve(spec.model)
        config = load_config(source)
        text = TextPipeline.load(source)
        stored, computed = _dtypes(spec.dtype)
        weights = iter_weights(source, stored, config)
        decoder = Decoder(config, weights, computed, spec.context_length or config.context_length)
        pages = _pool_pages(spec, config, computed)
        pool = KVPool(config, pages * spec.page_size, computed)
        label = str(stored).removeprefix("torch.")
        log.info(
            "model %s: %s weights, %s arithmetic, %d threads, K/V pool of %d pages x %d tokens",
            config.name, label, computed, torch.get_num_threads(), pages, spec.page_size,
        )  # fmt: skip
        return cls(spec, Runner(decoder, pool, spec.page_size), CacheManager(pages, spec.page_size), text, label)

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return self.runner.decoder.config

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
        return bool(self._refused) or len(self.scheduler) > 0

    def step(self) -> list[Completion]:
        """Compute one batch; the rows that are done. An exception out of here is fatal for the engine."""
        start = time.perf_counter()
        done, self._refused = self._refused, []
        if len(self.scheduler):
            plan = self.scheduler.plan()
            done += self._run(plan)
            if self.spec.check_invariants:
                validate_invariants(self.scheduler)
            self._totals.steps += 1
        self._count(done)
        self._totals.step_seconds += time.perf_counter() - start
        return done

    def stats(self) -> EngineStats:
        """A live view of the totals; the gauges are brought up to date by this call."""
        totals, scheduler = self._totals, self.scheduler
        totals.waiting, totals.running = len(scheduler.waiting), len(scheduler.running)
        totals.free_pages = scheduler.cache.available
        totals.preemptions = scheduler.preemptions
        return totals

    def _run(self, plan: StepPlan) -> list[Completion]:
        start = time.perf_counter()
        try:
            tokens = self.runner.run(plan)
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            log.exception("step %d failed (%d rows, %d tokens)", plan.step, len(plan.rows), plan.num_tokens)
            self.scheduler.rollback(plan)
            self._totals.failed_steps += 1
            rows = [s.row for s in plan.rows if s.row.attempts >= _MAX_ATTEMPTS]
            return [self._give_up(row, error) for row in rows]
        self._totals.forward_seconds += time.perf_counter() - start
        self._totals.tokens += plan.num_tokens
        return self.scheduler.commit(plan, tokens, self._eos_ids)

    def _give_up(self, row: Row, error: Exception) -> Completion:
        parameters = {"attempts": str(row.attempts), "reason": f"{type(error).__name__}: {error}"}
        return self.scheduler.fail(row, "LLM_ENGINE_STEP_FAILED", parameters)

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


def _dtypes(requested: str) -> tuple[torch.dtype, torch.dtype]:
    """What weights are rounded to, and what is computed in.

    On a CPU whose half-precision products are slower than float32's, half-precision weights are computed in
    float32: the answers of the format, at the speed of the hardware.
    """
    fastest = fastest_dtype()
    if requested == "auto":
        return fastest, fastest
    stored: torch.dtype = getattr(torch, requested)
    return stored, stored if stored == fastest else torch.float32


def _pool_pages(spec: EngineSpec, config: ModelConfig, dtype: torch.dtype) -> int:
    """Pages of the K/V pool; LLM_NO_MEMORY if not one page fits or the memory is not there."""
    available = psutil.virtual_memory().available
    wanted = spec.kv_cache_memory or min(int(available * _AUTO_POOL_SHARE), _MAX_AUTO_POOL)
    page = KVPool.bytes_per_token(config, dtype) * spec.page_size
    if wanted > available or wanted < page:
        raise LlmError(
            "LLM_NO_MEMORY",
            needed=f"{max(wanted, page) / 2**20:,.1f} MiB",
            purpose="its K/V cache",
            available=f"{min(available, wanted) / 2**20:,.1f} MiB",
            setting="spark.llm.engine.kvCacheMemory" if wanted > available else "spark.llm.engine.pageSize",
        )
    return int(np.clip(wanted // page, 1, 2**31 - 1))
