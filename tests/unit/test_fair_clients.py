"""Whom engines charge: the setting, the pool, the user of Spark Connect or the session, and by which weight."""

from __future__ import annotations

from typing import Any

import pytest

from spark_llm.call import CallSpec
from spark_llm.call_settings import stream_header
from spark_llm.clients import client_of, pool_weights
from spark_llm.config import LlmConf
from spark_llm.engine.request import Client
from spark_llm.errors import LlmError

SESSION = "eb35331e-797b-48a3-9b1c-3cb24063a75b"
TAGS = f"mine,spark-session-{SESSION}-execution-root-id-0,spark-session-{SESSION}"
CONNECT = f"SparkConnect_OperationTag_User_ann_b_Session_{SESSION}_Operation_{SESSION}"
POOLS = {"heavy": 4.0}

FOUND = {
    "the session": ({"spark.job.tags": TAGS}, {}, "session eb35331e", 1.0),
    "the user of Spark Connect": ({"spark.job.tags": f"{CONNECT},{TAGS}"}, {}, "user ann_b", 1.0),
    "the pool": ({"spark.scheduler.pool": "light", "spark.job.tags": TAGS}, {}, "pool light", 1.0),
    "the pool's weight": ({"spark.scheduler.pool": "heavy"}, {}, "pool heavy", 4.0),
    "the default pool": ({"spark.scheduler.pool": "default", "spark.job.tags": TAGS}, {}, "session eb35331e", 1.0),
    "the setting": ({"spark.scheduler.pool": "heavy"}, {"client": "etl"}, "etl", 4.0),
    "the setting's weight": ({"spark.scheduler.pool": "heavy"}, {"client.weight": "0.5"}, "pool heavy", 0.5),
    "nothing is known": ({}, {}, "", 1.0),
    "a tag that only looks like a session's": ({"spark.job.tags": "spark-session-mine"}, {}, "", 1.0),
}


def conf(settings: dict[str, str]) -> LlmConf:
    return LlmConf.parse({f"spark.llm.{key}": text for key, text in settings.items()})


@pytest.mark.parametrize(("properties", "settings", "user", "weight"), FOUND.values(), ids=list(FOUND))
def test_who_asks(properties: dict[str, str], settings: dict[str, str], user: str, weight: float) -> None:
    found = client_of(properties.get, conf(settings), POOLS, "7")
    assert found == Client(user, "7", weight)
    header = stream_header(CallSpec(), conf(settings), found)
    assert (header.client, header.client_weight, header.query) == (user, weight, "7")


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "1e-310", "1e7", "much", ""])
def test_weights_that_are_none(text: str) -> None:
    with pytest.raises(LlmError) as caught:
        conf({"client.weight": text})
    assert caught.value.condition == "LLM_INVALID_CONFIG"


def test_engines_are_told_their_scheduler() -> None:
    spec = conf({"scheduler": "VTC", "scheduler.quantum": "512"}).engine_spec()
    assert (spec.scheduler, spec.scheduler_quantum) == ("vtc", 512)
    assert conf({}).engine_spec().scheduler == "dlpm"


class FakeJvm:
    """The pools of a JVM's SparkContext, and whatever is a mode, a pool or a list of them."""

    def __init__(self, mode: str, pools: dict[str, int]) -> None:
        self.mode = mode
        self.pools = list(pools.items())
        self._jsc = self

    def sc(self) -> FakeJvm:
        return self

    def getSchedulingMode(self) -> FakeJvm:
        return self

    def toString(self) -> str:
        return self.mode

    def getAllPools(self) -> FakeJvm:
        return self

    def size(self) -> int:
        return len(self.pools)

    def apply(self, number: int) -> FakePool:
        return FakePool(*self.pools[number])


class FakePool:
    def __init__(self, name: str, weight: int) -> None:
        self._of = (name, weight)

    def name(self) -> str:
        return self._of[0]

    def weight(self) -> int:
        return self._of[1]


def test_weights_of_pools_are_those_of_the_fair_scheduler() -> None:
    spark: Any = FakeJvm("FAIR", {"default": 1, "heavy": 4})
    assert pool_weights(spark) == {"heavy": 4.0}
    assert pool_weights(FakeJvm("FIFO", {"a set of tasks": 3})) == {}  # type: ignore[arg-type]
