"""What all who embed have in common on the text side: vectors as answers, and what calls of other tasks are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_llm.engine.request import Constraint
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.errors import LlmError

Vectors = npt.NDArray[np.float32]


def json_vectors(vectors: Vectors) -> list[str | None]:
    """Each row of float32 [rows, width] as a JSON array, every number as short as float32 allows; None where one is
    not finite."""
    numbers = pa.array(vectors.ravel()).cast(pa.utf8()).to_pylist()
    width = vectors.shape[1]
    finite: list[bool] = np.all(np.isfinite(vectors), axis=1).tolist()
    rows = (numbers[start : start + width] for start in range(0, len(numbers), width))
    return [f"[{','.join(row)}]" if good else None for row, good in zip(rows, finite, strict=True)]


def excess(length: int, limit: int, remedy: str, text: str = "The text") -> dict[str, str]:
    """The parameters of LLM_CONTEXT_LENGTH_EXCEEDED for a text of at least ``length`` tokens."""
    return {"excess": f"{text} has {length} tokens or more", "limit": str(limit), "remedy": remedy}


class VectorText:
    """The part of a ServedText that does not depend on how texts become ids. name: of the model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, header: StreamOpen) -> None:
        """Raises LLM_MODEL_TASK_MISMATCH for a system message."""
        if header.system is not None:
            self._refuse("follow a system message")

    def decode(self, outputs: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> list[str]:
        """Nothing: vectors come as texts already."""
        return ["" for _ in outputs]

    def stop_checker(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """None: there is nothing to stop."""
        return None

    def constrain(self, system: str | None, constraint: Constraint) -> NoReturn:
        """Raises LLM_MODEL_TASK_MISMATCH."""
        self._refuse("keep its answers to a constraint")

    def _refuse(self, task: str) -> NoReturn:
        reason, remedy = "it is asked for vectors of texts", "Leave that out, or ask a model that generates"
        raise LlmError("LLM_MODEL_TASK_MISMATCH", model=self.name, task=task, reason=reason, remedy=remedy)
