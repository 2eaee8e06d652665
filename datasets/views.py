"""Puts a dataset's tables into a Spark session as temporary views."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from spark_llm.datasets.catalogue import load

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def register(spark: SparkSession, name: str) -> list[str]:
    """Make the tables of dataset ``name`` visible to SQL in this session; returns the views' names.

    Raises LLM_UNKNOWN_DATASET or LLM_DATASET_UNAVAILABLE.
    """
    tables = load(name)
    for table, frame in tables.items():
        to_spark(spark, frame).createOrReplaceTempView(table)
    return list(tables)


def to_spark(spark: SparkSession, frame: pd.DataFrame) -> DataFrame:
    """A DataFrame with NULL where pandas has NA, which pyspark would make NaN or "<NA>" without Arrow."""
    return spark.createDataFrame(frame.astype(object).where(frame.notna(), None), schema=to_spark_schema(frame))


def to_spark_schema(frame: pd.DataFrame) -> str:
    """Spark's DDL for a frame of integers, floats and strings."""
    return ", ".join(f"`{column}` {_type(frame[column])}" for column in frame.columns)


def _type(column: pd.Series) -> str:
    if pd.api.types.is_integer_dtype(column):
        return "BIGINT"
    return "DOUBLE" if pd.api.types.is_float_dtype(column) else "STRING"
