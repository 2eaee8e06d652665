"""What the GPU benchmark runs: rows of token ids below trees of shared prefixes, and the shapes of two models."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

VOCABULARY = 128_256
FOLDER = Path(tempfile.gettempdir()) / "spark-llm-shapes"  # of the models' configurations
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "torch_dtype": "bfloat16",
}
_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_scaling": _ROPE | {"factor": 8.0},
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": _ROPE | {"factor": 32.0},
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": _ROPE | {"factor": 8.0},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """``rows`` rows. levels: (distinct prefixes, tokens) from the root down; own, out: tokens of each row."""

    name: str
    about: str
    rows: int
    levels: tuple[tuple[int, int], ...]
    own: int
    out: int

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return sum(length for _, length in self.levels) + self.own

    @property
    def unique_tokens(self) -> int:
        """Tokens that a perfect prefix cache computes: the last one of an answer is never computed."""
        return sum(count * length for count, length in self.levels) + self.rows * (self.own + self.out - 1)

    def prompts(self, seed: int = 0) -> list[Ints]:
        """Rows in prefix order."""
        rng = np.random.default_rng(seed)
        levels = [rng.integers(1000, 127_000, (count, length), dtype=np.int32) for count, length in self.levels]
        own = rng.integers(1000, 127_000, (self.rows, self.own), dtype=np.int32)
        return [
            np.concatenate([*(level[row * len(level) // self.rows] for level in levels), own[row]])
            for row in range(self.rows)
        ]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("A", "128 prefixes x 512, 64 own, 16 out", 4096, ((128, 512),), 64, 16),
        Workload("B", "the same, 1 out (classification)", 4096, ((128, 512),), 64, 1),
        Workload("C", "1 prefix x 2,048, 64 own, 32 out", 4096, ((1, 2048),), 64, 32),
        Workload("D", "tree of 8, 64, 512 x 256, 64 own, 16 out", 4096, ((8, 256), (64, 256), (512, 256)), 64, 16),
        Workload("E", "no sharing, 576 own, 128 out", 1024, (), 576, 128),
        Workload("t", "for tests: 4 prefixes x 48, 8 own, 4 out", 64, ((4, 48),), 8, 4),
    )
}


def in_order(prompts: list[Ints], order: str, seed: int = 1) -> list[Ints]:
    """``sorted`` as they are, ``shuffled`` at random."""
    if order == "sorted":
        return prompts
    places = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[place] for place in places]


def orders_of(workload: Workload, arguments: argparse.Namespace) -> list[str]:
    """The orders in which a runner runs ``workload``, one after the other."""
    orders: list[str] = arguments.orders.split(",")
    repeat = 1 if workload.name in arguments.once.split(",") else arguments.repeat
    return repeat * [o for o in orders if o != "shuffled" or workload.name in arguments.shuffled.split(",")]


def runner_arguments(description: str | None) -> argparse.ArgumentParser:
    """What the runners of all engines are told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--workloads", default="A,B")
    parser.add_argument("--orders", default="sorted")
    parser.add_argument("--shuffled", default="A,B,C,D,E")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--once", default="")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    return parser


def write_model(shape: str, folder: Path) -> Path:
    """A folder with the config.json of ``shape``; weights are drawn at random by whoever loads it."""
    path = folder / f"llama-{shape}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(_LLAMA | SHAPES[shape], indent=1))
    return path
