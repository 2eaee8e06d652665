"""Canonical arguments: equal keys for equal rows of equal calls, and for no others."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.call import CallSpec, FieldSpec, PromptPlan, RowPlan
from spark_llm.canonical import row_keys, row_seed

values = st.one_of(st.none(), st.sampled_from(["", "a", "b", "ab", "null"]))


def keys_of(rows: list[tuple[str | None, ...]], call: bytes = b"call") -> list[bytes]:
    return row_keys([pa.array(column, pa.utf8()) for column in zip(*rows, strict=True)], call)


@given(st.lists(st.tuples(values, values, values), min_size=1, max_size=20))
@settings(deadline=None)
def test_keys_are_equal_exactly_for_equal_rows(rows: list[tuple[str | None, ...]]) -> None:
    keys = keys_of(rows)
    for i in range(len(rows)):
        for j in range(i):
            assert (keys[i] == keys[j]) == (rows[i] == rows[j])


def test_keys_are_those_of_a_row_alone_and_differ_by_call() -> None:
    rows = [("p", "a"), ("p", None), ("a", "p")]
    assert keys_of(rows) == [keys_of([row])[0] for row in rows]
    assert not set(keys_of(rows)) & set(keys_of(rows, b"other call"))


def test_seeds_depend_on_seed_and_arguments_only() -> None:
    first, second = keys_of([("p", "a"), ("p", "b")])
    assert row_seed(7, first) == row_seed(7, keys_of([("p", "a")])[0])
    assert len({row_seed(7, first), row_seed(8, first), row_seed(7, second)}) == 3
    assert 0 <= row_seed(7, first) < 2**63


def test_a_call_is_its_parameters_schema_and_order_policy_not_what_rules_say_about_them() -> None:
    spec = CallSpec(fields=(FieldSpec("a"), FieldSpec("b")))

    def changed(**changes: object) -> bytes:
        return CallSpec(**({"fields": spec.fields} | changes)).canonical()  # type: ignore[arg-type]

    alike = [
        changed(rows=RowPlan(fold=True, order_why="sorted")),
        changed(prompt=PromptPlan(fields_why="because", instruction_why="because", later_calls=1)),
        changed(order="as_written"),
    ]
    assert set(alike) == {spec.canonical()}
    others = [
        changed(fields=(FieldSpec("b"), FieldSpec("a"))),
        changed(fields=(FieldSpec("a", json=True), FieldSpec("b"))),
        changed(model="other"),
        changed(system="s"),
        changed(max_tokens=1),
        changed(temperature=0.5, seed=1),
        changed(temperature=0.5, seed=2),
        changed(stop=("x",)),
        changed(prompt=PromptPlan(fields=(1, 0))),
        changed(prompt=PromptPlan(table="digest")),
        changed(prompt=PromptPlan(instruction_last=True)),
    ]
    assert len({spec.canonical(), *others}) == len(others) + 1
