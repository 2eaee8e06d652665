"""Whether a GPU answers as a CPU does, how far bfloat16 is from it, and what the deterministic mode keeps and costs.

    python benchmarks/gpu_exact.py
    python benchmarks/gpu_exact.py --part float32,bfloat16 --model /path/to/model.gguf

float32: greedy answers to real prompts of the demo model, CUDA graphs, shared prefixes and all, beside the CPU
engine's: token for token, but where the CPU's two greatest logits are within 1e-4. bfloat16: logits after prompts and
after parts of answers beside the CPU's float32, and beside them those of the CPU's decoder in bfloat16, plain torch,
which shows what the format itself costs; bound: a tenth more than that (RMS). deterministic: answers and logits
of a row alone and among all others, bit by bit (beside the usual mode, which does not promise it). cost: rows a second
of both modes at 1B.
Results are merged into artifacts/gpu_exact.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_logits import Ints, answers_of, compared, engine_of, extended, forget, logits_of, prompts_of
from gpu_run_ours import run
from gpu_workload import WORKLOADS

from spark_llm.engine import loading
from spark_llm.engine.core import Engine

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "gpu_exact.json"
ANSWER = 16  # tokens
CLOSE = 1e-4  # two logits that float32 sums in another order may swap
BOUND = 1.1  # of bfloat16's error on the GPU over that of plain torch
SCALED = {
    "A": replace(WORKLOADS["A"], rows=1024, levels=((32, 512),)),
    "E": replace(WORKLOADS["E"], rows=128),
}

Result = dict[str, Any]


class Reference:
    """The CPU engine in float32, asked once."""

    def __init__(self, model: str, count: int) -> None:
        self.prompts = prompts_of(model, count)
        self.engine = engine_of(model, device="cpu", dtype="float32")
        self.answers = answers_of(self.engine, self.prompts, ANSWER)

    def gap(self, prompt: Ints, answer: list[int]) -> float:
        """How far the two greatest logits after a part of an answer are apart."""
        one, other = logits_of(self.engine, extended([prompt], [answer], (len(answer),)))[0].topk(2).values.tolist()
        return float(one - other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="float32,bfloat16,deterministic,cost")
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--device", default="cuda", help="cpu tries the script, not a GPU")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU: nothing is measured")
        return
    results: dict[str, Result] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    parts = arguments.part.split(",")
    reference = Reference(arguments.model, arguments.prompts) if {"float32", "bfloat16"} & set(parts) else None
    for part in parts:
        begun = time.perf_counter()
        if part in ("float32", "bfloat16"):
            assert reference is not None
            found = (exact if part == "float32" else rounded)(reference, arguments)
        else:
            found = deterministic(arguments) if part == "deterministic" else cost(arguments)
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
        results[part] = found | {"device": device, "torch": torch.__version__, "seconds": time.perf_counter() - begun}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1))
        print(report({part: results[part]}), flush=True)


def exact(reference: Reference, arguments: argparse.Namespace) -> Result:
    engine = engine_of(arguments.model, device=arguments.device, dtype="float32")
    answers = answers_of(engine, reference.prompts, ANSWER)
    sequences = extended(reference.prompts, reference.answers, (0,))
    logits = compared(logits_of(engine, sequences), logits_of(reference.engine, sequences))
    forget(engine)
    gaps = []
    for prompt, found, expected in zip(reference.prompts, answers, reference.answers, strict=True):
        if found != expected:
            at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
            gaps.append(reference.gap(prompt, expected[:at]))
    return {"rows": len(answers), "tokens": ANSWER, "different": len(gaps), "gaps": gaps} | logits


def rounded(reference: Reference, arguments: argparse.Namespace) -> Result:
    engine = engine_of(arguments.model, device=arguments.device, dtype="bfloat16")
    answers = answers_of(engine, reference.prompts, ANSWER)
    sequences = extended(reference.prompts, reference.answers, (0, ANSWER // 2))
    expected = logits_of(reference.engine, sequences)
    found = compared(logits_of(engine, sequences), expected)
    forget(engine)
    with mock.patch.object(loading, "fastest_dtype", return_value=torch.bfloat16):  # even where that is slow
        plain = engine_of(arguments.model, device="cpu", dtype="bfloat16")
    of_torch = compared(logits_of(plain, sequences), expected)
    pairs = zip(answers, reference.answers, strict=True)
    return {
        "rows": len(answers), "tokens": ANSWER, "answers": sum(a == b for a, b in pairs),
        "torch_relative": of_torch["relative"], "torch_largest": of_torch["largest"],
    } | found  # fmt: skip


def deterministic(arguments: argparse.Namespace) -> Result:
    """Rows whose answer or logits differ, alone and together, in both modes."""
    prompts = prompts_of(arguments.model, arguments.prompts)
    found: Result = {"rows": len(prompts)}
    for mode in (True, False):
        engine = engine_of(arguments.model, device=arguments.device, dtype="bfloat16", deterministic=mode)
        together = answers_of(engine, prompts, ANSWER)
        engine.scheduler.cache.clear()
        logits = logits_of(engine, prompts)
        alone = [_alone(engine, lambda e, p=prompt: answers_of(e, [p], ANSWER)[0]) for prompt in prompts]
        rows = torch.stack([_alone(engine, lambda e, p=prompt: logits_of(e, [p])[0]) for prompt in prompts])
        forget(engine)
        found["deterministic" if mode else "usual"] = {
            "answers": sum(one != other for one, other in zip(together, alone, strict=True)),
            "logits": int((logits != rows).any(1).sum()),
        }
    return found


def _alone(engine: Engine, ask: Callable[[Engine], Any]) -> Any:
    engine.scheduler.cache.clear()
    return ask(engine)


def cost(arguments: argparse.Namespace) -> Result:
    found: Result = {}
    for mode in (False, True):
        settings = {"kv_cache_memory": 0, "max_running_rows": 0} if arguments.device == "cuda" else {}
        engine = engine_of("1b", device=arguments.device, dtype="bfloat16", deterministic=mode, **settings)
        prompts: list[Any] = WORKLOADS["A"].prompts(seed=99)[:256]
        run(engine, prompts, 8, True)
        for name, workload in SCALED.items():
            prompts, times = list(workload.prompts()), []
            for _ in range(2):
                engine.scheduler.cache.clear()
                times.append(run(engine, prompts, workload.out, True)[0])
            found.setdefault(name, {})["deterministic" if mode else "usual"] = workload.rows / min(times)
        forget(engine)
    return found


def report(results: dict[str, Result]) -> str:
    lines = []
    if found := results.get("float32"):
        far = sum(gap > CLOSE for gap in found["gaps"])
        lines.append(
            f"{'MISS' if far else 'ok  '} float32: {found['rows'] - found['different']} of {found['rows']} answers of "
            f"{found['tokens']} tokens are the CPU's, {far} differ where its logits are more than {CLOSE} apart; "
            f"logits differ by at most {found['largest']:.1e}"
        )
    if found := results.get("bfloat16"):
        bound = BOUND * found["torch_relative"]
        verdict = "ok  " if found["relative"] <= bound else "MISS"
        lines.append(
            f"{verdict} bfloat16: logits are off by {found['relative']:.2%} of their spread (RMS; plain torch in "
            f"bfloat16 {found['torch_relative']:.2%}), at most {found['largest']:.2f}; the greatest is the same in "
            f"{found['same']:.1%}, in the others the CPU's two are at most {found['gap_of_others']:.2f} apart; "
            f"{found['answers']} of {found['rows']} answers of {found['tokens']} tokens are the CPU's"
        )
    if found := results.get("deterministic"):
        for mode in ("deterministic", "usual"):
            answers, logits = found[mode]["answers"], found[mode]["logits"]
            verdict = "    " if mode == "usual" else "MISS" if answers or logits else "ok  "
            lines.append(
                f"{verdict} {mode}: alone and among {found['rows']} rows, {answers} answers and {logits} rows of "
                "logits are not the same bits"
            )
    for name, rates in results.get("cost", {}).items():
        if name in SCALED:
            ratio = rates["usual"] / rates["deterministic"]
            lines.append(
                f"     deterministic costs {ratio:.2f}x at 1B on {name} ({rates['deterministic']:.0f} rows/s, usual "
                f"{rates['usual']:.0f})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
