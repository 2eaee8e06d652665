"""How a field may stand in a prompt: what each way costs in tokens, and what a prefix cache finds of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from prefix_order_hits import Ints, Prompts, common, text_columns, unbounded
from tokenizers import Tokenizer

from spark_llm.call import FieldSpec
from spark_llm.datasets import paper
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.engine.text.tokenizer import LoadedTokenizer

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


def quoted_if_needed(field: Field) -> str:
    """The value as it is, as JSON where it could be taken for something else."""
    _, value, is_json = field
    plain = value is not None and not is_json and re.fullmatch(r"(?!null$|[\"\[{]|[-0-9.]+$)\S(.*\S)?", value)
    return str(value) if plain else quoted(field)


def label(name: str) -> str:
    """The name as a JSON string unless it is a word."""
    return name if re.fullmatch(r"[^\W\d]\w*", name) else json.dumps(name, ensure_ascii=False)


RENDERINGS = {
    'lines name: "value", "odd/name": "value"': Rendering(
        "\n", "\n", "", lambda field: f"{label(field[0])}: {quoted(field)}"
    ),
    'lines name: "value"': Rendering("\n", "\n", "", lambda field: f"{field[0]}: {quoted(field)}"),
    "lines, quotes if needed": Rendering("\n", "\n", "", lambda field: f"{field[0]}: {quoted_if_needed(field)}"),
    "lines name: value": Rendering("\n", "\n", "", lambda field: f"{field[0]}: {bare(field)}"),
    "lines name=value": Rendering("\n", "\n", "", lambda field: f"{field[0]}={bare(field)}"),
    "JSON object": Rendering("\n{", ", ", "}", lambda field: f'"{field[0]}": {quoted(field)}'),
    "JSON object, compact": Rendering("\n{", ",", "}", lambda field: f'"{field[0]}":{quoted(field)}'),
    "one line name: value;": Rendering("\n", "; ", "", lambda field: f"{field[0]}: {bare(field)}"),
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


def measure(loaded: LoadedTokenizer, pipeline: TextPipeline, names: Sequence[str], instruction: str) -> list[Cost]:
    """All renderings of all tables ``names``, of ROWS rows each."""
    return [
        cost(loaded.tokenizer, pipeline, name, paper.table(name, ROWS), rendering, instruction)
        for name in names
        for rendering in RENDERINGS
    ]


def cost(
    tokenizer: Tokenizer, pipeline: TextPipeline, table: str, frame: pd.DataFrame, rendering: str, instruction: str
) -> Cost:
    """One rendering of one table."""
    columns, specs = text_columns(frame)
    way = RENDERINGS[rendering]
    texts = [field_texts(column, spec, way) for column, spec in zip(columns, specs, strict=True)]
    rows = [texts[number] for number in statistics_order(tokenizer, texts).tolist()]
    frame_text = pipeline.frame(None)
    messages = [
        frame_text.render(instruction + way.begin + way.between.join(fields) + way.end)
        for fields in zip(*rows, strict=True)
    ]
    found = unbounded(prompts(tokenizer, messages, frame_text.prefix + instruction + way.begin))
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


def as_record(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(cost) for cost in costs]
