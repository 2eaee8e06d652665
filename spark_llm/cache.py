"""``clear_cache()``: answers stored so far do not count any more."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from spark_llm import config

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CLEARED = "spark.llm.cache.cleared"


def clear_cache(spark: SparkSession) -> None:
    """Forget the answers of the result cache: queries that start from now on ask anew.

    The session, and sessions that ``newSession()`` makes later, take no answer from before now, whatever engine holds
    it; the files below ``spark.llm.cache.path`` are deleted, and engines of this host give their memory back. May be
    called any number of times, and needs no engine. Raises LLM_CACHE_UNAVAILABLE for a path that cannot be used.
    """
    from spark_llm.engine.service import client
    from spark_llm.engine.service.archive import Archive

    now = math.ceil(time.time() * 1000)
    path = config.from_session(spark).cache_path
    spark.conf.set(CLEARED, str(now))
    spark._jsparkSession.sharedState().conf().set(CLEARED, str(now))
    if path:
        Archive(path, "cleared").trim(0, now / 1000)
    client.clear_caches()
