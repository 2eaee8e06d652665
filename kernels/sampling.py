"""From logits to tokens: greedy, or temperature with top-k and top-p and a draw from a seed of the row.

Tokens are ordered by logit, equal ones by id; top-k and top-p each keep the first of them. Where they end is found by
bisection over the bits of the logits, so exactly and in as many passes whatever the logits are. The noise of a token is
a function of seed, position and token alone (Philox, Salmon et al., SC 2011), so that neither batch nor order changes
a draw; the greatest sum of logit and noise wins (the Gumbel-max trick).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program reads at a time
_QUARTER = tl.constexpr(BLOCK // 4)  # Philox gives four words a counter
_PROGRAMS = 1024  # that keep a GPU busy
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}  # of a logit widened to float32; even


def sample(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, seed: Tensor | None,
    position: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """out = a token of each row. logits: [S, vocabulary], contiguous; out: int32 [S].

    temperature, top_p: float32 [S]; top_k, position: int32 [S]; seed: int64 [S]. temperature 0 is greedy: the greatest
    logit, of equal ones the first. top_k 0 and top_p 1 keep all tokens. All None: every row is greedy.
    A NaN counts as the smallest logit.
    """
    rows, vocabulary = logits.shape
    if not rows:
        return
    blocks = triton.cdiv(vocabulary, BLOCK)
    chunk = triton.cdiv(blocks, min(blocks, triton.cdiv(_PROGRAMS, rows))) * BLOCK
    parts = triton.cdiv(vocabulary, chunk)
    part_value = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    part_id = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    padded = triton.next_power_of_2(blocks)  # whatever the rows: one kernel a vocabulary
    _greatest[(rows, parts)](logits, part_value, part_id, vocabulary, chunk, BLOCK=BLOCK, num_warps=8)
    _join[(rows,)](part_value, part_id, best, out, best, parts, ONLY_DRAWS=False, PARTS=padded, num_warps=1)
    if temperature is None:
        return
    cut = torch.empty(rows, dtype=torch.int64, device=logits.device)
    last_tie = torch.empty(rows, dtype=torch.int32, device=logits.device)
    unused = _UNUSED_BITS[logits.dtype]
    _cut[(rows,)](
        logits, best, temperature, top_k, top_p, cut, last_tie, vocabulary, UNUSED=unused, BLOCK=BLOCK, num_warps=8
    )
    _draw[(rows, parts)](
        logits, best, temperature, seed, position, cut, last_tie, part_value, part_id, vocabulary, chunk,
        UNUSED=unused, num_warps=8,
    )  # fmt: skip
    _join[(rows,)](part_value, part_id, best, out, temperature, parts, ONLY_DRAWS=True, PARTS=padded, num_warps=1)


@triton.jit
def _load(logits, row, at, inside):
    """A NaN, which no comparison orders, becomes the smallest."""
    value = tl.load(logits + row + at, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(value == value, value, -float("inf"))


@triton.jit
def _greatest(logits, part_value, part_id, vocabulary, chunk, BLOCK: tl.constexpr):
    """The greatest logit of a chunk of a row, and the first token that has it."""
    row = tl.program_id(0).to(tl.int64) * vocabulary
    start = tl.program_id(1) * chunk
    offsets = tl.arange(0, BLOCK)
    at = start + offsets
    value = _load(logits, row, at, at < vocabulary)
    for begin in range(start + BLOCK, tl.minimum(start + chunk, vocabulary), BLOCK):
        here = begin + offsets
        other = _load(logits, row, here, here < vocabulary)
        at = tl.where(other > value, here, at)
        value = tl.maximum(value, other)
    _store_part(value, at, part_value, part_id)


@triton.jit
def _store_part(value, at, part_value, part_id):
    greatest = tl.max(value, 0)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(part_value + part, greatest)
    tl.store(part_id + part, tl.min(tl.where(value == greatest, at, 2147483647), 0))


@triton.jit(do_not_specialize=["parts"])
def _join(part_value, part_id, best, out, temperature, parts, ONLY_DRAWS: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0)
    if ONLY_DRAWS:
        greedy = tl.load(temperature + row) <= 0
        if greedy:
            return
    at = tl.arange(0, PARTS)
    inside = at < parts
    value = tl.load(part_value + row * parts + at, mask=inside, other=-float("inf"))
    token = tl.load(part_id + row * parts + at, mask=inside, other=2147483647)
    greatest = tl.max(value, 0)
    tl.store(out + row, tl.min(tl.where(value == greatest, token, 2147483647), 0))
    if not ONLY_DRAWS:
        tl.store(best + row, greatest)


@triton.jit
def _scaled(value, best, temperature):
    """At most 0, so that no temperature overflows it; a difference of infinities is no number."""
    return tl.where(value == best, 0.0, (value - best) / temperature)


@triton.jit
def _key(value, UNUSED: tl.constexpr):
    """An unsigned number in the order of the logits; the two zeros have one."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000) >> UNUSED


@triton.jit
def _cut(logits, best, temperature, top_k, top_p, cut, last_tie, vocabulary, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """Where a row's kept tokens end: those with a key above ``cut`` stay, those with this key up to ``last_tie``."""
    index = tl.program_id(0)
    heat = tl.load(temperature + index)
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    if heat <= 0:
        return
    row = index.to(tl.int64) * vocabulary
    most = tl.load(best + index)
    key = tl.zeros((), tl.uint32)
    ties = 2147483647.0
    limited = (k > 0) & (k < vocabulary)
    if limited:
        key = _search(logits, row, most, heat, k.to(tl.float32), vocabulary, True, UNUSED, BLOCK)
        above, _ = _above(logits, row, most, heat, key, vocabulary, True, UNUSED, BLOCK)
        ties = k - above
    if p < 1:
        above, each = _above(logits, row, most, heat, key, vocabulary, False, UNUSED, BLOCK)
        whole = above
        if limited:
            whole += ties * each
        # the first token alone weighs 1: a target below keeps just that one
        target = tl.maximum(p * whole, 1e-6)
        deeper = _search(logits, row, most, heat, target, vocabulary, False, UNUSED, BLOCK)
        if deeper >= key:
            above, each = _above(logits, row, most, heat, deeper, vocabulary, False, UNUSED, BLOCK)
            wanted = tl.maximum(tl.ceil((target - above) / each), 1.0)
            if deeper > key:
                ties = wanted
            else:
                ties = tl.minimum(ties, wanted)
            key = deeper
        limited = True
    tie = 2147483647
    if limited:
        tie = _find_tie(logits, row, key, ties, vocabulary, UNUSED, BLOCK)
    tl.store(cut + index, key.to(tl.int64))
    tl.store(last_tie + index, tie)


@triton.jit
def _weight(value, most, heat, COUNTS: tl.constexpr):
    if COUNTS:
        return tl.where(value == value, 1.0, 0.0)
    return tl.exp(_scaled(value, most, heat))


@triton.jit
def _search(
    logits, row, most, heat, target, vocabulary, COUNTS: tl.constexpr, UNUSED: tl.constexpr, BLOCK: tl.constexpr
):
    """The greatest key such that tokens from it on count, or weigh, at least ``target``: two of its bits a pass.

    The sums of a pass are monotone in the key also as they are rounded, because they add in one order.
    """
    offsets = tl.arange(0, BLOCK)
    key = tl.zeros((), tl.uint32)
    unit = tl.full((), 1 << (30 - UNUSED), tl.uint32)
    for _ in range((32 - UNUSED) // 2):
        one, two, three = key + unit, key + unit * 2, key + unit * 3
        sum_one = tl.zeros((BLOCK,), tl.float32)
        sum_two = tl.zeros((BLOCK,), tl.float32)
        sum_three = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, vocabulary, BLOCK):
            at = begin + offsets
            inside = at < vocabulary
            value = _load(logits, row, at, inside)
            weight = tl.where(inside, _weight(value, most, heat, COUNTS), 0.0)
            keys = _key(value, UNUSED)
            sum_one += tl.where(keys >= one, weight, 0.0)
            sum_two += tl.where(keys >= two, weight, 0.0)
            sum_three += tl.where(keys >= three, weight, 0.0)
        if tl.sum(sum_three, 0) >= target:
            key = three
        elif tl.sum(sum_two, 0) >= target:
            key = two
        elif tl.sum(sum_one, 0) >= target:
            key = one
        unit = unit >> 2
    return key


@triton.jit
def _above(logits, row, most, heat, key, vocabulary, COUNTS: tl.constexpr, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens have a greater key, or what they weigh together; what one with this very key weighs."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    each = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        at = begin + offsets
        inside = at < vocabulary
        value = _load(logits, row, at, inside)
        weight = tl.where(inside, _weight(value, most, heat, COUNTS), 0.0)
        keys = _key(value, UNUSED)
        total += tl.where(keys > key, weight, 0.0)
        each = tl.where(keys == key, tl.maximum(each, weight), each)
    return tl.sum(total, 0), tl.max(each, 0)


@triton.jit
def _find_tie(logits, row, key, ties, vocabulary, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """The last of the first ``ties`` tokens with this key; -1 if there is none."""
    offsets = tl.arange(0, BLOCK)
    seen = 0.0
    found = -1
    for begin in range(0, vocabulary, BLOCK):
        at = begin + offsets
        inside = at < vocabulary
        same = inside & (_key(_load(logits, row, at, inside), UNUSED) == key)
        here = tl.sum(same.to(tl.float32), 0)
        if (seen < ties) & (here > 0):
            rank = seen + tl.cumsum(same.to(tl.float32), 0)
            found = tl.max(tl.where(same & (rank <= ties), at, -1), 0)
        seen += here
    return found


@triton.jit
def _draw(
    logits, best, temperature, seed, position, cut, last_tie, part_value, part_id, vocabulary, chunk,
    UNUSED: tl.constexpr,
):  # fmt: skip
    """The greatest sum of logit and noise of a chunk of a row's kept tokens."""
    index = tl.program_id(0)
    heat = tl.load(temperature + index)
    if heat <= 0:
        return
    row = index.to(tl.int64) * vocabulary
    most = tl.load(best + index)
    key = tl.load(cut + index).to(tl.uint32)
    tie = tl.load(last_tie + index)
    numbers = tl.load(seed + index).to(tl.uint64, bitcast=True)
    place = tl.load(position + index).to(tl.uint32, bitcast=True)
    start = tl.program_id(1) * chunk
    offsets = tl.arange(0, _QUARTER)
    value = tl.full((_QUARTER,), -float("inf"), tl.float32)
    token = start + offsets
    nothing = tl.zeros((_QUARTER,), tl.uint32)
    low, high = (numbers & 0xFFFFFFFF).to(tl.uint32), (numbers >> 32).to(tl.uint32)
    for begin in range(start, tl.minimum(start + chunk, vocabulary), 4 * _QUARTER):
        counter = (begin // 4 + offsets).to(tl.uint32)
        words = tl.philox_impl(counter, nothing + place, nothing, nothing, low, high)
        for quarter in tl.static_range(4):
            at = begin + quarter * _QUARTER + offsets
            inside = at < vocabulary
            logit = _load(logits, row, at, inside)
            keys = _key(logit, UNUSED)
            kept = inside & ((keys > key) | ((keys == key) & (at <= tie)))
            drawn = tl.where(kept, _scaled(logit, most, heat) + _gumbel(words[quarter]), -float("inf"))
            token = tl.where(drawn > value, at, token)
            value = tl.maximum(value, drawn)
    _store_part(value, token, part_value, part_id)


@triton.jit
def _gumbel(bits):
    """-log(-log(1 - u)) of u = (bits + 1/2) / 2**32, precise where u is small: there are the winners."""
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))
    exact = -tl.log(tl.maximum(1.0 - u, 5.9604644775390625e-08))
    return -tl.log(tl.where(u < 0.00390625, series, exact))
