"""Vectors made on a GPU, where there is one, are those of the CPU; in half precision nearly so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from spark_llm.engine.encoder.config import load_encoder_config
from spark_llm.engine.encoder.model import Encoder, encoder_shapes
from spark_llm.engine.model.loader import iter_tensors
from spark_llm.engine.model.source import resolve

CONFIG = {
    "architectures": ["BertModel"], "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens", "lasttoken"])
@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 1 - 1e-5), (torch.bfloat16, 0.99), (torch.float16, 0.999)]
)
def test_vectors_are_those_of_the_cpu(
    tmp_path: Path, device: str, pooling: str, dtype: torch.dtype, least: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "st.Pooling", "path": "1_Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    source = resolve(f"dummy:{tmp_path}")
    config = load_encoder_config(source)
    drawn = [(name, 5 * tensor) for name, tensor in iter_tensors(source, encoder_shapes(config), torch.float32)]
    here = Encoder(config, drawn, torch.float32)
    there = Encoder(config, [(name, tensor.to(device)) for name, tensor in drawn], dtype)
    torch.manual_seed(0)
    tokens, lengths = torch.randint(0, 120, (5, 40)), torch.tensor([40, 1, 7, 40, 23])
    expected, found = here.embed(tokens, lengths), there.embed(tokens, lengths)
    assert (found.dtype, found.device, found.shape) == (torch.float32, torch.device("cpu"), (5, 64))
    assert F.cosine_similarity(expected, found).min() >= least
    assert F.cosine_similarity(expected[0], expected[3], dim=0) < 0.98
