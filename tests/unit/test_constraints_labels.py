"""Choices as a trie of tokens: where a walk ends, what it says, and that probabilities add up."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.constraints.labels import LabelMatcher, Labels
from spark_llm.errors import LlmError

EOS = (90, 91)
SPELLINGS = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=8, unique=True)


def labels(*spellings: tuple[int, ...], eos: tuple[int, ...] = EOS) -> Labels:
    return Labels([f"choice {i}" for i in range(len(spellings))], spellings, eos)


def begin(trie: Labels) -> LabelMatcher:
    return trie.start(trie.forced)


def walks(trie: Labels, draw: random.Random) -> list[tuple[list[int], LabelMatcher]]:
    """Every way through the trie, each token with a random share of its branch."""
    found = []
    todo: list[list[tuple[int, float]]] = [[]]
    while todo:
        taken = todo.pop()
        matcher, tokens = begin(trie), list(trie.forced)
        for token, log_prob in taken:
            tokens += [token, *matcher.take(token, log_prob)]
        assert matcher.error is None
        if matcher.is_done:
            found.append((tokens, matcher))
            continue
        candidates = matcher.candidates.tolist()
        assert candidates == sorted(set(candidates))
        assert len(candidates) > 1, "a token that is forced is not drawn"
        weights = [draw.random() + 0.01 for _ in candidates]
        todo += [[*taken, (token, math.log(w / sum(weights)))] for token, w in zip(candidates, weights, strict=True)]
    return found


@settings(max_examples=200, derandomize=True, deadline=None)
@given(SPELLINGS, st.randoms(use_true_random=False))
def test_every_choice_is_reached_and_their_probabilities_add_up_to_one(
    spellings: list[tuple[int, ...]], draw: random.Random
) -> None:
    trie = labels(*spellings)
    total: dict[str, float] = {}
    for tokens, matcher in walks(trie, draw):
        assert matcher.is_whole
        assert matcher.text is not None
        spelled = spellings[trie.choices.index(matcher.text)]
        stem = tuple(tokens[:-1] if tokens[-1:] and tokens[-1] in EOS else tokens)
        assert stem == spelled[: len(stem)], "the tokens are those of another choice"
        assert len(tokens) - len(trie.forced) <= trie.max_tokens
        assert trie.start(tokens).text == matcher.text, "the state is a function of the tokens"
        total[matcher.text] = total.get(matcher.text, 0.0) + (matcher.confidence or 0.0)
    assert set(total) == set(trie.choices)
    assert sum(total.values()) == pytest.approx(1.0)


def test_a_walk_ends_as_soon_as_one_choice_is_left() -> None:
    trie = labels((1, 2, 3, 4), (1, 5), (6,))
    assert trie.max_tokens == 2
    matcher = begin(trie)
    assert matcher.candidates.tolist() == [1, 6]
    assert matcher.take(1, -0.5) == []
    assert (matcher.is_done, matcher.text, matcher.confidence) == (False, None, None)
    matcher.take(2, -0.25)
    assert (matcher.is_done, matcher.text) == (True, "choice 0")
    assert matcher.confidence == pytest.approx(math.exp(-0.75))


def test_tokens_that_choices_share_are_forced() -> None:
    trie = labels((1, 2, 3, 4), (1, 2, 3, 5), (7,))
    assert trie.forced == ()
    matcher = begin(trie)
    assert matcher.take(1, -1.0) == [2, 3]
    assert matcher.candidates.tolist() == [4, 5]
    assert labels((1, 2, 3), (1, 2, 4)).forced == (1, 2)


def test_a_choice_that_others_begin_with_ends_by_an_end_token() -> None:
    trie = labels((1,), (1, 2), eos=EOS)
    assert trie.forced == (1,)
    for eos in EOS:
        matcher = begin(trie)
        assert matcher.candidates.tolist() == [2, *EOS]
        matcher.take(eos, -0.1)
        assert matcher.text == "choice 0"
    with pytest.raises(LlmError, match=r"LLM_INVALID_CONSTRAINT.*'choice 0' begins another one"):
        labels((1,), (1, 2), eos=())


def test_one_choice_needs_no_model() -> None:
    trie = labels((4, 5))
    assert (trie.whole, trie.forced) == (True, (4, 5))
    assert (begin(trie).text, begin(trie).confidence) == ("choice 0", 1.0)
    assert labels(()).whole


def test_of_choices_that_are_spelled_alike_the_first_counts() -> None:
    trie: Any = Labels(["a", "b", "c"], [(1,), (1,), (2,)], EOS)
    matcher = begin(trie)
    matcher.take(1, -1.0)
    assert matcher.text == "a"


def test_a_token_that_no_choice_has_is_an_error() -> None:
    matcher = begin(labels((1,), (2,)))
    matcher.take(3, -1.0)
    assert matcher.is_done
    assert matcher.error is not None
    assert matcher.text is None


def test_no_choice_is_an_error() -> None:
    with pytest.raises(LlmError, match=r"LLM_INVALID_CONSTRAINT.*there are none"):
        Labels([], [], EOS)


def test_choices_may_be_longer_than_python_recurses() -> None:
    trie = labels(tuple([1] * 5000), (*[1] * 4999, 2))
    assert len(trie.forced) == 4999
    assert trie.max_tokens == 5000
