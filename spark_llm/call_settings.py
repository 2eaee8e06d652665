"""A call's spec and the session's configuration -> what its task and its engine go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from spark_llm.asking import AnswerSettings
from spark_llm.call import AnswerForm, CallSpec, PromptPlan
from spark_llm.engine.request import Client, Constraint, SamplingParams
from spark_llm.engine.service.protocol import Budget, ResultCache, StreamOpen
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.shared_prompt import Together

if TYPE_CHECKING:
    from spark_llm.config import LlmConf


def answer_settings(
    spec: CallSpec, conf: LlmConf, tables: Mapping[str, bytes], columns: Sequence[int] | None = None
) -> AnswerSettings:
    """How a task asks for a call's rows. tables: the order tables that specs name; columns: the call's in a window."""
    plan = spec.prompt or PromptPlan()
    return AnswerSettings(
        fields=spec.fields,
        columns=columns,
        masked=spec.masked,
        call=spec.canonical(),
        window_rows=conf.window_rows,
        fold=folds(spec),
        seed=spec.seed if spec.temperature else None,
        drawn=spec.drawn(),
        fail=(spec.on_error or conf.on_error) == "fail",
        partial=spec.budget is not None and spec.budget.partial,
        order=order_table(plan, tables),
        instruction_last=plan.instruction_last,
        together=together(spec),
        form=spec.answer,
        details=spec.details,
    )


def together(spec: CallSpec) -> Together | None:
    """How the call's rows share prompts; None: they do not."""
    plan = spec.prompt or PromptPlan()
    if plan.rows < 2:
        return None
    order = plan.fields or tuple(range(len(spec.fields)))
    return Together(
        rows=plan.rows,
        left=tuple(number for number in order if number in plan.left),
        right=tuple(number for number in order if number not in plan.left),
        stop=spec.stop,
    )


def folds(spec: CallSpec) -> bool:
    """Do equal rows share an answer, so that their keys are sent?"""
    return spec.rows is not None and spec.rows.fold and spec.is_repeatable


def order_table(plan: PromptPlan, tables: Mapping[str, bytes]) -> OrderTable | None:
    """The order table of a call; None where its fields stand as written."""
    if plan.table is not None:
        return OrderTable.decode(tables[plan.table])
    return OrderTable.fixed(plan.fields) if plan.fields else None


def stream_header(spec: CallSpec, conf: LlmConf, client: Client, node: str = "", limit: int = 0) -> StreamOpen:
    """What is constant for all rows of a task, for the engine. client: who asks, in which query. node, limit: of a
    group that counts its hits."""
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(spec, name)) is not None}
    params = SamplingParams(
        max_tokens=conf.max_output_length if spec.max_tokens is None else spec.max_tokens,
        stop=spec.stop,
        **given,
    )
    plan = spec.prompt or PromptPlan()
    return StreamOpen(
        query=client.query,
        client=client.user,
        client_weight=client.weight,
        params=params,
        system=spec.system,
        instruction_segments=0 if plan.instruction_last else 1,
        later_calls=plan.later_calls,
        shared_segments=len(spec.fields) if plan.instruction_last else 0,
        reuse=conf.prefix_cache,
        cache=result_cache(conf) if folds(spec) else None,
        budget=budget(spec),
        limit=limit,
        node=node,
        constraint=constraint(spec.answer),
        truncate=spec.truncate is not None,
    )


def constraint(form: AnswerForm | None) -> Constraint | None:
    """What holds the engine to the form of a call's answers; rows with choices of their own bring them along."""
    if form is None or form.field is not None or form.kind == "embedding":
        return None
    return Constraint(kind=form.kind, text=form.text, choices=form.choices)


def shared_header(header: StreamOpen, plan: PromptPlan) -> StreamOpen:
    """The header for prompts with several rows, of the one for single rows."""
    params = header.params
    return msgspec.structs.replace(
        header,
        params=msgspec.structs.replace(params, max_tokens=plan.most_output(params.max_tokens), stop=()),
        later_calls=0,
        shared_segments=0,
        truncate=False,  # rows that are too many for a prompt are asked alone
    )


def result_cache(conf: LlmConf) -> ResultCache | None:
    """The result cache that the session asks for, None where it is off."""
    if not conf.cache_enabled:
        return None
    return ResultCache(
        path=conf.cache_path,
        memory=conf.cache_memory,
        max_size=conf.cache_max_size,
        cleared=conf.cache_cleared / 1000,
    )


def budget(spec: CallSpec) -> Budget | None:
    """What the engine may spend on the call's query."""
    if spec.budget is None:
        return None
    return Budget(calls=spec.budget.calls, length=spec.budget.length, seconds=spec.budget.seconds)
