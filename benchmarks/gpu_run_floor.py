"""What the GPU can do at best on a model's shape: linear layers alone, a copy, a product. One JSON line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from gpu_workload import SHAPES, VOCABULARY

TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b")
    shape = SHAPES[parser.parse_args().shape]
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads, layers = shape["num_attention_heads"], shape["num_key_value_heads"], shape["num_hidden_layers"]
    sizes = [(hidden, (heads + 2 * kv_heads) * dim), (heads * dim, hidden), (hidden, 2 * inner), (inner, hidden)]
    inputs = [torch.randn(TOKENS, k, device="cuda", dtype=torch.bfloat16) for k, _ in sizes]
    weights = [[torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for k, n in sizes] for _ in range(4)]

    def linear_layers() -> None:
        for layer in range(layers):
            for x, weight in zip(inputs, weights[layer % 4], strict=True):
                torch.nn.functional.linear(x, weight)

    seconds = median_seconds(linear_layers)
    flops = 2 * TOKENS * layers * sum(k * n for k, n in sizes)
    head = torch.randn(VOCABULARY, hidden, device="cuda", dtype=torch.bfloat16)
    last = torch.randn(4096, hidden, device="cuda", dtype=torch.bfloat16)
    head_seconds = median_seconds(lambda: torch.nn.functional.linear(last, head)) / 4096
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source))
    print(
        json.dumps(
            {
                "engine": "floor",
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "tokens_per_second": TOKENS / seconds,
                "tflops": flops / seconds / 1e12,
                "head_seconds_per_row": head_seconds,
                "copy_bytes_per_second": 2 * (1 << 32) / copy_seconds,
                "kv_bytes_per_token": 4 * layers * kv_heads * dim,
            }
        )
    )


def median_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The median of ``repeats`` runs after two warm ones."""
    times = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
