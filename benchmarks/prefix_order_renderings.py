"""How a field may stand in a prompt: what each way costs in tokens, and what a prefix cache finds of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from prefix_order_hits import Ints, Prompts, common, text_columns, unbounded
from prefix_order_solver import SAME_TABLE, tables
from results import aligned
from tokenizers import Tokenizer

from spark_llm.call import FieldSpec
from spark_llm.datasets import paper
from spark_llm.engine.model.source import resolve
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.engine.text.template import ChatFrame
from spark_llm.engine.text.tokenizer import load_tokenizer
from spark_llm.field_text import FieldRenderer

ROWS = 4_000

Field = tuple[str, str | None, bool]  # name, value, whether the value is JSON already


@dataclass(frozen=True)
class Rendering:
    """A message is ``begin``, the fields joined by ``between``, ``end``."""

    begin: str
    between: str
    end: str
    field: Callable[[Field], str]


def quoted(field: Field) -> str:
    """The value as JSON."""
    _, value, is_json = field
    return "null" if value is None else value if is_json else json.dumps(value, ensure_ascii=False)


def bare(field: Field) -> str:
    """The value as it is, on one line."""
    return "null" if field[1] is None else re.sub(r"\s*\n\s*", " ", field[1])


def in_use(field: Field) -> str:
    """The line that prompts have."""
    name, value, is_json = field
    return FieldRenderer(FieldSpec(name, is_json))(value).removesuffix("\n")


def label(name: str) -> str:
    """The name as a JSON string unless it is a word."""
    return name if re.fullmatch(r"[^\W\d]\w*", name) else json.dumps(name, ensure_ascii=False)


RENDERINGS = {
    "in use: name: value, quotes if needed": Rendering("\n", "\n", "", in_use),
    'lines name: "value"': Rendering("\n", "\n", "", lambda field: f"{label(field[0])}: {quoted(field)}"),
    "lines name=value": Rendering("\n", "\n", "", lambda field: f"{field[0]}={bare(field)}"),
    "one line name: value;": Rendering("\n", "; ", "", lambda field: f"{field[0]}: {bare(field)}"),
    "JSON object": Rendering("\n{", ", ", "}", lambda field: f'"{field[0]}": {quoted(field)}'),
    "JSON object, compact": Rendering("\n{", ",", "}", lambda field: f'"{field[0]}":{quoted(field)}'),
    "lines of values": Rendering("\n", "\n", "", bare),
    "one line value | value": Rendering("\n", " | ", "", bare),
}


@dataclass(frozen=True)
class Cost:
    """Tokens a row with fields in the statistics order: all, of data, and those that no earlier row begins with."""

    table: str
    rendering: str
    tokens: float
    data: float
    computed: float
    rate: float
    data_rate: float


def measure(names: Sequence[str], rows: int | None, data: Path | None) -> list[Cost]:
    """All renderings of all tables, of ROWS rows each unless told."""
    loaded = load_tokenizer(resolve("default"))
    frame = TextPipeline(load_tokenizer(resolve("default"))).frame(None)
    return [
        cost(loaded.tokenizer, frame, name, table, rendering)
        for name, table in tables([name for name in names if name in paper.TABLES], rows or ROWS, data)
        for rendering in RENDERINGS
    ]


def cost(tokenizer: Tokenizer, chat: ChatFrame, table: str, frame: pd.DataFrame, rendering: str) -> Cost:
    """One rendering of one table."""
    instruction = paper.instruction(SAME_TABLE.get(table, table))
    columns, specs = text_columns(frame)
    way = RENDERINGS[rendering]
    texts = [field_texts(column, spec, way) for column, spec in zip(columns, specs, strict=True)]
    rows = [texts[number] for number in statistics_order(tokenizer, texts).tolist()]
    messages = [
        chat.render(instruction + way.begin + way.between.join(fields) + way.end) for fields in zip(*rows, strict=True)
    ]
    found = unbounded(prompts(tokenizer, messages, chat.prefix + instruction + way.begin))
    return Cost(
        table=table,
        rendering=rendering,
        tokens=found.tokens / found.rows,
        data=(found.tokens - found.instruction_tokens) / found.rows,
        computed=(found.tokens - found.found) / found.rows,
        rate=found.rate,
        data_rate=found.data_rate,
    )


def field_texts(column: pa.StringArray, spec: FieldSpec, way: Rendering) -> list[str]:
    """A column's cells as they stand in the prompt."""
    return [way.field((spec.name, value, spec.json)) for value in column.to_pylist()]


def statistics_order(tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> Ints:
    """Fields by mean length² · (rows / distinct - 1), the largest first; lengths in tokens."""
    scores = []
    for values in texts:
        distinct = dict.fromkeys(values)
        lengths = dict(zip(distinct, map(len, encode(tokenizer, list(distinct))), strict=True))
        mean = sum(lengths[value] for value in values) / len(values)
        scores.append(mean**2 * (len(values) / len(distinct) - 1))
    return np.argsort(-np.array(scores), kind="stable")


def prompts(tokenizer: Tokenizer, messages: Sequence[str], instruction: str) -> Prompts:
    """Whole prompts in ids; their instruction is what they begin with of ``instruction``."""
    ids = encode(tokenizer, messages)
    (start,) = encode(tokenizer, [instruction])
    return Prompts(ids, np.array([common(start, row) for row in ids], np.int64))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Any]:
    """The ids of each text, the template's special tokens recognised."""
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in found]


HEADER = ("table", "rendering", "tokens/row", "data", "computed/row", "against now", "PHR", "PHR of data")


def report(record: Mapping[str, Any]) -> str:
    """The table, from the JSON record; the first rendering of each table is the one in use."""
    costs = [Cost(**entry) for entry in record["rendering"]]
    now: dict[str, Cost] = {}
    lines = []
    for found in costs:
        base = now.setdefault(found.table, found)
        lines.append(
            (
                found.table,
                found.rendering,
                f"{found.tokens:,.1f}",
                f"{found.data:,.1f}",
                f"{found.computed:,.1f}",
                f"{found.computed / base.computed:.3f}",
                f"{found.rate:.1%}",
                f"{found.data_rate:.1%}",
            )
        )
    return aligned([HEADER, *lines])
