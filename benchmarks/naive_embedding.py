"""What people write without spark-llm: a pandas UDF that loads an encoder with transformers and embeds in batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pandas as pd

BATCH = 32  # texts of a forward pass, padded to the longest: what sentence-transformers does by default


@functools.cache
def _loaded(folder: str, threads: int) -> tuple[Any, Any]:
    """Tokenizer and model, once a worker process."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(threads)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def vectors(texts: list[str], tokenizer: Any, model: Any) -> Any:
    """float32 [texts, width]: the mean of the last layer over a text's tokens, of length 1."""
    import torch

    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = batch["attention_mask"].unsqueeze(-1).float()
            states = model(**batch).last_hidden_state
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found).numpy()


def embed_udf(folder: str, threads: int) -> Any:
    """The UDF: a STRING -> its vector."""
    from pyspark.sql.functions import pandas_udf

    def embed(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        tokenizer, model = _loaded(folder, threads)
        for batch in batches:
            yield pd.Series(list(vectors(batch.tolist(), tokenizer, model)))

    embed.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return pandas_udf(embed, "array<float>")


def similarity_udf(folder: str, threads: int, text: str) -> Any:
    """The UDF: a STRING -> how alike it and ``text`` are."""
    from pyspark.sql.functions import pandas_udf

    def compare(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        tokenizer, model = _loaded(folder, threads)
        [asked] = vectors([text], tokenizer, model)
        for batch in batches:
            yield pd.Series(vectors(batch.tolist(), tokenizer, model) @ asked)

    compare.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return pandas_udf(compare, "float")
