"""What the engine is asked and what it answers: plain data, no torch, no text.

The three counters ``num_tokens``, ``num_cached_tokens`` and ``num_computed`` mean the same in every layer
(scheduling, cache, model, service, report).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from spark_llm.engine.constraints.matcher import CompiledConstraint

TokenIds = npt.NDArray[np.int32]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer's tokens are chosen; constant for all rows of one call.

    temperature 0 is greedy. top_k 0 and top_p 1 mean no limit. The seed of a row is on its Request.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must be, for all rows of a call: decoding chooses among tokens that keep to it only.

    kind: "choices": one of the texts ``choices``. "json_schema", "regex", "grammar": ``text`` is a JSON schema, a
    regular expression (of Rust's regex crate; it matches the whole answer), or a grammar in llguidance's dialect of
    Lark, whose rule ``start`` is the answer.
    """

    kind: Literal["choices", "json_schema", "regex", "grammar"]
    text: str = ""
    choices: tuple[str, ...] = ()


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens reached
    ERROR = "error"  # see Completion.error
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Hints:
    """What is known of rows that come after a request. A wrong hint costs time, never an answer.

    stream: who asks; its hints are void when it ends. shared_next: leading tokens that the row after it shares.
    later_calls: how many later calls of ``query`` will ask prompts that share this one's leading ``shared_tokens``.
    """

    stream: int
    query: str = ""
    shared_next: int = 0
    later_calls: int = 0
    shared_tokens: int = 0


class Client(msgspec.Struct, frozen=True):
    """Whom scheduling charges for a row: a user (or pool), and one of the user's queries.

    Users share the engine by their weights (see ``is_weight``), the queries of one user share alike what it gets.
    """

    user: str = ""
    query: str = ""
    weight: float = 1.0


NOBODY = Client()
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # beyond, tokens by weight are no numbers to reckon with


def is_weight(weight: float) -> bool:
    """Whether clients may share by it."""
    return LEAST_WEIGHT <= weight <= MOST_WEIGHT


@dataclass(slots=True, eq=False)
class Request:
    """One row to answer. ``id`` is unique within the engine; ``prompt`` is int32 of shape [num prompt tokens].

    instruction_tokens: how many leading prompt tokens belong to template and instruction (for the report).
    seed: for temperature > 0; None lets the engine draw one.
    is_stopped: told the output ids so far after each token; True ends the row (stop strings). None: never.
    constraint: what its answer keeps to, compiled; None: free text.
    reuse: False neither matches nor leaves anything in the prefix cache (the naive baseline).
    hints: for the prefix cache; None if nothing is known.
    """

    id: int
    prompt: TokenIds
    params: SamplingParams
    client: Client = NOBODY
    instruction_tokens: int = 0
    seed: int | None = None
    is_stopped: Callable[[Sequence[int]], bool] | None = None
    constraint: CompiledConstraint | None = None
    reuse: bool = True
    hints: Hints | None = None


@dataclass(slots=True)
class Completion:
    """The answer of one Request.

    prompt_tokens == cached_tokens + computed_tokens; recomputed_tokens counts, beyond that, what
    preemption or a rolled-back step made the engine compute again.
    ``error`` is (condition, parameters) of spark_llm.errors when finish_reason is ERROR.
    text: the choice that ``output`` stands for, as it was given; None: the answer is what ``output`` spells.
    confidence: the choice's probability among the choices; None without choices.
    output_tokens: of the answer, where a server elsewhere counts them; None: they are ``output``.
    """

    id: int
    output: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    recomputed_tokens: int = 0
    instruction_tokens: int = 0
    error: tuple[str, dict[str, str]] | None = None
    text: str | None = None
    confidence: float | None = None
    output_tokens: int | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @classmethod
    def failed(cls, request_id: int, condition: str, parameters: dict[str, str]) -> Completion:
        """The answer of a row that has none, and cost nothing."""
        return cls(request_id, [], FinishReason.ERROR, 0, 0, 0, error=(condition, parameters))

    @property
    def num_output(self) -> int:
        """Tokens of the answer."""
        return len(self.output) if self.output_tokens is None else self.output_tokens
