"""The floor: the model's linear layers alone, at batches of 512 and more, with each of torch's float products.

No attention, norms, head or cache: what remains when everything else is free. ``packed`` is oneDNN with its own
weight layout; ``plain`` is ``F.linear``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Job, Meter

BATCHES = (512, 1024)
SECONDS = 4.0  # of repeating each product; the best time counts


def linear_shapes(config: dict[str, int]) -> list[tuple[int, int]]:
    """(out, in) of one layer's products, q/k/v and gate/up joined as engines join them."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    wide = config["intermediate_size"]
    return [((heads + 2 * kv_heads) * head, hidden), (hidden, heads * head), (2 * wide, hidden), (hidden, wide)]


def product(weight: torch.Tensor, batch: int, packed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    if not packed:
        return lambda x: F.linear(x, weight)
    inner = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, inner, None, "none", [], "")


@torch.inference_mode()
def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.dtype)
    config = json.loads((Path(job.model) / "config.json").read_text())
    shapes = linear_shapes(config)
    weights = [[torch.randn(n, k).mul_(0.02).to(dtype) for n, k in shapes] for _ in range(config["num_hidden_layers"])]
    result: dict[str, object] = {}
    kinds = ["plain", "packed"]
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kinds.remove("packed")  # oneDNN refuses bfloat16 on a processor without its instructions
    for kind in kinds:
        for batch in BATCHES:
            layers = [[product(w, batch, kind == "packed") for w in layer] for layer in weights]
            inputs = [torch.randn(batch, k).to(dtype) for _, k in shapes]

            def once(layers=layers, inputs=inputs) -> None:
                for layer in layers:
                    for multiply, x in zip(layer, inputs, strict=True):
                        multiply(x)

            started = time.perf_counter()
            once()
            first = time.perf_counter() - started
            meter = Meter()
            best = float("inf")
            for _ in range(max(1, int(SECONDS / first))):
                started = time.perf_counter()
                once()
                best = min(best, time.perf_counter() - started)
            wall, cpu, _ = meter.stop()
            result[f"{kind} {batch}"] = {"tokens_per_second": batch / best, "busy_cores": cpu / wall}
            if first > SECONDS:
                break  # no fast product for this number format: larger batches would only take longer
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
