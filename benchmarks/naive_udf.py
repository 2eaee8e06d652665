"""What people write without spark-llm: a pandas UDF that loads a model with transformers and generates row by row."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pandas as pd


@functools.cache
def _loaded(folder: str, threads: int) -> tuple[Any, Any]:
    """Tokenizer and model, once a worker process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model


def naive_udf(folder: str, threads: int, max_tokens: int) -> Any:
    """The UDF: a STRING, the user's message -> the answer, greedy."""
    from pyspark.sql.functions import pandas_udf

    def answer(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        tokenizer, model = _loaded(folder, threads)
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        template = functools.partial(tokenizer.apply_chat_template, **options)
        for batch in batches:
            texts = []
            for message in batch:
                chat = [{"role": "user", "content": message}]
                ids = template(chat)
                out = model.generate(**ids, do_sample=False, max_new_tokens=max_tokens)
                texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
            yield pd.Series(texts)

    answer.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return pandas_udf(answer, "string")
