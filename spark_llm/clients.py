"""Whom engines charge for a query: the user level of fair scheduling, its weight, and the query (CONTRACTS.md 18).

A task sees its query's settings and what Spark says of its job only as local properties. The weights of pools stand in
a file that the driver has read, so they travel with the Python function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from spark_llm.engine.request import MOST_WEIGHT, Client

if TYPE_CHECKING:
    from pyspark import SparkContext

    from spark_llm.config import LlmConf

POOL = "spark.scheduler.pool"
_DEFAULT_POOL = "default"
_TAGS = "spark.job.tags"
# The tags that Spark Connect and Spark's own sessions give to their jobs.
_CONNECT = re.compile(r"SparkConnect_OperationTag_User_(.+)_Session_[0-9a-f-]{36}_Operation_")
_SESSION = re.compile(r"(?:^|,)spark-session-([0-9a-f]{8})[0-9a-f-]{28}(?:,|$)")


def client_of(properties: Callable[[str], str | None], conf: LlmConf, pools: Mapping[str, float], query: str) -> Client:
    """The client of a task. properties: its local properties; pools: weights of the fair scheduler's pools."""
    pool = properties(POOL) or _DEFAULT_POOL
    weight = conf.client_weight or pools.get(pool, 1.0)
    return Client(conf.client or _user(pool, properties(_TAGS) or ""), query, weight)


def _user(pool: str, tags: str) -> str:
    if pool != _DEFAULT_POOL:
        return f"pool {pool}"
    if found := _CONNECT.search(tags):
        return f"user {found[1]}"
    if found := _SESSION.search(tags):
        return f"session {found[1]}"
    return ""


def pool_weights(context: SparkContext) -> dict[str, float]:
    """The weights other than 1 of the pools in Spark's fair scheduler allocation file; none where Spark is not FAIR.

    Pools that come up later, by their name in a local property, have weight 1.
    """
    spark = context._jsc.sc()
    if spark.getSchedulingMode().toString() != "FAIR":
        return {}
    found = spark.getAllPools()
    pools = [found.apply(number) for number in range(found.size())]
    return {str(pool.name()): min(float(pool.weight()), MOST_WEIGHT) for pool in pools if pool.weight() > 1}
