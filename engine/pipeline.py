"""Steps in flight: the scheduler plans the next one while the device runs the one before."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Protocol

from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.request import Completion
from spark_llm.engine.scheduling.lanes import Floats, Ints
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 2  # failed steps after which a row is given up; the second one is the row's alone
_FAILURES = (
    RuntimeError,
    ValueError,
    ArithmeticError,
    IndexError,
    MemoryError,
)  # of a step; anything else is the engine's end


class Pending(Protocol):
    """A step that was launched."""

    def tokens(self) -> Ints:
        """Waits for the step. int32: a token for each lane of ``plan.sampling``, then of ``plan.decode``. May raise."""

    def log_probs(self) -> Floats:
        """float32, of the tokens that were chosen among candidates, NaN of others; of a plan with choices only."""


class StepRunner(Protocol):
    """What runs planned steps, in the order in which they are launched.

    depth: how many steps may be in flight: 1, or 2 where ``launch`` returns before the step has run.
    """

    depth: int

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""

    def launch(self, plan: StepPlan) -> Pending:
        """Start the step. May raise: then the step has not happened."""


class Pipeline:
    """Launches and commits; a step that fails is rolled back, with what was planned upon it.

    forward_seconds: in the runner, launching and waiting. tokens: of committed steps.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, eos_ids: Collection[int]) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.forward_seconds = 0.0
        self.steps = self.tokens = self.failed_steps = 0
        self._eos_ids = eos_ids
        self._in_flight: list[tuple[StepPlan, Pending]] = []  # oldest first

    def __len__(self) -> int:
        return len(self._in_flight)

    def advance(self) -> list[Completion]:
        """Launch the next step, and commit the oldest once ``depth`` are in flight or nothing could be planned."""
        done: list[Completion] = []
        plan = self.scheduler.plan()
        launched = plan.num_rows > 0 and self._launch(plan, done)
        if self._in_flight and (not launched or len(self._in_flight) >= self.runner.depth):
            self._land(done)
        return done

    def _launch(self, plan: StepPlan, done: list[Completion]) -> bool:
        self.steps += 1
        start = time.perf_counter()
        try:
            pending = self.runner.launch(plan)
        except _FAILURES as error:
            done += self._fail(plan, error)
            return False
        finally:
            self.forward_seconds += time.perf_counter() - start
        self._in_flight.append((plan, pending))
        return True

    def _land(self, done: list[Completion]) -> None:
        plan, pending = self._in_flight[0]
        start = time.perf_counter()
        try:
            tokens = pending.tokens()
            log_probs = None if plan.choices is None else pending.log_probs()
        except _FAILURES as error:
            for later, _ in reversed(self._in_flight[1:]):
                self.scheduler.rollback(later, failed=False)
            self._in_flight.clear()
            done += self._fail(plan, error)
            return
        finally:
            self.forward_seconds += time.perf_counter() - start
        del self._in_flight[0]
        self.tokens += plan.num_tokens
        done += self.scheduler.commit(plan, tokens, self._eos_ids, log_probs)

    def _fail(self, plan: StepPlan, error: Exception) -> list[Completion]:
        log.error("step %d failed (%d rows, %d tokens)", plan.step, plan.num_rows, plan.num_tokens, exc_info=error)
        self.failed_steps += 1
        rows = self.scheduler.rollback(plan)
        return [self._give_up(row, error) for row in rows if row.attempts >= _MAX_ATTEMPTS]

    def _give_up(self, row: Row, error: Exception) -> Completion:
        parameters = {"attempts": str(row.attempts), "reason": f"{type(error).__name__}: {error}"}
        return self.scheduler.fail(row, "LLM_ENGINE_STEP_FAILED", parameters)
