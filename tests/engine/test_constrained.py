"""Constrained answers are those of transformers under the same masks, however rows are batched, cut, or interrupted."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import CLOSE, EOS_IDS, tree_of_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from random_schemas import parses, schemas
from small_tokenizer import small_tokenizer
from test_text_segments import FAMILIES

from spark_llm.engine import runner as runner_module
from spark_llm.engine.constraints import step as step_module
from spark_llm.engine.constraints.compiler import ConstraintCompiler
from spark_llm.engine.constraints.matcher import CompiledConstraint
from spark_llm.engine.constraints.schema import check, grammar_of
from spark_llm.engine.core import Engine
from spark_llm.engine.request import Completion, Constraint, FinishReason, Request, SamplingParams
from spark_llm.engine.runner import Done
from spark_llm.engine.scheduling import matching
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.errors import LlmError

TinyModels = Callable[[str], Any]

BEFORE = "answer:\n"
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 6},
            "score": {"type": "integer", "minimum": -5, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["good", "bad", "very good"]}, "maxItems": 2},
        },
        "required": ["title", "score", "tags"],
        "additionalProperties": False,
    }
)
CONSTRAINTS = [
    Constraint(kind="json_schema", text=PERSON),
    Constraint(kind="regex", text="(yes|no), because [a-z ]{3,9}\\."),
    Constraint(kind="grammar", text='start: "[" item ("; " item)* "]"\nitem: /[0-9]{1,3}/ | "none"'),
    Constraint(kind="choices", choices=("positive", "negative", "neutral", "very good", "very bad", "good enough")),
    Constraint(kind="choices", choices=("good", "good enough", "bad")),
]
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def compiler() -> ConstraintCompiler:
    return ConstraintCompiler(small_tokenizer(), 512, EOS_IDS)


@pytest.fixture(scope="module")
def compiled(compiler: ConstraintCompiler) -> list[CompiledConstraint]:
    return [compiler.compile(constraint, BEFORE) for constraint in CONSTRAINTS]


@pytest.fixture(scope="module")
def plain(tiny_models: TinyModels, compiled: list[CompiledConstraint]) -> list[Completion]:
    """The answers of an engine that nothing disturbs."""
    return tiny_models("llama").answer(rows(compiled))


def rows(compiled: Sequence[CompiledConstraint], count: int = 30, free: bool = True, **params: Any) -> list[Request]:
    """Prompts that share prefixes; each constraint in turn, and every sixth is free."""
    options = [*compiled, None] if free else list(compiled)
    return [
        Request(
            i,
            np.array(prompt, np.int32),
            SamplingParams(max_tokens=MAX_TOKENS if i % 6 != 5 else 6, **params),
            seed=i,
            constraint=options[i % len(options)],
        )
        for i, prompt in enumerate(tree_of_prompts(count))
    ]


def text_of(answer: Completion) -> str:
    return str(small_tokenizer().decode(answer.output, skip_special_tokens=True))


class Masked(transformers.LogitsProcessor):
    """Lets transformers choose what the matcher allows; forced tokens are the only choice, and so is the end."""

    def __init__(self, tokenizer: LLTokenizer, constraint: Constraint, start: int) -> None:
        self.matcher = LLMatcher(tokenizer, grammar_of(constraint))
        self.taken = start
        self.forced = self.matcher.compute_ff_tokens()
        self.ends = -1  # where the answer is whole
        self.gaps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self.taken :].tolist():
            if self.ends < 0:
                assert self.matcher.consume_token(token)
                self.forced = self.forced[1:] or self.matcher.compute_ff_tokens()
                if self.matcher.is_stopped():
                    self.ends = len(self.gaps)
        self.taken = input_ids.shape[1]
        allowed = torch.zeros(512, dtype=torch.bool)
        if self.ends >= 0:
            allowed[EOS_IDS[0]] = True
        elif self.forced:
            allowed[self.forced[0]] = True
        else:
            mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            allowed |= torch.from_numpy(np.unpackbits(mask, bitorder="little")[:512]).bool()
        masked = scores.masked_fill(~allowed, -torch.inf)
        best = masked[0].topk(2).values
        self.gaps.append(float(best[0] - best[1]))
        return masked


@pytest.mark.parametrize("which", [0, 1, 2])
def test_answers_are_those_of_transformers_under_the_same_masks(
    tiny_models: TinyModels, plain: list[Completion], which: int
) -> None:
    model = tiny_models("llama")
    tokenizer = LLTokenizer(small_tokenizer().to_str(), n_vocab=512, eos_token=list(EOS_IDS))
    prompts = tree_of_prompts(30)
    compared = 0
    for i in range(which, 30, 6):
        masks = Masked(tokenizer, CONSTRAINTS[which], len(prompts[i]))
        ids = torch.tensor([prompts[i]])
        result = model.module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0,
            eos_token_id=list(EOS_IDS), logits_processor=transformers.LogitsProcessorList([masks]),
        )  # fmt: skip
        expected = result[0, len(prompts[i]) :].tolist()[: masks.ends if masks.ends >= 0 else None]
        output = plain[i].output
        if output != expected:
            first = next(at for at, (a, b) in enumerate(zip(output, expected, strict=False)) if a != b)
            assert masks.gaps[first] <= CLOSE, f"row {i} differs from token {first} on"
        compared += output == expected
    assert compared >= 4


def test_answers_keep_to_their_constraints(plain: list[Completion]) -> None:
    for answer in plain:
        if answer.error is not None:
            assert answer.error[0] == "LLM_ANSWER_INCOMPLETE"
            continue
        match answer.id % 6:
            case 0:
                assert set(json.loads(text_of(answer))) == {"title", "score", "tags"}
            case 3 | 4 as which:
                assert answer.text in CONSTRAINTS[which].choices
                assert 0 < (answer.confidence or 0) <= 1
            case 5:
                assert (answer.text, answer.confidence) == (None, None)
    assert sum(answer.error is None for answer in plain) > 20


SETTINGS: dict[str, dict[str, Any]] = {
    "no cascade": {"cascade": False},
    "one row at a time": {"running": 1},
    "chunks, pages of 4": {"batch": 9, "page_size": 4},
    "preempted": {"preempt_every": 3, "running": 8},
    "evicted, little room": {"clear_every": 2, "pages": 260},
    "a step in flight": {"depth": 2},
    "a step in flight, chunks, preempted, rows keep coming": {
        "depth": 2, "batch": 13, "page_size": 4, "pages": 80, "preempt_every": 4, "late": 12,
    },
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_engine_do_not_change_answers(
    tiny_models: TinyModels, compiled: list[CompiledConstraint], plain: list[Completion], setting: str
) -> None:
    answers = tiny_models("llama").answer(rows(compiled), **SETTINGS[setting])
    same(answers, plain)


def same(answers: Sequence[Completion], plain: Sequence[Completion]) -> None:
    """Tokens, texts and errors alike; float32 rounding may move a confidence, and one row in 30 over a tie."""
    differing = [a.id for a, b in zip(answers, plain, strict=True) if (a.output, a.text) != (b.output, b.text)]
    assert len(differing) <= 1, differing
    for a, b in zip(answers, plain, strict=True):
        if a.id not in differing:
            assert a.error == b.error
            assert a.confidence == (None if b.confidence is None else pytest.approx(b.confidence, abs=1e-4))


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    launches=st.sets(st.integers(1, 25), max_size=4),
    landings=st.sets(st.integers(1, 25), max_size=4),
    late=st.booleans(),
    depth=st.sampled_from([1, 2]),
    preempt_every=st.sampled_from([0, 3]),
)
def test_steps_may_fail_wherever_they_like(
    tiny_models: TinyModels, compiled: list[CompiledConstraint], plain: list[Completion],
    launches: set[int], landings: set[int], late: bool, depth: int, preempt_every: int,
) -> None:  # fmt: skip
    """A matcher has taken the tokens of its row's answer, no more, whichever steps are rolled back."""
    logging.disable(logging.CRITICAL)
    model = tiny_models("llama")
    engine: Engine = model.engine(depth=depth, batch=40, page_size=4, running=8)
    launch, count = engine.runner.launch, 0

    class Failing(Done):
        def tokens(self) -> Any:
            raise RuntimeError("injected")

    def failing(plan: StepPlan) -> Done:
        nonlocal count
        count += 1
        alone = plan.num_rows == 1  # a row that fails alone, and again, is given up
        if count in launches and not late and not alone:
            raise RuntimeError("injected")
        done: Done = launch(plan)  # type: ignore[assignment]
        if count in launches and not alone:
            raise RuntimeError("injected")
        return Failing(done._tokens) if count in landings and not alone else done

    engine.runner.launch = failing  # type: ignore[method-assign]
    try:
        same(model.answer(rows(compiled), engine=engine, preempt_every=preempt_every), plain)
    finally:
        logging.disable(logging.NOTSET)


def test_a_failed_model_waits_for_the_masks(
    tiny_models: TinyModels, compiled: list[CompiledConstraint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matchers belong to the thread that makes masks until they are made, also where the model fails meanwhile."""
    waited: list[bool] = []
    wait = step_module.Masks.wait

    def recorded(masks: step_module.Masks) -> None:
        wait(masks)
        waited.append(masks._work is None or masks._work.done())

    monkeypatch.setattr(step_module.Masks, "wait", recorded)
    monkeypatch.setattr(runner_module.Runner, "_batch", lambda runner, plan: 1 / 0)
    logging.disable(logging.CRITICAL)
    try:
        answers = tiny_models("llama").answer(rows(compiled[:1], 2, free=False))
    finally:
        logging.disable(logging.NOTSET)
    assert all(answer.error is not None and answer.error[0] == "LLM_ENGINE_STEP_FAILED" for answer in answers)
    assert waited
    assert all(waited)


def test_confidence_is_the_softmax_over_the_choices(
    tiny_models: TinyModels, compiled: list[CompiledConstraint]
) -> None:
    """By transformers' logits, branch by branch; in steps of choices only, and in steps with free rows."""
    model = tiny_models("llama")
    for which, free in ((3, False), (3, True), (4, False)):
        asked = rows([compiled[which]], 12, free=free)
        checked = 0
        for request, answer in zip(asked, model.answer(asked), strict=True):
            if request.constraint is None:
                continue
            matcher, expected, output = compiled[which].start(()), 0.0, []
            while not matcher.is_done:
                ids = torch.tensor([[*request.prompt.tolist(), *output]])
                with torch.inference_mode():
                    logits = model.module(ids).logits[0, -1].float()
                shares = logits[torch.from_numpy(matcher.candidates).long()].log_softmax(-1)
                best = int(shares.argmax())
                expected += float(shares[best])
                token = int(matcher.candidates[best])
                output += [token, *matcher.take(token, 0.0)]
            assert answer.output == output
            assert answer.text == matcher.text
            assert answer.confidence == pytest.approx(math.exp(expected), abs=1e-4)
            checked += 1
        assert checked >= 6


def test_labels_that_differ_at_once_take_no_step_beyond_the_prompt(
    tiny_models: TinyModels, compiler: ConstraintCompiler
) -> None:
    model = tiny_models("llama")
    labels = compiler.compile(Constraint(kind="choices", choices=("positive", "negative")), BEFORE)
    asked = rows([labels], 12, free=False)
    engine = model.engine(batch=4096)
    model.answer(asked, engine=engine)
    assert engine.stats().steps == 1


def test_forced_tokens_take_no_step(tiny_models: TinyModels, compiler: ConstraintCompiler) -> None:
    model = tiny_models("llama")
    text = "A: once upon a time, (yes|no) and they lived happily ever after"
    constraint = compiler.compile(Constraint(kind="regex", text=text), BEFORE)
    engine = model.engine(batch=4096)
    answers = model.answer(rows([constraint], 8, free=False, ignore_eos=True), engine=engine)
    assert {text_of(answer) for answer in answers if answer.error is None} <= {
        text.replace("(yes|no)", word) for word in ("yes", "no")
    }
    assert engine.stats().forced_tokens > 10 * len(answers)
    assert engine.stats().steps < 8


def test_an_answer_that_is_known_needs_no_model(tiny_models: TinyModels, compiler: ConstraintCompiler) -> None:
    model = tiny_models("llama")
    constant = compiler.compile(Constraint(kind="json_schema", text='{"const": {"a": [1, "é"]}}'), BEFORE)
    only = compiler.compile(Constraint(kind="choices", choices=("the only one", "the only one")), BEFORE)
    engine = model.engine()
    first, second = model.answer(rows([constant, only], 2, free=False), engine=engine)
    assert text_of(first) == '{"a": [1, "é"]}'
    assert (second.text, second.confidence, second.finish_reason) == ("the only one", 1.0, FinishReason.STOP)
    assert (engine.stats().steps, first.prompt_tokens, first.confidence) == (0, 0, None)


def test_an_answer_that_max_tokens_cuts_is_an_error(tiny_models: TinyModels, compiler: ConstraintCompiler) -> None:
    """At any length: where the answer may end there it is one, else the row fails; half an answer is never given."""
    model = tiny_models("llama")
    digits = compiler.compile(Constraint(kind="regex", text="[0-9]+"), BEFORE)
    schema = compiler.compile(Constraint(kind="json_schema", text=PERSON), BEFORE)
    for max_tokens in range(1, 30, 4):
        params = SamplingParams(max_tokens=max_tokens)
        asked = [
            Request(i, np.array([20 + i, 21], np.int32), params, constraint=constraint)
            for i, constraint in enumerate((digits, schema))
        ]
        number, person = model.answer(asked)
        assert number.error is None
        assert text_of(number).isdigit()
        if person.error is None:
            json.loads(text_of(person))
        else:
            assert person.error == ("LLM_ANSWER_INCOMPLETE", {"kind": "JSON schema", "max_tokens": str(max_tokens)})
            assert "Raise max_tokens" in str(LlmError(person.error[0], **person.error[1]))


def test_a_grammar_that_gets_too_complex_fails_its_rows_only(
    tiny_models: TinyModels, compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spark_llm.engine.constraints.grammar import GrammarMatcher

    model = tiny_models("llama")
    schema = compiler.compile(Constraint(kind="json_schema", text=PERSON), BEFORE)
    take = GrammarMatcher.take
    monkeypatch.setattr(GrammarMatcher, "take", lambda matcher, token, log_prob: take(matcher, 0, log_prob))
    failed, free = model.answer(rows([schema], 2))
    assert failed.error is not None
    assert failed.error[0] == "LLM_CONSTRAINT_FAILED"
    assert free.error is None


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_draws_keep_to_constraints_and_to_the_row(
    tiny_models: TinyModels, compiled: list[CompiledConstraint], temperature: float
) -> None:
    model = tiny_models("llama")
    params = {"temperature": temperature, "top_p": 0.9, "top_k": 40}
    together = model.answer(rows(compiled, 20, free=False, **params), depth=2)
    same(model.answer(rows(compiled, 20, free=False, **params), running=1), together)
    for answer in together:
        which = answer.id % 5
        if answer.error is None and which == 0:
            json.loads(text_of(answer))
        if which in (3, 4):
            assert answer.text in CONSTRAINTS[which].choices
    assert sum(answer.error is None for answer in together) > 10


def check_schemas(model: Any, compiler: ConstraintCompiler, schema: dict[str, Any], draw: int) -> int:
    """Answers of a random model at random lengths: whole, or an error. Returns how many are whole."""
    constraint = compiler.compile(Constraint(kind="json_schema", text=json.dumps(schema)), BEFORE)
    asked = [
        Request(
            i, np.array([20 + draw % 400, 21 + i], np.int32),
            SamplingParams(max_tokens=length, temperature=temperature, top_p=0.95), seed=i, constraint=constraint,
        )
        for i, (length, temperature) in enumerate([(60, 0.0), (60, 1.0), (60, 5.0), (1 + draw % 12, 1.0)])
    ]  # fmt: skip
    whole = 0
    for answer in model.answer(asked):
        if answer.error is None:
            text = text_of(answer)
            assert parses(text, schema), text
            whole += 1
        else:
            assert answer.error[0] == "LLM_ANSWER_INCOMPLETE"
    return whole


def test_every_answer_parses(tiny_models: TinyModels, compiler: ConstraintCompiler) -> None:
    """The benchmark benchmarks/constrained.py does so over thousands of schemas."""
    whole: list[int] = []

    @settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema=schemas(), draw=st.integers(0, 10_000))
    def parse(schema: dict[str, Any], draw: int) -> None:
        whole.append(check_schemas(tiny_models("llama"), compiler, schema, draw))

    parse()
    assert sum(whole) > 2 * len(whole), "most are whole"


def test_answers_sampled_without_masks_are_those_of_masks(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model says little that a schema allows by itself: rows go back again and again."""
    monkeypatch.setattr(matching, "_MOST_DOUBT", 1)
    model = tiny_models("llama")
    refused: list[int] = []
    differing: list[int] = []

    @settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        schema=schemas(),
        preempt_every=st.sampled_from([0, 5]),
        running=st.sampled_from([3, 8]),
        page_size=st.sampled_from([1, 4]),
    )
    def agree(schema: dict[str, Any], preempt_every: int, running: int, page_size: int) -> None:
        constraint = Constraint(kind="json_schema", text=json.dumps(schema))
        compiled = ConstraintCompiler(small_tokenizer(), 512, EOS_IDS).compile(constraint, BEFORE)
        masked = model.answer(rows([compiled], 8))
        engine = model.engine(depth=2, running=running, page_size=page_size)
        found = model.answer(rows([compiled], 8), engine=engine, preempt_every=preempt_every)
        refused.append(engine.stats().refused_tokens)
        differing.append(sum((a.output, a.error) != (b.output, b.error) for a, b in zip(found, masked, strict=True)))

    agree()
    assert sum(refused) > 100
    assert sum(differing) <= 1, "float32 rounding may move one answer over a tie"


@pytest.mark.parametrize(
    ("constraint", "place"),
    [
        (Constraint(kind="choices"), "there are none"),
        (Constraint(kind="json_schema", text="{"), "it is no JSON.*line 1 column 2"),
        (Constraint(kind="json_schema", text="[]"), "a schema is an object"),
        (
            Constraint(kind="json_schema", text='{"properties": {"a/b": {"items": {"type": "objekt"}}}}'),
            "Invalid type: objekt \\(at /properties/a~1b/items\\)",
        ),
        (Constraint(kind="json_schema", text='{"anyOf": [{}, {"if": {}}]}'), '"if".*\\(at /anyOf/1\\)'),
        (Constraint(kind="json_schema", text='{"$ref": "#/$defs/x"}'), "does not exist"),
        (
            Constraint(kind="json_schema", text='{"type": "string", "minLength": 3, "maxLength": 1}'),
            "minLength \\(3\\) is greater",
        ),
        (Constraint(kind="regex", text="(a"), "unclosed group"),
        (Constraint(kind="regex", text="a(?=b)"), "look-around"),
        (Constraint(kind="grammar", text="start: foo"), "unknown name"),
    ],
)
def test_what_cannot_be_kept_to_says_why(compiler: ConstraintCompiler, constraint: Constraint, place: str) -> None:
    with pytest.raises(LlmError, match=f"LLM_INVALID_CONSTRAINT.*{place}"):
        check(constraint)
    with pytest.raises(LlmError, match=f"LLM_INVALID_CONSTRAINT.*{place}"):
        compiler.compile(constraint, BEFORE)


def test_what_is_compiled_is_shared(compiler: ConstraintCompiler) -> None:
    for constraint in CONSTRAINTS:
        check(constraint)
        assert compiler.compile(constraint, BEFORE) is compiler.compile(constraint, BEFORE)


def test_choices_continue_the_prompt(compiler: ConstraintCompiler) -> None:
    """After white space as they are; after anything else with a space; by tokens that follow the prompt's."""
    ids = lambda text: small_tokenizer().encode(text).ids  # noqa: E731
    choices = Constraint(kind="choices", choices=("positive", "bad"))
    for before, lead in (("answer:\n", ""), ("answer:", " "), ("", " ")):
        found: Any = compiler.compile(choices, before)
        assert found.root.candidates.tolist() == sorted({ids(lead + "positive")[0], ids(lead + "bad")[0]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", ["answer:\n", "answer:"])
def test_every_kind_of_tokenizer_spells_what_is_allowed(family: str, before: str) -> None:
    """The tokens with which a model would write an answer are allowed; what is drawn decodes to a whole answer."""
    tokenizer, _ = FAMILIES[family]()
    special = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    compiler = ConstraintCompiler(tokenizer, tokenizer.get_vocab_size() + 3, special[-1:])
    schema = {
        "type": "object",
        "properties": {"title": {"enum": ["the film is ü", "a review"]}, "n": {"type": "integer", "maximum": 99}},
        "required": ["title", "n"],
        "additionalProperties": False,
    }
    draw = random.Random(0)
    for constraint, text in (
        (Constraint(kind="json_schema", text=json.dumps(schema)), '{"title": "the film is ü", "n": 42}'),
        (Constraint(kind="regex", text="(a|the) (film|review)( is (good|bad))?"), "the review is bad"),
    ):
        compiled: Any = compiler.compile(constraint, before)
        matcher = compiled.start(()).masker
        natural = compiler._continuations(before, [text])[0]
        assert matcher.validate_tokens(natural) == len(natural)
        for _ in range(3):
            walk, output = compiled.start(compiled.forced), list(compiled.forced)
            while not walk.is_done:
                mask = np.unpackbits(np.frombuffer(walk.masker.compute_bitmask(), np.uint8), bitorder="little")
                token = draw.choice(np.flatnonzero(mask).tolist())
                output += [token, *walk.take(token, 0.0)]
            answer = tokenizer.decode(output, skip_special_tokens=True).strip()
            if constraint.kind == "regex":
                assert re.fullmatch(constraint.text, answer), answer
            else:
                assert parses(answer, schema), answer
