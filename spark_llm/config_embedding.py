"""The key of the model that makes vectors of texts (``ai_embed``, ``ai_similarity``)."""

from __future__ import annotations

import dataclasses

from spark_llm.config_kinds import TEXT, key


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConf:
    """Embeddings."""

    embedding_model: str = key(
        "embedding.model",
        TEXT,
        "default",
        "The encoder of `ai_embed` and `ai_similarity`: `default` (the packaged all-MiniLM-L6-v2, vectors of 384 "
        "numbers), a folder with `config.json` and `*.safetensors`, a `.gguf` file of a decoder, or a Hugging Face id. "
        "A call's `model => …` wins over it.",
    )
