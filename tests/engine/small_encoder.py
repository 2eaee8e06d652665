"""Small random encoders in folders as sentence-transformers lays them out, with a tokenizer of single characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WINDOW = 40
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?"
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + 2 * len(LETTERS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
}


def small_encoder(
    folder: Path,
    *,
    pooling: str = "mean_tokens",
    normalize: bool = True,
    family: str = "Bert",
    lowercase: bool = False,
    **settings: Any,
) -> transformers.PreTrainedModel:
    """Writes one to ``folder`` and returns transformers' module of it."""
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    torch.manual_seed(0)
    module: transformers.PreTrainedModel = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in module.parameters():  # transformers draws them so small that all texts look alike
        parameter.data += 0.2 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    words = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_padding(length=16)  # as the files of real models have it
    tokenizer.enable_truncation(16)
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": number, "name": str(number), "path": f"{number}_{kind}" if number else "", "type": f"st.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32} | {f"pooling_mode_{mode}": mode == pooling for mode in modes})
    )
    limits = {"max_seq_length": WINDOW, "do_lower_case": lowercase}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    return module
