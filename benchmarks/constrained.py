"""What constraints cost and what they give: labels beside free answers, a grammar's share of a step, whole answers.

    .venv/bin/python benchmarks/constrained.py                       all parts on the CPU, the packaged model
    .venv/bin/python benchmarks/constrained.py --device cuda --model Qwen/Qwen2.5-7B-Instruct --rows 2000
    .venv/bin/python benchmarks/constrained.py --only schemas --schemas 5000

labels: the packaged reviews are classified with the same prompts, by free generation (answers of at most 8 tokens, and
of at most as many as a call has by default) and by choices; each begins with an empty prefix cache. grammar: the same
reviews are turned into JSON by a schema; the share of the engine's time that constraints take where the model waits for
it (masks that are made while it runs cost nothing there, nor does what the host does while a device runs another step:
that is "beside"), and what tokens cost that were sampled without a mask and refused.
schemas: answers of a small random model to generated schemas, greedy and drawn, at any max_tokens: each parses or is an
error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from constrained_schemas import parse_all, run
from machine import this_machine

from spark_llm.config import LlmConf
from spark_llm.datasets.catalogue import CATALOGUE
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.constraints import step as step_module
from spark_llm.engine.core import Engine, EngineStats
from spark_llm.engine.loading import load_engine
from spark_llm.engine.request import Completion, Constraint, Request, SamplingParams
from spark_llm.engine.scheduling import plan as plan_module
from spark_llm.engine.scheduling.matching import Matching

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "constrained.json"
QUESTION = "Is this review of a film positive or negative? Answer with one word, positive or negative."
LABELS = {"fresh": "positive", "rotten": "negative"}
FREE_TOKENS = 8  # of a free answer at most: enough for "The review is negative."
DEFAULT_TOKENS = LlmConf().max_output_length  # of a free answer where nothing is said
TO_JSON = "Describe this review of a film as JSON with a mood, a score from 0 to 10 and a few words that say why."
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["positive", "negative", "mixed"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "why": {"type": "string", "maxLength": 80},
    },
    "required": ["mood", "score", "why"],
    "additionalProperties": False,
}
JSON_TOKENS = 64


@dataclass
class Labels:
    """accuracy: of all rows; a free answer that names not just one label is wrong. named: rows that do."""

    way: str
    rows: int
    seconds: float
    rows_per_second: float
    steps: int
    output_tokens: int
    accuracy: float
    named: float


@dataclass
class GrammarCost:
    """share, parts, beside: of the steps' time. beyond: of the run's time, so much less took the same prompts with as
    many sampled tokens and no constraint. forced, refused: by the answers' tokens. in_vain: of the tokens that went
    through the model, those computed again, and those of answers that had ended or gone another way."""

    rows: int
    seconds: float
    share: float
    parts: dict[str, float]
    beside: float
    beyond: float
    forced: float
    refused: float
    in_vain: float
    tokens_per_step_and_row: float
    whole: int
    parsed: int


def prompt(engine: Engine, question: str, review: str) -> Any:
    text = engine.text
    assert text is not None
    ids = text._tokenizer.encode(
        text.frame(None).render(f"{question}\n\nReview: {review}"), add_special_tokens=False
    ).ids
    return np.array(ids, np.int32)


def label_of(text: str) -> str | None:
    named = [label for label in LABELS.values() if label in text.lower()]
    return named[0] if len(named) == 1 else None


def classify(engine: Engine, rows: int) -> list[Labels]:
    assert engine.text is not None
    reviews = CATALOGUE["movies"].load()["reviews"]
    reviews = reviews.groupby("verdict").head(rows // 2)  # as many of each, so that always one label is half right
    prompts = [prompt(engine, QUESTION, quote) for quote in reviews["quote"]]
    truth = [LABELS[verdict] for verdict in reviews["verdict"]]
    labels = engine.text.constrain(None, Constraint(kind="choices", choices=tuple(LABELS.values())))
    found = []
    free = {"warm": FREE_TOKENS, "free": FREE_TOKENS, "free, default max_tokens": DEFAULT_TOKENS}
    for way in (*free, "choices", "choices, 1 row at a time"):
        constraint = None if way in free else labels
        params = SamplingParams(max_tokens=free.get(way, labels.max_tokens))  # type: ignore[attr-defined]
        asked = [Request(i, ids, params, constraint=constraint) for i, ids in enumerate(prompts)]
        if way == "warm":
            run(engine, asked[: max(8, rows // 8)])
            continue
        if way.endswith("time"):
            answers, seconds, steps = one_by_one(engine, asked[: max(8, rows // 8)])
        else:
            answers, seconds, steps = run(engine, asked)
        texts = [answer.text or engine.text.decode([answer.output])[0] for answer in answers]
        given_labels = [label_of(text) for text in texts]
        count = len(answers)
        found.append(
            Labels(
                way, count, seconds, count / seconds, steps, sum(len(answer.output) for answer in answers),
                sum(a == b for a, b in zip(given_labels, truth, strict=False)) / count,
                sum(label is not None for label in given_labels) / count,
            )
        )  # fmt: skip
    return found


def one_by_one(engine: Engine, requests: Sequence[Request]) -> tuple[list[Completion], float, int]:
    """Each row alone: how many steps one takes."""
    found = [run(engine, [request]) for request in requests]
    return [answers[0] for answers, _, _ in found], sum(s for _, s, _ in found), sum(n for _, _, n in found)


def is_busy(engine: Engine) -> bool:
    """Whether a device runs a step that was launched before."""
    events = [getattr(pending, "_event", None) for _, pending in engine._pipeline._in_flight]
    return any(event is not None and not event.query() for event in events)


@contextmanager
def timed(engine: Engine) -> Iterator[dict[str, float]]:
    """Seconds in what constraints do on the way of a step, by part; "beside": where the device had work all along."""
    seconds: dict[str, float] = {}

    def timing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                part = "beside" if is_busy(engine) else name
                seconds[part] = seconds.get(part, 0.0) + spent

        return call

    from spark_llm.engine import runner

    points: list[tuple[str, Any, str]] = [
        ("lists", plan_module, "choices_of"),
        ("wait for masks", step_module.Masks, "wait"),
        ("apply masks", runner, "apply_masks"),
        ("take tokens", Matching, "take"),
        ("take tokens", Matching, "follow"),
    ]
    if "spark_llm.engine.cuda.chooser" in sys.modules:
        points.append(("apply masks", sys.modules["spark_llm.engine.cuda.chooser"].Chooser, "_mask"))
    with ExitStack() as stack:
        for name, owner, attribute in points:
            stack.enter_context(mock.patch.object(owner, attribute, timing(name, getattr(owner, attribute))))
        yield seconds


def beside_free(
    engine: Engine, asked: Sequence[Request], lengths: Sequence[int], after: EngineStats, before: EngineStats
) -> tuple[float, float]:
    """Seconds of the constrained rows, and of rows that sample as many tokens freely, the best of three each."""
    sampled = 1 - (after.forced_tokens - before.forced_tokens) / sum(lengths)
    free = [
        replace(
            request, params=SamplingParams(max_tokens=max(1, round(length * sampled)), ignore_eos=True), constraint=None
        )
        for request, length in zip(asked, lengths, strict=True)
    ]
    pairs = [(run(engine, asked)[1], run(engine, free)[1]) for _ in range(3)]
    held, unheld = zip(*pairs, strict=True)
    return min(held), min(unheld)


def grammar_cost(engine: Engine, rows: int) -> GrammarCost:
    assert engine.text is not None
    quotes = CATALOGUE["movies"].load()["reviews"]["quote"].head(rows)
    constraint = engine.text.constrain(None, Constraint(kind="json_schema", text=json.dumps(SCHEMA)))
    params = SamplingParams(max_tokens=JSON_TOKENS)
    asked = [
        Request(i, prompt(engine, TO_JSON, quote), params, constraint=constraint) for i, quote in enumerate(quotes)
    ]
    run(engine, asked[: max(8, rows // 8)])  # builds the lexer's states, as the first rows of a query do
    before = replace(engine.stats())
    with timed(engine) as parts:
        answers, _, steps = run(engine, asked)
    after = replace(engine.stats())
    spent = after.step_seconds - before.step_seconds
    beside = parts.pop("beside", 0.0) / spent
    in_vain = after.repeated_tokens - before.repeated_tokens + after.wasted_tokens - before.wasted_tokens
    tokens = sum(len(answer.output) for answer in answers)
    whole = [answer for answer in answers if answer.error is None]
    texts = engine.text.decode([answer.output for answer in whole])
    seconds, free_seconds = beside_free(engine, asked, [len(answer.output) for answer in answers], after, before)
    return GrammarCost(
        len(answers), seconds, sum(parts.values()) / spent, {name: part / spent for name, part in parts.items()},
        beside, 1 - free_seconds / seconds, (after.forced_tokens - before.forced_tokens) / tokens,
        (after.refused_tokens - before.refused_tokens) / tokens, in_vain / (after.tokens - before.tokens),
        tokens / steps / len(answers), len(whole),
        sum(isinstance(json.loads(text), dict) for text in texts),
    )  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """What a run found, as a table."""
    lines = [found["machine"], f"{found['model']} on {found['device']}", ""]
    if "labels" in found:
        lines.append(f"{'labels':26}{'rows':>6}{'rows/s':>9}{'steps':>7}{'tokens':>8}{'accuracy':>10}{'named':>8}")
        lines += [
            f"{way['way']:26}{way['rows']:6}{way['rows_per_second']:9.1f}{way['steps']:7}{way['output_tokens']:8}"
            f"{way['accuracy']:10.1%}{way['named']:8.1%}"
            for way in found["labels"]
        ]
        short, default, choices = (way["rows_per_second"] for way in found["labels"][:3])
        lines += [
            f"choices give {choices / short:.1f} times the rows a second of free answers of at most {FREE_TOKENS} "
            f"tokens, {choices / default:.1f} times those of at most {DEFAULT_TOKENS}",
            "",
        ]
    if "grammar" in found:
        cost = found["grammar"]
        parts = ", ".join(f"{name} {part:.2%}" for name, part in cost["parts"].items())
        lines += [
            f"grammar: {cost['beyond']:.2%} of the time beyond free answers of as many sampled tokens",
            f"         {cost['share']:.2%} of the steps' time on the host ({parts}), "
            f"{cost['beside']:.2%} beside a step",
            f"         {cost['refused']:.1%} as many tokens refused, {cost['in_vain']:.1%} of those computed in vain",
            f"         {cost['forced']:.0%} of tokens forced; of {cost['rows']} answers {cost['whole']} whole, "
            f"{cost['parsed']} parse",
            "",
        ]
    if "schemas" in found:
        total = found["schemas"]
        lines.append(
            f"{total['schemas']} generated schemas ({total['refused']} refused, {total.get('beyond', '?')} of them for "
            f"bounds beyond 10^18 or 10^15), {total['rows']} answers: "
            f"{total['whole']} parse, {total['incomplete']} cut by max_tokens are errors, {total['broken']} broken"
        )
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--only", choices=["labels", "grammar", "schemas"])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": str(this_machine()), "model": options.model, "device": options.device}
    if options.only and options.out.exists():
        found = json.loads(options.out.read_text()) | found  # the other parts stay
    if options.only != "schemas":
        engine = load_engine(EngineSpec(model=options.model, device=options.device, dtype=options.dtype))
        if options.only != "grammar":
            found["labels"] = [asdict(way) for way in classify(engine, options.rows)]
        if options.only != "labels":
            found["grammar"] = asdict(grammar_cost(engine, options.rows))
    if options.only in (None, "schemas"):
        found["schemas"] = asdict(parse_all(options.schemas))
    print(report(found))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
