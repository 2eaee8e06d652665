"""What FP8 gives and takes: the linear layers beside torch's scaled product, and answers beside bfloat16's.

    python benchmarks/gpu_fp8.py
    python benchmarks/gpu_fp8.py --part accuracy --models /path/to/model.gguf,1b

layers: one decoder layer of Llama-3.1-8B's shape as the engine runs it (norms, activation, products) under a CUDA
graph, in bfloat16, in FP8 with inputs quantised by a pass of their own, and in FP8 as it is, where norm and activation
write e4m3; and torch's four scaled products alone. "of torch": these over what the layer takes beside bfloat16's norms
and activation; aim 85 %. accuracy: logits and greedy answers in FP8 beside bfloat16, of the demo model on real prompts
and of random weights at 1B. Results are merged into artifacts/gpu_fp8.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_logits import answers_of, compared, engine_of, extended, forget, logits_of, prompts_of
from gpu_run_floor import median_seconds
from gpu_workload import SHAPES
from torch import Tensor

from spark_llm.engine.cuda.decoder import input_of
from spark_llm.engine.cuda.linear import DenseLinear, Fp8Linear, Linear
from spark_llm.kernels.activation import silu_and_mul
from spark_llm.kernels.norm import add_rms_norm
from spark_llm.kernels.quantize import quantize_fp8

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "gpu_fp8.json"
AIM = 0.85
ANSWER = 16  # tokens
TOKENS = (64, 512, 2048, 8192)

Result = dict[str, Any]


class UnfusedFp8Linear(Fp8Linear):
    """Quantises its input by itself: what the fused outputs spare."""

    __slots__ = ()
    takes_fp8 = False


class LayerProducts:
    """The norms, activation and products of a layer, without attention; ``linear`` makes the products."""

    def __init__(self, shape: dict[str, Any], make: Callable[[Tensor, None], Linear] | None, tokens: int) -> None:
        hidden, self.inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
        heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        sizes = {
            "qkv": ((heads + 2 * kv_heads) * dim, hidden), "o": (hidden, heads * dim),
            "gate_up": (2 * self.inner, hidden), "down": (hidden, self.inner),
        }  # fmt: skip
        draw = torch.Generator("cuda").manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, device="cuda").mul_(0.05).bfloat16()

        self.weights = {name: random(*size) for name, size in sizes.items()}
        self.linears = {name: make(weight, None) for name, weight in self.weights.items()} if make else {}
        self.residual, self.attended = random(tokens, hidden), random(tokens, heads * dim)
        self.gate_up, self.norm = random(tokens, 2 * self.inner), random(hidden) + 1

    def run(self) -> None:
        """As DeviceDecoder does, but for attention."""
        residual, linears, hidden = self.residual.clone(), self.linears, self.residual.shape[1]
        normed, scale = input_of(linears["qkv"], residual, hidden)
        add_rms_norm(self.residual, residual, self.norm, 1e-5, normed, scale)
        linears["qkv"](normed, scale)
        normed, scale = input_of(linears["gate_up"], residual, hidden)
        add_rms_norm(linears["o"](self.attended), residual, self.norm, 1e-5, normed, scale)
        gate_up = linears["gate_up"](normed, scale)
        inner, scale = input_of(linears["down"], gate_up, self.inner)
        silu_and_mul(gate_up, inner, scale)
        linears["down"](inner, scale)

    def between(self) -> None:
        """The bfloat16 norms and activation alone."""
        residual = self.residual.clone()
        normed = torch.empty_like(residual)
        for _ in range(2):
            add_rms_norm(self.residual, residual, self.norm, 1e-5, normed)
        silu_and_mul(self.gate_up, self.gate_up.new_empty(len(self.gate_up), self.inner))

    def scaled_products(self) -> Callable[[], None]:
        """torch's products alone, of inputs that are quantised already."""
        inputs = {"qkv": self.residual, "o": self.attended, "gate_up": self.residual}
        inputs["down"] = self.gate_up[:, : self.inner].contiguous()
        quantized = {name: quantize_fp8(x) for name, x in inputs.items()}
        linears = {name: Fp8Linear(weight, None) for name, weight in self.weights.items()}

        def products() -> None:
            for name, linear in linears.items():
                linear(*quantized[name])

        return products


def graphed_seconds(call: Callable[[], None]) -> float:
    """The median under a CUDA graph of ten calls, so that no launch is counted."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    return median_seconds(graph.replay) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="layers,accuracy")
    parser.add_argument("--shape", default="8b", help="of the layers")
    parser.add_argument("--models", default="default,1b", help="of the accuracy table")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("there is no GPU that multiplies in FP8: nothing is measured")
        return
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for part in arguments.part.split(","):
        begun = time.perf_counter()
        found = (
            layers(arguments.shape) if part == "layers" else accuracy(arguments.models.split(","), arguments.prompts)
        )
        results[part] = {"rows": found, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
        results[part]["seconds"] = time.perf_counter() - begun
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1))
        print(report({part: results[part]}), flush=True)


@torch.inference_mode()
def layers(shape: str) -> list[Result]:
    found = []
    for tokens in TOKENS:
        times = {}
        for name, make in (("bfloat16", DenseLinear), ("unfused", UnfusedFp8Linear), ("fp8", Fp8Linear)):
            times[name] = graphed_seconds(LayerProducts(SHAPES[shape], make, tokens).run)
        layer = LayerProducts(SHAPES[shape], None, tokens)
        times["between"] = graphed_seconds(layer.between)
        times["torch"] = graphed_seconds(layer.scaled_products())
        found.append({"shape": shape, "tokens": tokens} | times)
    return found


def accuracy(models: list[str], count: int) -> list[Result]:
    """Of each model; the answers that positions follow are bfloat16's."""
    found = []
    for model in models:
        prompts = prompts_of(model, count)
        engine = engine_of(model, device="cuda", dtype="bfloat16")
        expected = answers_of(engine, prompts, ANSWER)
        sequences = extended(prompts, expected, (0, ANSWER // 2))
        logits = logits_of(engine, sequences)
        forget(engine)
        engine = engine_of(model, device="cuda", dtype="bfloat16", quantization="fp8")
        answers = answers_of(engine, prompts, ANSWER)
        entry = compared(logits_of(engine, sequences), logits)
        forget(engine)
        agreeing = sum(
            a == b for one, other in zip(answers, expected, strict=True) for a, b in zip(one, other, strict=True)
        )
        same = sum(one == other for one, other in zip(answers, expected, strict=True))
        found.append(
            {"model": model, "rows": len(prompts), "positions": len(sequences), "answers": same,
             "tokens": agreeing / (len(prompts) * ANSWER)} | entry
        )  # fmt: skip
    return found


def report(results: dict[str, Any]) -> str:
    lines = []
    if "layers" in results:
        lines.append(
            f"{'a layer of':12}{'tokens':>8}{'bfloat16':>10}{'unfused':>10}{'fp8':>8}{'torch':>8} us  of torch"
        )
        for row in results["layers"]["rows"]:
            share = row["torch"] / (row["fp8"] - row["between"])
            times = (row[name] * 1e6 for name in ("bfloat16", "unfused", "fp8", "torch"))
            widths = (10, 10, 8, 8)
            columns = "".join(f"{value:{width}.0f}" for value, width in zip(times, widths, strict=True))
            verdict = "ok" if share >= AIM else "MISS"
            lines.append(f"{row['shape']:12}{row['tokens']:8}{columns}{share:12.0%}  {verdict}")
    lines += [
        f"fp8 beside bfloat16, {row['model']}: logits off by {row['relative']:.1%} of their spread (RMS), at most "
        f"{row['largest']:.2f}; the same token after {row['same']:.1%} of {row['positions']} texts, in the others "
        f"bfloat16's two greatest are at most {row['gap_of_others']:.2f} apart; {row['answers']} of {row['rows']} "
        f"answers and {row['tokens']:.1%} of their tokens are the same"
        for row in results.get("accuracy", {}).get("rows", [])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
