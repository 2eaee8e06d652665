"""The rows that every engine answers: prompts that share a long prefix, of exact length in tokens, and always the same.

Text is built of ordinary English words from a seed, so nothing is downloaded and every run, engine and process sees
the same ids. All prompts have one length, so no engine pads; rows are shuffled, so reuse has to be found.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

SHARED_TOKENS, OWN_TOKENS, TEMPLATE_TOKENS = 400, 60, 21
PROMPT_TOKENS = SHARED_TOKENS + OWN_TOKENS + TEMPLATE_TOKENS
OUTPUT_TOKENS = 8
SYSTEM = "You judge reviews of new films."  # with the chat template's own tokens: TEMPLATE_TOKENS

Tokenize = Callable[[str], list[int]]

SUBJECTS = ["film", "story", "director", "camera", "script", "actor", "scene", "ending", "music", "plot", "hero"]
QUALITIES = ["quiet", "bright", "funny", "slow", "tender", "sharp", "strange", "honest", "loud", "careful", "clever"]
VERBS = ["follows", "shows", "finds", "leaves", "carries", "turns", "brings", "keeps", "loses", "holds", "takes"]
PLACES = ["city", "village", "river", "house", "school", "theatre", "island", "street", "station", "garden"]
PEOPLE = ["mother", "doctor", "soldier", "teacher", "thief", "painter", "farmer", "sailor", "singer", "writer"]
LINKS = ["because", "while", "although", "until", "when", "before", "after", "since", "unless", "where"]


@dataclass(frozen=True)
class Row:
    """One prompt: ``shared + own`` is the user's message, ``ids`` the whole prompt; rows of one ``group`` share."""

    group: int
    shared: str
    own: str
    ids: list[int]


@dataclass(frozen=True)
class Workload:
    """Rows in the order in which they are handed over, and how many leading tokens the rows of a group share."""

    rows: list[Row]
    shared_tokens: int
    system: str = SYSTEM

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Workload:
        raw = json.loads(path.read_text())
        return Workload([Row(**row) for row in raw["rows"]], raw["shared_tokens"], raw["system"])


def sentence(rng: random.Random) -> str:
    """One plain sentence, a space before its first word."""
    pick = rng.choice
    first = f" The {pick(QUALITIES)} {pick(SUBJECTS)} {pick(VERBS)} a {pick(PEOPLE)} from the {pick(PLACES)}"
    return f"{first} {pick(LINKS)} the {pick(QUALITIES)} {pick(PEOPLE)} {pick(VERBS)} the {pick(SUBJECTS)}."


def text_of(tokens: int, opening: str, rng: random.Random, tokenize: Tokenize) -> str:
    """A text that begins with ``opening`` and is ``tokens`` long.

    Words are added whole: a word with its leading space is cut off from its neighbours by the pre-tokenizer.
    """
    text, length = opening, len(tokenize(opening))
    words: list[str] = []
    while length < tokens:
        words = words or [f" {word}" for word in sentence(rng).split()]
        piece = words.pop(0)
        size = len(tokenize(piece))
        if length + size > tokens:
            piece, size = " the", 1
        text, length = text + piece, length + size
    if len(tokenize(text)) != tokens:
        raise ValueError(f"this tokenizer does not split at words: {len(tokenize(text))} tokens, not {tokens}")
    return text


def build(rows: int, rows_per_group: int, seed: int, tokenize: Tokenize, render: Callable[[str], str]) -> Workload:
    """``rows`` prompts in groups of ``rows_per_group``; ``render`` puts a user message into the chat template."""
    rng = random.Random(f"workload {seed}")
    made = []
    for group in range(-(-rows // rows_per_group)):
        shared = text_of(SHARED_TOKENS, f"Film {seed} {group}:", rng, tokenize)
        for member in range(min(rows_per_group, rows - group * rows_per_group)):
            own = text_of(OWN_TOKENS, f"\nReview {member} says", rng, tokenize)
            made.append(Row(group, shared, own, tokenize(render(shared + own))))
    wrong = {len(row.ids) for row in made} - {PROMPT_TOKENS}
    if wrong:
        raise ValueError(f"prompts of {sorted(wrong)} tokens, not {PROMPT_TOKENS}: other tokenizer or template")
    rng.shuffle(made)
    head = len(tokenize(render(""))) - len(tokenize(render("").split("<|im_start|>user\n")[-1]))
    return Workload(made, head + SHARED_TOKENS)


def packaged_workload(rows: int, rows_per_group: int, seed: int, model_folder: Path) -> Workload:
    """``build`` with the tokenizer and template of the model in ``model_folder`` (needs transformers)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def render(message: str) -> str:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return build(rows, rows_per_group, seed, tokenize, render)
