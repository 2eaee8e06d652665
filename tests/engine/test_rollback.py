"""A step that fails leaves rows and pages as they were; one bad row takes nobody down with it.

A real model, real K/V: what a rollback frees is NaN in the next step, so that a row which kept a page of the
failed step, or of a row that failed with it, answers something else than transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from spark_llm.engine import runner as runner_module
from spark_llm.engine.core import Engine
from spark_llm.engine.model.attention import StepAttention
from spark_llm.engine.request import Completion, FinishReason
from spark_llm.engine.runner import Done
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.errors import LlmError

TinyCase = Callable[[str], Any]

ROWS = 30
ROOMY = {"running": 6}
TIGHT = {"batch": 40, "page_size": 4, "pages": 60, "running": 6}  # chunks, partial pages, preemption, eviction


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "spark_llm")


class Fault:
    """Makes the n-th call of a function fail, before or after it did its work."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str, *, at: int, late: bool = False) -> None:
        self.calls = 0
        original: Callable[..., Any] = getattr(owner, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at and not late:
                raise RuntimeError("injected")
            result = original(*args, **kwargs)
            if self.calls == at:
                raise RuntimeError("injected")
            return result

        patch.setattr(owner, name, failing)


POINTS: dict[str, tuple[object, str, bool, int]] = {  # owner, function, late, calls in a step
    "before the batch is laid out": (runner_module, "plan_attention", False, 1),
    "before the first layer reads": (StepAttention, "run", False, 2),
    "after the last layer": (runner_module, "sample", False, 1),
    "after the tokens are drawn": (runner_module, "sample", True, 1),
    "while the step is waited for": (runner_module.Done, "tokens", False, 1),
}
IN_FLIGHT = {"depth": 2}
SETTINGS = {
    "roomy": ROOMY,
    "tight": TIGHT,
    "roomy, a step in flight": ROOMY | IN_FLIGHT,
    "tight, a step in flight": TIGHT | IN_FLIGHT,
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("point", POINTS)
def test_any_step_may_fail_at_any_point(
    tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch, point: str, settings: dict[str, Any]
) -> None:
    """The n-th step fails, for each n in turn over the first ones and then every fifth."""
    case = tiny_case("llama")
    owner, name, late, calls = POINTS[point]
    failures = 0
    for step in [*range(1, 8), *range(8, 60, 7)]:
        with monkeypatch.context() as patch:
            Fault(patch, owner, name, at=step * calls, late=late)
            engine = case.model.engine(**settings)
            case.compare(case.model.answer(case.requests(ROWS), engine=engine))
            failures += engine.stats().failed_steps
    assert failures >= 7


@pytest.mark.parametrize("every", [1, 2, 5])
def test_steps_of_several_rows_keep_failing(tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """A row that succeeded alone is as good as new: nobody is given up, however often steps fail."""
    case = tiny_case("llama")
    engine = case.model.engine(**TIGHT)
    launch, count = engine.runner.launch, 0

    def failing(plan: StepPlan) -> Done:
        nonlocal count
        count += plan.num_rows > 1
        result: Done = launch(plan)
        if plan.num_rows > 1 and count % every == 0:
            raise RuntimeError("injected")
        return result

    monkeypatch.setattr(engine.runner, "launch", failing)
    case.check(rows=ROWS, engine=engine)
    assert engine.stats().failed_steps >= 4


def fail_with(engine: Engine, monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> list[list[int]]:
    """Let every step with a row of ``bad`` fail; returns the row ids of each step."""
    launch, steps = engine.runner.launch, []

    def failing(plan: StepPlan) -> Done:
        steps.append([s.row.request.id for s in plan.shares()])
        done = launch(plan)
        if bad & set(steps[-1]):
            raise RuntimeError("a bad row")
        return done

    monkeypatch.setattr(engine.runner, "launch", failing)
    return steps


def check_bad(answers: dict[int, Completion], bad: set[int]) -> Iterator[Completion]:
    """The bad rows have their error; yields the others."""
    for id_, answer in answers.items():
        if id_ not in bad:
            yield answer
            continue
        assert answer.finish_reason is FinishReason.ERROR
        assert answer.error is not None
        error = LlmError(answer.error[0], **answer.error[1])
        assert error.condition == "LLM_ENGINE_STEP_FAILED"
        assert "after 2 attempts" in str(error)
        assert "<" not in str(error)


@pytest.mark.parametrize("bad", [{0}, {3, 4, 17}, set(range(0, ROWS, 2))], ids=["one", "three", "half"])
@pytest.mark.parametrize("settings", [{}, TIGHT, TIGHT | IN_FLIGHT], ids=["roomy", "tight", "tight, a step in flight"])
def test_only_bad_rows_are_given_up(
    tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch, bad: set[int], settings: dict[str, Any]
) -> None:
    case = tiny_case("llama")
    engine = case.model.engine(**settings)
    steps = fail_with(engine, monkeypatch, bad)
    answers = case.model.run(case.requests(ROWS), engine=engine)
    assert set(answers) == set(range(ROWS))
    case.compare(check_bad(answers, bad))
    for row in bad:
        assert sum(row in step for step in steps) == 2
        assert [row] in steps
    assert engine.stats().failed_steps <= 2 * len(bad)
    assert engine.stats().rows_answered == ROWS - len(bad)


def test_a_token_that_the_model_does_not_have_costs_its_own_row_only(tiny_case: TinyCase) -> None:
    case = tiny_case("llama")
    requests = case.requests(ROWS)
    requests[7].prompt[-1] = case.model.config.vocab_size + 5
    answers = case.model.run(requests)
    case.compare(check_bad(answers, {7}))


def test_rows_that_matched_pages_of_a_failed_row_compute_them_themselves(
    tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row that was to compute a shared prefix for all is the bad one; its pages are NaN afterwards."""
    case = tiny_case("llama")
    prompt = max(case.prompts, key=len)[:60]
    prompts = [[*prompt, 20 + i] for i in range(6)]
    expected = case.model.reference(prompts, 3)
    for bad in range(6):
        engine = case.model.engine()
        steps = fail_with(engine, monkeypatch, {bad})
        answers = case.model.run(case.model.requests(prompts, 3), engine=engine)
        assert len(steps[0]) == 6
        good = list(check_bad(answers, {bad}))
        assert sum(a.computed_tokens for a in good) == 60 + 5  # the prefix once
        for answer in good:
            assert answer.output == expected.outputs[answer.id]


def test_what_a_failed_step_computed_is_counted_as_computed_again(
    tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny_case("llama")
    Fault(monkeypatch, runner_module, "sample", at=1)
    engine = case.model.engine(batch=1024)
    answers = case.check(rows=10, engine=engine)
    plain = case.check(rows=10)
    total = sum(a.computed_tokens for a in plain)
    assert sum(a.recomputed_tokens for a in answers) == total
    assert sum(a.prompt_tokens for a in answers) == sum(a.cached_tokens + a.computed_tokens for a in answers)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_may_be_cancelled_between_any_two_steps(tiny_case: TinyCase, settings: dict[str, Any]) -> None:
    """After step n the n-th row (and whoever was admitted last) is cancelled; the others answer as ever."""
    case = tiny_case("llama")
    for n in range(0, 24, 3):
        cancelled: set[int] = set()

        def cancel(engine: Engine, step: int, n: int = n, cancelled: set[int] = cancelled) -> None:
            if step == n:
                running = engine.scheduler.running
                cancelled |= {n, *(row.request.id for row in running[-1:])}
                engine.cancel(cancelled)

        answers = case.model.run(case.requests(ROWS), before_step=cancel, **settings)
        assert set(answers) | cancelled == set(range(ROWS))
        assert len(set(answers) & cancelled) <= 1  # the n-th row may have been done by then
        case.compare(answers.values())


def test_suspects_may_be_cancelled(tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a failed step that are to run alone go away before their turn, the bad one among them."""
    case = tiny_case("llama")
    engine = case.model.engine(running=8)
    fail_with(engine, monkeypatch, {2})
    failed_at: list[int] = []

    def cancel(engine: Engine, step: int) -> None:
        if engine.stats().failed_steps and not failed_at:
            failed_at.append(step)
            engine.cancel([0, 2, 5])

    answers = case.model.run(case.requests(ROWS), engine=engine, before_step=cancel)
    assert failed_at
    assert set(range(ROWS)) - {0, 2, 5} <= set(answers)
    assert 2 not in answers
    case.compare(answers.values())


def test_a_failure_of_the_schedule_itself_is_fatal(tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the model's run is rolled back; an error in plan or commit leaves the engine, which is then restarted."""
    case = tiny_case("llama")
    engine = case.model.engine()
    engine.add(case.requests(1)[0])
    with monkeypatch.context() as patch:
        Fault(patch, engine.scheduler.cache, "allocate", at=1)
        with pytest.raises(RuntimeError, match="injected"):
            engine.step()
    engine = case.model.engine()
    request = case.requests(1)[0]

    def failing(_output: object) -> bool:
        raise RuntimeError("a broken callback")

    request.is_stopped = failing
    engine.add(request)
    with pytest.raises(RuntimeError, match="callback"):
        engine.step()
