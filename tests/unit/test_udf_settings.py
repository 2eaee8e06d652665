"""What a spec and the configuration come to for a task and for its engine."""

from __future__ import annotations

from typing import Any

import pytest

from spark_llm.call import Budget, CallSpec, GroupSpec, RowPlan
from spark_llm.call_settings import answer_settings, stream_header
from spark_llm.config import LlmConf
from spark_llm.engine.request import Client
from spark_llm.engine.service import protocol
from spark_llm.predicate_order import PredicateOrder
from spark_llm.udf import _Task

FOLDED = CallSpec(rows=RowPlan(fold=True))
QUERY = Client("", "7")
CONDITIONS: tuple[list[Any], ...] = (["isnotnull", ["answer", 0]],)


def conf(**settings: str) -> LlmConf:
    return LlmConf.parse({f"spark.llm.{name.replace('_', '.')}": text for name, text in settings.items()})


def test_the_result_cache_is_that_of_the_configuration_in_seconds_and_bytes() -> None:
    configured = conf(cache_path="/answers", cache_memory="1m", cache_maxSize="2m", cache_cleared="1500")
    assert stream_header(FOLDED, configured, QUERY).cache == protocol.ResultCache(
        path="/answers", memory=1 << 20, max_size=2 << 20, cleared=1.5
    )
    assert stream_header(FOLDED, conf(), QUERY).cache == protocol.ResultCache(max_size=10 << 30)


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (FOLDED, {"cache_enabled": "false"}),
        (CallSpec(), {}),  # no keys are sent where nothing folds
        (CallSpec(rows=RowPlan(fold=True), temperature=0.5), {}),
    ],
)
def test_what_is_off_or_cannot_repeat_has_no_result_cache(spec: CallSpec, settings: dict[str, str]) -> None:
    assert stream_header(spec, conf(**settings), QUERY).cache is None


def test_the_budget_is_that_of_the_spec() -> None:
    assert stream_header(FOLDED, conf(), QUERY).budget is None
    spec = CallSpec(budget=Budget(calls=3, length=5, seconds=0.5, partial=True))
    assert stream_header(spec, conf(), QUERY).budget == protocol.Budget(calls=3, length=5, seconds=0.5)
    assert answer_settings(spec, conf(), {}).partial
    assert not answer_settings(CallSpec(budget=Budget(calls=3)), conf(), {}).partial


class FakeTaskContext:
    """An attempt at a task of query 7."""

    def __init__(self, attempt: int = 0) -> None:
        self.attempt = attempt

    def attemptNumber(self) -> int:
        return self.attempt

    def partitionId(self) -> int:
        return 5

    def taskAttemptId(self) -> int:
        return 50 + self.attempt

    def getLocalProperty(self, key: str) -> str | None:
        return "7" if key == "spark.sql.execution.id" else None


class FakeClient:
    """Remembers headers and requests of windows."""

    def __init__(self) -> None:
        self.headers: list[protocol.StreamOpen] = []
        self.requests: list[protocol.WindowRequest] = []
        self.connected = 0

    def connect(self, spec: object, start_timeout: float) -> FakeClient:
        self.connected += 1
        return self

    def stream(self, header: protocol.StreamOpen) -> None:
        self.headers.append(header)

    def window(self, request: protocol.WindowRequest) -> int:
        self.requests.append(request)
        return 3


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    found = FakeClient()
    monkeypatch.setattr("spark_llm.udf.client.connect", found.connect)
    return found


def group(**changes: Any) -> GroupSpec:
    return GroupSpec(**({"calls": (FOLDED, FOLDED), "arguments": ((0,), (1,))} | changes))


def task(spec: GroupSpec, attempt: int = 0) -> _Task:
    return _Task(spec, conf(), FakeTaskContext(attempt))  # type: ignore[arg-type]


def test_a_limit_asks_the_engine_for_windows_and_names_its_node_to_it(engine: FakeClient) -> None:
    limited = task(group(limit=9, node="n", conditions=CONDITIONS))
    grant = limited.flow().grant
    assert grant is not None
    assert (grant(0, 0, False), grant(3, 2, True)) == (3, 3)
    first = protocol.WindowRequest(query="7", node="n", limit=9, partition=5, attempt=50)
    last = protocol.WindowRequest(query="7", node="n", limit=9, partition=5, attempt=50, rows=3, hits=2, ended=True)
    assert engine.requests == [first, last]
    assert engine.connected == 1
    limited.opens(FOLDED)()
    assert [(header.node, header.limit) for header in engine.headers] == [("n", 9)]


def test_an_attempt_after_a_lost_one_has_no_limit(engine: FakeClient) -> None:
    again = task(group(limit=9, node="n", conditions=CONDITIONS), attempt=1)
    assert again.flow().grant is None
    again.opens(FOLDED)()
    assert [(header.node, header.limit) for header in engine.headers] == [("", 0)]


def test_hits_without_conditions_are_not_told(engine: FakeClient) -> None:
    grant = task(group(limit=9, node="n")).flow().grant
    assert grant is not None
    grant(3, 3, False)
    assert engine.requests[0].hits == 0


def test_an_order_is_learnt_only_where_several_calls_have_conditions() -> None:
    known = task(group(conditions=CONDITIONS, node="learns")).flow().order
    assert isinstance(known, PredicateOrder)
    assert task(group(conditions=CONDITIONS, node="learns")).flow().order is known
    assert task(group()).flow().order is None
    assert task(group(calls=(FOLDED,), arguments=((0,),), conditions=CONDITIONS)).flow().order is None
