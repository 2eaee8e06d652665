"""Constrained rows on the GPU's runner, kernels and all: the answers and confidences of the CPU's, token by token."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import test_cuda_engine
import torch
from llguidance import LLMatcher, LLTokenizer
from test_cuda_engine import VOCABULARY, Model, requests
from torch import Tensor

from spark_llm.engine.constraints.grammar import Grammar
from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.constraints.step import StepChoices
from spark_llm.engine.cuda import chooser
from spark_llm.engine.cuda import runner as runner_module
from spark_llm.engine.cuda.chooser import Chooser, HostChoices, lay_choices
from spark_llm.engine.cuda.inputs import Staging
from spark_llm.engine.cuda.linear import InvariantLinear
from spark_llm.engine.cuda.ranks import ALONE, Ranks
from spark_llm.engine.cuda.sampler import Sampler, Sampling
from spark_llm.engine.cuda.step import HostStep, lay_flat
from spark_llm.engine.request import Completion, Request

model = test_cuda_engine.model  # a fixture

EOS = 1
ALPHABET = b"""<>abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 {}[]",:.;-_()!?'+*/=%$#@&|~^`"""


class Bytes:
    """Tokens 0 and 1 are special, then a byte each, then a few pairs: what llguidance wants to know of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = None
    special_token_ids = (0, EOS)
    is_tokenizer_wrapper = True

    def __init__(self) -> None:
        pairs = [b'{"', b'":', b", ", b"es", b"an"]
        self.tokens = [b"\xff<0>", b"\xff<1>", *(bytes([byte]) for byte in ALPHABET), *pairs]
        self.tokens += [b"\xff<%d>" % i for i in range(len(self.tokens), VOCABULARY)]

    def __call__(self, text: str) -> list[int]:
        return [2 + ALPHABET.index(byte) for byte in text.encode()]


@pytest.fixture(scope="module")
def constraints() -> list[Any]:
    tokenizer = LLTokenizer(Bytes(), eos_token=EOS)  # type: ignore[arg-type]
    regex = Grammar(tokenizer, LLMatcher.grammar_from_regex("[a-c]{2,3}(, [0-9])?"), "regular expression")
    labels = Labels(["a", "b", "c", "c d"], [(10, 11, 12), (10, 11, 14), (20,), (20, 21)], (EOS,))
    return [regex, labels, None]


def asked(constraints: Sequence[Any], rows: int, **options: Any) -> list[Request]:
    found = requests(rows, 5, **options)
    for i, request in enumerate(found):
        request.constraint = constraints[i % len(constraints)]
    return found


def answer(engine: Any, wanted: list[Request]) -> list[Completion]:
    for request in wanted:
        engine.add(request)
    found: dict[int, Completion] = {}
    while engine.has_work():
        found |= {completion.id: completion for completion in engine.step()}
    return [found[request.id] for request in wanted]


def same(answers: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(answers, expected, strict=True):
        assert (ours.output, ours.text, ours.error) == (theirs.output, theirs.text, theirs.error)
        assert ours.confidence == (None if theirs.confidence is None else pytest.approx(theirs.confidence, abs=1e-4))


def test_answers_are_those_of_the_cpu(
    model: Callable[[str], Model], constraints: list[Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[HostStep] = []

    def recorded(*arguments: Any) -> HostStep:
        steps.append(lay_flat(*arguments))
        return steps[-1]

    monkeypatch.setattr(runner_module, "lay_flat", recorded)
    tested = model("qwen2")
    expected = answer(tested.cpu_engine(), asked(constraints, 5))
    assert any(completion.confidence for completion in expected)
    assert any(completion.error is None and completion.output for completion in expected[::3])
    engine = tested.device_engine(device, page_size=4)
    same(answer(engine, asked(constraints, 5)), expected)
    assert engine.stats().refused_tokens, "a random model does not keep to a regular expression by itself"
    assert any(len(step.told) and step.only_decodes for step in steps), "a row that went back decodes"


def test_steps_of_choices_only_read_the_candidates(
    model: Callable[[str], Model], constraints: list[Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = model("qwen2")
    seen: list[int] = []
    choose_listed = Chooser.choose_listed

    def recorded(self: Chooser, logits: Tensor, choices: Any) -> Any:
        seen.append(logits.shape[1])
        return choose_listed(self, logits, choices)

    monkeypatch.setattr(Chooser, "choose_listed", recorded)
    expected = answer(tested.cpu_engine(), asked(constraints[1:2], 3))
    same(answer(tested.device_engine(device, cascade=False), asked(constraints[1:2], 3)), expected)
    assert max(seen) <= 3


def test_the_deterministic_mode_reads_all_logits(
    model: Callable[[str], Model],
    constraints: list[Any],
    device: str,
) -> None:
    engine = model("qwen2").device_engine(device, cascade=False, linear=InvariantLinear)
    runner: Any = engine.runner
    assert not runner.decoder.reads_candidates


CANDIDATES = np.array([[3, 50, -1], [0, 1, 119]], np.int32)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_masks_and_candidates_leave_what_may_be_drawn(
    temperature: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 0 is free, 2 and 4 have masks (uploaded one at a time), 1 and 3 have candidates."""
    monkeypatch.setattr(chooser, "_PIECE", 5)
    place = torch.device(device)
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1)).to(place)
    allowed = {2: [7, 64, 100], 4: [31, 32]}
    masks = np.zeros((2, 4), np.int32)
    for mask, tokens in zip(masks.view(np.uint32), allowed.values(), strict=True):
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
    choices = StepChoices(np.array([3, 1], np.int32), CANDIDATES, np.array([2, 4], np.int32), (), ())
    laid = lay_choices(choices, np.arange(5), VOCABULARY)
    assert laid is not None
    laid.masks[:] = masks
    left = allowed | {3: [3, 50], 1: [0, 1, 119]}
    own = {row: logits[row, tokens].log_softmax(-1).tolist() for row, tokens in left.items()}
    sampling = None
    if temperature:
        fives = np.full(5, 5.0)
        sampling = Sampling(
            fives.astype(np.float32),
            np.ones(5, np.float32),
            np.zeros(5, np.int32),
            np.arange(5),
            np.arange(5, dtype=np.int32),
        )
    free = int(logits[0].argmax())
    sampler = Sampler(place, VOCABULARY)
    subject = Chooser(sampler, Staging(1 << 12, place), VOCABULARY, ALONE)
    assert not subject.narrows(laid, sampling)
    waited: list[bool] = []
    tokens, log_probs = subject.choose(logits, laid, sampling, lambda: waited.append(True))
    assert waited
    for row, expected in left.items():
        assert int(tokens[row]) in expected
        if not temperature:
            assert int(tokens[row]) == expected[int(np.argmax(own[row]))]
    assert temperature or int(tokens[0]) == free
    for place_of, found in zip((3, 1), log_probs.tolist(), strict=True):
        assert found == pytest.approx(own[place_of][left[place_of].index(int(tokens[place_of]))], abs=1e-5)


def test_ranks_choose_alike_from_what_one_of_them_laid_out(device: str) -> None:
    """Each has a part of the logits, and gets all; masks and lists come to it with the step."""
    place = torch.device(device)
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(2)).to(place)
    choices = StepChoices(np.array([1], np.int32), CANDIDATES[:1], np.array([2], np.int32), (), ())
    laid = lay_choices(choices, np.array([2, 0, 1]), VOCABULARY)
    assert laid is not None
    laid.masks[:] = [0b1010, 0, 0, 0]

    class FakeRanks(Ranks):
        def whole(self, part: Tensor, vocabulary: int) -> Tensor:
            assert part.shape[1] < vocabulary
            return logits.clone()

    def choose(ranks: Ranks, part: Tensor, told: HostChoices) -> list[float]:
        subject = Chooser(Sampler(place, VOCABULARY, ranks), Staging(1 << 12, place), VOCABULARY, ranks)
        tokens, log_probs = subject.choose(part, told, None, lambda: None)
        return [*tokens.tolist(), *log_probs.tolist()]

    alone = choose(ALONE, logits.clone(), laid)
    told = pickle.loads(pickle.dumps(laid))
    assert choose(FakeRanks(1, 2), logits[:, : VOCABULARY // 2], told) == alone
    assert alone[0] in (3, 50), "the plan's second answer is the device's first"
    assert alone[1] in (1, 3), "its third the device's second"


def test_a_product_of_their_own_is_for_few_candidates(device: str) -> None:
    place = torch.device(device)
    subject = Chooser(Sampler(place, VOCABULARY), Staging(1 << 12, place), VOCABULARY, ALONE)
    for width, narrows in ((chooser._MOST_CANDIDATES, True), (chooser._MOST_CANDIDATES + 1, False)):
        table = np.zeros((2, width), np.int32)
        listed = lay_choices(
            StepChoices(np.arange(2, dtype=np.int32), table, np.empty(0, np.int32), (), ()), np.arange(2), VOCABULARY
        )
        assert subject.narrows(listed, None) is narrows


def test_uploaded_masks_are_the_matchers(constraints: list[Any]) -> None:
    """What llguidance says of the first token, bit by bit: letters a to c, and tokens of them."""
    matcher = constraints[0].start(())
    mask = np.frombuffer(matcher.masker.compute_bitmask(), np.uint8)
    allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")[:VOCABULARY])
    assert [Bytes().tokens[token] for token in allowed] == [b"a", b"b", b"c"]
