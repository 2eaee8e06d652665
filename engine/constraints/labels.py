"""Answers that are one of a few texts, as a trie of tokens: a row is answered as soon as one text only is left.

The tokens that may come next are the only ones whose logits are needed. The probability of an answer is the product,
over the trie's branches, of its token's share among the branch's tokens: what the model says, given that the answer is
one of the choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spark_llm.engine.constraints.matcher import Ints
from spark_llm.errors import LlmError


@dataclass(slots=True)
class _Node:
    """children: token -> node. label: the only choice that is left; -1: there are several. spelled: the choice that
    ends here; -1: none. steps: tokens that are drawn on the longest walk from here."""

    children: dict[int, _Node] = field(default_factory=dict)
    label: int = -1
    spelled: int = -1
    steps: int = 0
    candidates: Ints = field(default_factory=lambda: np.empty(0, np.int32))


class Labels:
    """The trie of ``choices``. tokens: of each, as it continues a prompt. eos_ids: end a choice that others begin with.

    max_tokens: of the longest walk, at least 1. LLM_INVALID_CONSTRAINT: there is no choice, or one cannot end where
    another goes on.
    """

    kind = "choices"
    trust = None  # lists of candidates cost next to nothing

    def __init__(self, choices: Sequence[str], tokens: Sequence[Sequence[int]], eos_ids: Sequence[int]) -> None:
        if not choices:
            raise LlmError("LLM_INVALID_CONSTRAINT", kind="choices", reason="there are none")
        self.choices = tuple(choices)
        self.root = _Node()
        nodes = [self.root]  # parents before children
        for label, spelling in enumerate(tokens):
            node = self.root
            for token in spelling:
                if token not in node.children:
                    node.children[token] = _Node()
                    nodes.append(node.children[token])
                node = node.children[token]
            if node.spelled < 0:  # of two that are spelled alike, the first
                node.spelled = label
        for node in reversed(nodes):
            self._finish(node, eos_ids)
        self.max_tokens = max(1, self.root.steps)
        self.whole = self.root.label >= 0
        self.forced = tuple(tokens[self.root.label]) if self.whole else tuple(_only_way(self.root))

    def start(self, output: Sequence[int]) -> LabelMatcher:
        matcher = LabelMatcher(self)
        for token in output:
            matcher.step(token)
        return matcher

    def _finish(self, node: _Node, eos_ids: Sequence[int]) -> None:
        """All that follows from the children, which are finished."""
        if node.spelled >= 0 and node.children:
            if not eos_ids:
                begins = self.choices[node.spelled]
                reason = f"{begins!r} begins another one, and the model has no token that ends an answer"
                raise LlmError("LLM_INVALID_CONSTRAINT", kind="choices", reason=reason)
            for token in eos_ids:
                node.children.setdefault(token, _Node(label=node.spelled))
        labels = {child.label for child in node.children.values()} or {node.spelled}
        node.label = labels.pop() if len(labels) == 1 else -1
        node.candidates = np.array(sorted(node.children), np.int32)
        node.steps = 0 if node.label >= 0 else 1 + max(child.steps for child in node.children.values())


class LabelMatcher:
    """A walk down the trie. See Matcher. log_prob: of the tokens taken where choices part."""

    __slots__ = ("_labels", "_node", "error", "log_prob")
    masker = state = None

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._node = labels.root
        self.log_prob = 0.0
        self.error: str | None = None

    @property
    def candidates(self) -> Ints:
        return self._node.candidates

    @property
    def is_whole(self) -> bool:
        return self._node.label >= 0

    @property
    def is_done(self) -> bool:
        return self.is_whole or self.error is not None

    @property
    def text(self) -> str | None:
        return self._labels.choices[self._node.label] if self.is_whole else None

    @property
    def confidence(self) -> float | None:
        return math.exp(self.log_prob) if self.is_whole else None

    def step(self, token: int) -> None:
        """Down one edge; no further than to where one choice is left."""
        if self.is_done:
            return
        node = self._node.children.get(token)
        if node is None:
            self.error = f"the model gave token {token}, which none of them has here"
        else:
            self._node = node

    def offer(self, token: int) -> list[int] | None:
        raise NotImplementedError("a choice's tokens are always sampled among its candidates")

    def take(self, token: int, log_prob: float) -> list[int]:
        self.step(token)
        self.log_prob += log_prob
        forced = [] if self.is_done else _only_way(self._node)
        for following in forced:
            self.step(following)
        return forced


def _only_way(node: _Node) -> list[int]:
    """Tokens up to where choices part."""
    tokens: list[int] = []
    while node.label < 0 and len(node.children) == 1:
        token, node = next(iter(node.children.items()))
        tokens.append(token)
    return tokens
