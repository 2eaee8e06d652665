"""The attention kernel alone: arithmetic of extend, bandwidth of decode, and what reading a shared prefix once saves.

    python benchmarks/gpu_attention.py
    python benchmarks/gpu_attention.py --part rule  # when a prefix is read once, and what each choice takes
    python benchmarks/gpu_attention.py --sweep      # launch parameters on a few shapes

Beside it torch's scaled_dot_product_attention (the fastest of its backends) on equal dense shapes. Each shape is
checked against it before it is timed; medians of CUDA events; decode in CUDA graphs, over buffers larger than the L2
cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench, do_bench_cudagraph

from spark_llm.engine.cuda.attention_plan import Device, Layout, Members, lay_out
from spark_llm.kernels.paged_attention import Launch, attend, merge_parts

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "gpu_attention.json"
HEADS = ((32, 8, 128), (32, 32, 128), (64, 8, 128), (32, 8, 64), (32, 32, 64))
SHARED_TILE = 128
MOST_CHECKED = 128  # queries of a row

Heads = tuple[int, int, int]  # query heads, kv heads, head size
Result = dict[str, Any]
# What the sweep tries: tiles of many queries stand and fall with registers, those of one row with loads in flight.
WIDE = [
    Launch(*o)
    for o in ((32, 4, 3, 128), (64, 4, 3), (64, 8, 3), (64, 8, 2, 128), (64, 8, 3, 128), (128, 8, 2), (128, 8, 2, 128))
]
NARROW = [Launch(*options) for options in itertools.product((32, 64, 128), (1, 2, 4), (2, 3, 5))]


class Case:
    """Rows over a pool of random K/V. starts, counts: tokens that each row has, and computes. rule: of the Device."""

    def __init__(
        self, heads: Heads, starts: list[int], counts: list[int], shared: int = 0, cascade: bool = True, **rule: int
    ) -> None:
        self.heads, self.kv_heads, self.dim = heads
        rows = len(starts)
        width = max(s + c for s, c in zip(starts, counts, strict=True))
        table = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
        np.random.default_rng(0).shuffle(table.reshape(-1))
        table[:, :shared] = table[0, :shared]
        self.table = torch.from_numpy(table).cuda()
        slots = rows * width
        self.k = torch.randn(slots, self.kv_heads, self.dim, device="cuda", dtype=torch.bfloat16)
        self.v = torch.randn_like(self.k)
        self.tokens = sum(counts)
        self.q = torch.randn(self.tokens, self.heads, self.dim, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        first = np.cumsum(counts) - np.array(counts)
        group = self.heads // self.kv_heads
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        device = Device(
            group=group, kv_heads=self.kv_heads, page_size=1, multiprocessors=processors, cascade=cascade,
            own_tile=max(16, group), shared_tile=SHARED_TILE, **rule,
        )  # fmt: skip
        is_short = np.array(counts) * group <= 32
        ends = np.zeros((int(is_short.sum()), 4), np.int64)
        ends[:, 0] = shared
        lanes = np.arange(rows)
        members = Members(
            lanes[is_short], first[is_short], np.array(counts)[is_short], np.array(starts)[is_short], ends
        )
        long_rows = np.stack((first, counts, lanes, starts), 1)[~is_short]
        self.layout: Layout = lay_out(members, long_rows, table, device)
        put = lambda values: torch.from_numpy(values).cuda()  # noqa: E731
        self.order, self.parts = put(self.layout.order), put(self.layout.parts)
        self.blocks = [
            (put(getattr(self.layout, n)), n) for n in ("long", "shared", "own") if len(getattr(self.layout, n))
        ]
        shape = (self.layout.most_parts, len(self.parts), self.heads)
        self.part_out = torch.empty(*shape, self.dim, device="cuda")
        self.part_lse = torch.empty(shape, device="cuda")
        self.tiles = {"own": device.own_tile, "shared": SHARED_TILE, "long": self.layout.long_tile}
        self.starts, self.counts = starts, counts

    def run(self, **options: Launch) -> None:
        """options: by kind of items; the usual ones for what is not named."""
        for items, name in self.blocks:
            attend(
                self.q, self.k, self.v, self.table, self.order if name == "shared" else None, items, self.out,
                self.part_out, self.part_lse, page_size=1, scale=self.dim**-0.5, tile=self.tiles[name],
                options=options.get(name),
            )  # fmt: skip
        if self.layout.most_parts > 1:
            merge_parts(self.part_out, self.part_lse, self.parts, self.out)

    def check(self, rows: int = 3) -> float:
        """Greatest error against torch's attention in float32, of the last queries of a few rows."""
        self.out.fill_(float("nan"))
        self.run()
        worst = 0.0
        first = np.cumsum(self.counts) - np.array(self.counts)
        group = self.heads // self.kv_heads
        for row in np.linspace(0, len(self.starts) - 1, rows).astype(int):
            length = self.starts[row] + self.counts[row]
            skipped = max(0, self.counts[row] - MOST_CHECKED)
            begin, end = first[row] + skipped, first[row] + self.counts[row]
            slots = self.table[row, :length].long()
            q = self.q[begin:end].transpose(0, 1).float()
            k, v = (t[slots].transpose(0, 1).float().repeat_interleave(group, 0) for t in (self.k, self.v))
            positions = torch.arange(length - (end - begin), length, device="cuda")
            seen = torch.arange(length, device="cuda")[None] <= positions[:, None]
            expected = scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1)
            error = (self.out[begin:end].float() - expected).abs().max().item()
            worst = max(worst, error if error == error else float("inf"))
        return worst

    @property
    def flops(self) -> float:
        pairs = sum(c * s + c * (c + 1) / 2 for s, c in zip(self.starts, self.counts, strict=True))
        return 4.0 * pairs * self.heads * self.dim

    @property
    def bytes(self) -> float:
        return 4.0 * self.kv_heads * self.dim * sum(s + c for s, c in zip(self.starts, self.counts, strict=True))


def dense_seconds(heads: Heads, rows: int, queries: int, keys: int) -> tuple[float, str]:
    """torch's attention on an equal dense shape, and its backend: causal from zero, or all queries over all keys."""
    n, kv, dim = heads
    q = torch.randn(rows, n, queries, dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(rows, kv, keys, dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    found: list[tuple[float, str]] = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                call = lambda: scaled_dot_product_attention(q, k, v, is_causal=queries == keys, enable_gqa=kv != n)  # noqa: E731
                call()
                found.append((do_bench(call, warmup=10, rep=40, return_mode="median") / 1e3, backend.name[:5]))
        except RuntimeError:
            continue
    return min(found, default=(float("nan"), "none"))


def name_of(heads: Heads) -> str:
    return "{}/{} x {}".format(*heads)


def seconds(call: Callable[[], Any], graph: bool = False) -> float:
    bench = do_bench_cudagraph if graph else do_bench
    return float(bench(call, rep=40, return_mode="median")) / 1e3


def limits() -> tuple[float, float]:
    """What the device reaches: bytes a second of a copy, FLOP a second of a bf16 product."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    copied = torch.empty_like(source)
    bandwidth = 2 * len(source) / seconds(lambda: copied.copy_(source))
    size = 8192
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    rate = 2 * size**3 / seconds(lambda: x @ x)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    return bandwidth, rate


def extend(heads: Heads, rows: int, start: int, count: int) -> Result:
    case = Case(heads, [start] * rows, [count] * rows)
    error = case.check()
    rate = case.flops / seconds(case.run)
    dense, backend = dense_seconds(heads, rows, count, start + count)
    # a dense call without a mask computes all pairs, ours only those seen
    pairs = rows * count * (start + count) if start else case.flops / (4 * heads[0] * heads[2])
    peer = 4.0 * pairs * heads[0] * heads[2] / dense
    print(
        f"extend {name_of(heads):12} {rows:4} x {count:5} over {start:5}: {rate / 1e12:6.0f} TFLOP/s, "
        f"{rate / peer:5.0%} of sdpa ({backend} {peer / 1e12:.0f}), error {error:.4f}"
    )
    return {"rows": rows, "start": start, "count": count, "tflops": rate / 1e12, "sdpa": peer / 1e12, "error": error}


def decode(heads: Heads, rows: int, context: int, bandwidth: float) -> Result:
    case = Case(heads, [context - 1] * rows, [1] * rows)
    error = case.check()
    rate = case.bytes / seconds(case.run, graph=True)
    dense, backend = dense_seconds(heads, rows, 1, context)
    peer = case.bytes / dense
    print(
        f"decode {name_of(heads):12} {rows:4} rows, {context:5} keys: {rate / 1e12:5.2f} TB/s, "
        f"{rate / bandwidth:5.0%} of copy (sdpa {backend} {peer / 1e12:.2f}), error {error:.4f}"
    )
    return {
        "rows": rows, "context": context, "tbs": rate / 1e12, "of_copy": rate / bandwidth, "sdpa": peer / 1e12,
        "error": error,
    }  # fmt: skip


def shared(heads: Heads, rows: int = 64, prefix: int = 2048, own: int = 32) -> Result:
    """One prefix read once, against the plain kernel over the same pages (in L2) and over pages of each row."""
    starts, counts = [prefix + own - 1] * rows, [1] * rows
    once, plain, distinct = (
        Case(heads, starts, counts, shared=prefix),
        Case(heads, starts, counts, shared=prefix, cascade=False),
        Case(heads, starts, counts),
    )
    error = once.check()
    taken, plain_taken, distinct_taken = (seconds(case.run, graph=True) for case in (once, plain, distinct))
    rate = 4.0 * heads[1] * heads[2] * (prefix + rows * own) / taken
    print(
        f"shared {name_of(heads):12} {rows:4} rows below {prefix:,}: {plain_taken / taken:.1f}x plain, "
        f"{distinct_taken / taken:.1f}x distinct pages, {taken * 1e6:.0f} us, {rate / 1e12:.2f} TB/s, error {error:.4f}"
    )
    return {"once": taken, "plain": plain_taken, "distinct": distinct_taken, "tbs": rate / 1e12, "error": error}


def rule() -> list[Result]:
    """Where reading a prefix once pays: the layout that the rule chooses, beside both that it chooses from."""
    results: list[Result] = []
    for heads in ((32, 8, 128), (64, 8, 128), (32, 8, 64)):
        for rows, prefix in itertools.product((2, 4, 16, 64, 512), (64, 256, 1024, 4096)):
            if rows * prefix > 1 << 20:
                continue
            arguments = (heads, [prefix + 31] * rows, [1] * rows, prefix)
            once, plain = Case(*arguments, min_saved=0), Case(*arguments, cascade=False)
            chosen = bool(len(Case(*arguments).layout.shared))
            taken, plain_taken = seconds(once.run, graph=True), seconds(plain.run, graph=True)
            loss = (taken if chosen else plain_taken) / min(taken, plain_taken) - 1
            results.append(
                {"kind": "rule", "heads": name_of(heads), "rows": rows, "prefix": prefix, "once": taken,
                 "plain": plain_taken, "chosen": "once" if chosen else "plain", "loss": loss}
            )  # fmt: skip
            print(
                f"rule   {name_of(heads):12} {rows:4} rows below {prefix:5}: once {taken * 1e6:6.1f} us, plain "
                f"{plain_taken * 1e6:6.1f} us, chosen {results[-1]['chosen']:5}, {loss:4.0%} over the faster",
                flush=True,
            )
    return results


EXTENDS = ((16, 0, 512), (4, 0, 4096), (1, 0, 16384), (128, 512, 64), (64, 2048, 64), (16, 8192, 256))
DECODES = ((256, 512), (128, 2048), (32, 8192), (4, 32768))


def measure() -> list[Result]:
    bandwidth, _ = limits()
    results: list[Result] = []
    for heads in HEADS:
        shape = {"heads": name_of(heads)}
        results.extend({"kind": "extend", **shape, **extend(heads, *rows)} for rows in EXTENDS)
        results.extend({"kind": "decode", **shape, **decode(heads, *rows, bandwidth)} for rows in DECODES)
        results.append({"kind": "shared", **shape, **shared(heads)})
    return results


def sweep() -> None:
    """The best launch parameters by kind of items, one kind of a step's items after the other."""
    cases: dict[str, Callable[[Heads], Case]] = {
        "extend 128 x 64 over 512": lambda h: Case(h, [512] * 128, [64] * 128),
        "extend 64 x 64 over 2048": lambda h: Case(h, [2048] * 64, [64] * 64),
        "extend 4 x 4096": lambda h: Case(h, [0] * 4, [4096] * 4),
        "decode 1024 x 640": lambda h: Case(h, [639] * 1024, [1] * 1024),
        "decode 128 x 2048": lambda h: Case(h, [2047] * 128, [1] * 128),
        "decode 4 x 32768": lambda h: Case(h, [32767] * 4, [1] * 4),
        "shared 2048 below 2048 + 80": lambda h: Case(h, [2048 + 79] * 2048, [1] * 2048, shared=2048),
    }
    for heads, (name, make) in itertools.product(((32, 8, 128), (32, 8, 64)), cases.items()):
        case = make(heads)
        graph = name.startswith(("decode", "shared"))
        usual = seconds(case.run, graph)
        rates = f"{case.flops / usual / 1e12:.0f} TFLOP/s, {case.bytes / usual / 1e12:.2f} TB/s"
        print(f"{heads} {name}: now {usual * 1e6:.0f} us ({rates})", flush=True)
        for _, kind in case.blocks:
            found = []
            for options in NARROW if kind == "own" else WIDE:
                try:
                    found.append((seconds(lambda c=case, k=kind, o=options: c.run(**{k: o}), graph), options))
                except OutOfResources:
                    continue
            best = "  ".join(f"{o}: {s * 1e6:.0f} us" for s, o in sorted(found)[:4])
            print(f"    {kind}, tile {case.tiles[kind]}: {best}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--part", choices=("table", "rule"), default="table")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
        return
    results = measure() if arguments.part == "table" else rule()
    if arguments.out.exists():
        results += [
            r for r in json.loads(arguments.out.read_text()) if (r["kind"] == "rule") != (arguments.part == "rule")
        ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
