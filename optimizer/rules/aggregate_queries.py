"""The queries that aggregates over answers become (rules/llm_aggregates.py), as SQL over the one table ``input``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spark_llm.aggregate import AggregateSpec, Option
from spark_llm.errors import LlmError

_GRADES = 10
_PACKED = 16  # bytes of text for each byte that a table says it has, at most: files are compressed
_MOST_CHUNKS = 1 << 20  # of a group of unknown size
_LETTER = 4  # bytes of a character, at most: a text is cut by characters
_AROUND = 32  # bytes that a line may have around its text
_LEAST_CHUNKS = 64
_TASK_SHARE = 4  # partitions of the first level for each task slot, so that a lost task loses little
_TASK_CHUNKS = 2500  # of a partition, about, in large groups: Arrow sends up to 10,000 rows at a time, copied twice


def most_chunks(spec: AggregateSpec, rows: int | None, table_bytes: float) -> int:
    """Most chunks that a group may have: by the most rows that there are, None if nobody knows; else by what Spark
    knows of the tables below, in bytes, infinite if nobody knows."""
    size = _size(spec)
    if rows is not None:
        line = _LETTER * (spec.chunk_bytes - size) + _AROUND
        return max(1, rows - 1) * line // size + 1
    return int(max(_LEAST_CHUNKS, min(_MOST_CHUNKS, _PACKED * table_bytes / size)))


def _size(spec: AggregateSpec) -> int:
    """Bytes between the beginnings of two chunks: a chunk's last text may stand over its end."""
    return max(1, spec.chunk_bytes * 2 // 3)


def reduced(spec: AggregateSpec, keys: Sequence[str], is_distinct: bool, chunks: int, slots: int) -> str:
    """The query of ``ai_agg`` over the table ``input``: the keys, ``_text`` -> the keys, ``_answer``.

    chunks: as many as a group may have need levels; one that has more fails before its first call.
    """
    size = _size(spec)
    longest = max(1, spec.chunk_bytes - size)
    levels = max(1, math.ceil(math.log(chunks, spec.fan_in) - 1e-9))
    too_large = LlmError(
        "LLM_AGGREGATE_TOO_LARGE",
        function=spec.function,
        size=size * spec.fan_in**levels,
        key="spark.llm.aggregate.chunkLength",
    )
    partitions = max(_TASK_SHARE * slots, chunks // (_PACKED * _TASK_CHUNKS))
    group = "".join(f"{key}, " for key in keys)
    by = f"PARTITION BY {', '.join(keys)} " if keys else ""
    line = (
        f"if(octet_length(_text) <= {longest}, _text, "
        f"concat(substring(_text, 1, CAST({longest}L * length(_text) DIV octet_length(_text) AS INT)), '…'))"
    )
    if not is_distinct:
        line = f"if(_n = 1, {line}, concat('(', _n, ' times) ', {line}))"
    query = f"SELECT {group}CAST(_text AS STRING) AS _text FROM input"
    query = f"SELECT {group}_text, count(*) AS _n FROM ({query}) GROUP BY {group}_text"
    query = f"SELECT {group}_text, {line} AS _line FROM ({query})"
    start = f"sum(octet_length(_line) + 3) OVER ({by}ORDER BY _text ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
    query = f"SELECT {group}_line, coalesce({start}, 0) DIV {size} AS _chunk FROM ({query})"
    query = (
        f"SELECT {group}_line, if(_chunk < {spec.fan_in**levels}, _chunk, raise_error({_literal(str(too_large))})) "
        f"AS _chunk FROM ({query})"
    )
    query = (
        f"SELECT {_spread(keys, min(chunks, partitions))}{group}_chunk, "
        f"sort_array(collect_list(_line)) AS _texts FROM ({query}) GROUP BY {group}_chunk"
    )
    call = _call(spec, spec.prompt, "texts => if(size(_texts) = 0, NULL, _texts)")
    query = f"SELECT {group}_chunk, {call} AS _answer FROM ({query})"
    for _ in range(levels):
        chunks = math.ceil(chunks / spec.fan_in)
        query = (
            f"SELECT {_spread(keys, min(chunks, slots))}{group}_chunk DIV {spec.fan_in} AS _chunk, "
            f"sort_array(collect_list(struct(_chunk, _answer))) AS _parts FROM ({query}) "
            f"GROUP BY {group}_chunk DIV {spec.fan_in}"
        )
        call = _call(spec, spec.combine, "answers => transform(_parts, p -> p._answer)")
        query = (
            f"SELECT {group}_chunk, CASE WHEN size(_parts) = 1 THEN _parts[0]._answer "
            f"WHEN exists(_parts, p -> p._answer IS NULL) THEN NULL ELSE {call} END AS _answer FROM ({query})"
        )
    return f"SELECT {group}_answer FROM ({query})" if keys else f"SELECT max(_answer) AS _answer FROM ({query})"


def top_k(spec: AggregateSpec, keys: Sequence[str]) -> str:
    """The query of ``ai_top_k`` over the table ``input``: the keys, ``_text`` -> the keys, ``_answer``."""
    group = "".join(f"{key}, " for key in keys)
    by = f"PARTITION BY {', '.join(keys)} " if keys else ""
    grades = ", ".join(f"'{grade}'" for grade in range(_GRADES + 1))
    call = _call(spec, spec.prompt, "text => _text", f"choices => array({grades})")
    query = f"SELECT {group}CAST(_text AS STRING) AS _text FROM input"
    query = f"SELECT {group}_text FROM ({query}) GROUP BY {group}_text"
    query = f"SELECT {group}_text, CAST({call} AS INT) AS _grade FROM ({query})"
    query = (
        f"SELECT {group}_text, _grade, row_number() OVER ({by}ORDER BY _grade DESC NULLS LAST, _text) AS _rank "
        f"FROM ({query})"
    )
    best = "sort_array(collect_list(if(_grade IS NULL, NULL, struct(_rank, _text))))"
    last = f"GROUP BY {', '.join(keys)}" if keys else ""
    return f"SELECT {group}transform({best}, p -> p._text) AS _answer FROM ({query}) WHERE _rank <= {spec.k} {last}"


def _spread(keys: Sequence[str], partitions: int) -> str:
    """Chunks go to partitions by hash: those of one group are in one task before."""
    return f"/*+ REPARTITION({partitions}, {', '.join([*keys, '_chunk'])}) */ "


def _call(spec: AggregateSpec, prompt: str, field: str, *more: str) -> str:
    options = [f"{name} => {_literal(value)}" for name, value in spec.options.items()]
    return f"llm({', '.join([_literal(prompt), field, *more, *options])})"


def _literal(value: Option) -> str:
    """A constant in SQL."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, tuple | list):
        return f"array({', '.join(map(_literal, value))})"
    return f"{value!r}D" if isinstance(value, float) else str(value)
