"""The paper's tables: shapes, repetition and dependencies as promised, at any size, the same every time."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.datasets import paper
from spark_llm.datasets.paper.documents import _retrieved
from spark_llm.datasets.paper.texts import Texts, entities, generator, popular

NAMES = [*paper.TABLES, paper.DISJOINT]

# Groups of fields that determine each other (appendix B), and how often the first of them repeats.
DEPENDENCIES = {
    "movies": [(("movieinfo", "movietitle", "rottentomatoeslink"), 20)],
    "products": [(("parent_asin", "product_title"), 20)],
    "bird": [(("PostId", "Body"), 12)],
    "pdmx": [(("path", "metadata"), 1)],
    "beer": [(("beer/beerId", "beer/name"), 20)],
}
# table 1 of the paper counts eight fields of Beer and five of SQuAD; appendix B lists nine and six
FIELDS = {name: known.fields for name, known in paper.TABLES.items()} | {"beer": 9, "squad": 6, paper.DISJOINT: 4}


@pytest.mark.parametrize("name", NAMES)
def test_a_table_has_the_size_asked_for_and_is_the_same_every_time(name: str) -> None:
    table = paper.table(name, 600)
    assert table.shape == (600, FIELDS[name])
    assert table.equals(paper.table(name, 600))
    assert not table.equals(paper.table(name, 600, seed=1))
    assert [len(paper.table(name, rows)) for rows in (0, 1, 2, 9)] == [0, 1, 2, 9]


@pytest.mark.parametrize("name", paper.TABLES)
def test_by_default_a_table_has_as_many_rows_as_in_the_paper(name: str) -> None:
    assert len(paper.table(name)) == paper.TABLES[name].rows


@pytest.mark.parametrize("name", DEPENDENCIES)
@pytest.mark.parametrize("rows", [50, 4_000])
def test_fields_determine_each_other_as_in_the_paper(name: str, rows: int) -> None:
    table = paper.table(name, rows)
    for fields, repeats in DEPENDENCIES[name]:
        distinct = len(table[list(fields)].drop_duplicates())
        assert [table[field].nunique() for field in fields] == [distinct] * len(fields)
        assert rows / distinct == pytest.approx(repeats, rel=0.3)


def test_a_description_may_be_of_several_products() -> None:
    table = paper.table("products", 4_000)
    assert (table.groupby("parent_asin")["description"].nunique() == 1).all()
    assert (table.groupby("description")["parent_asin"].nunique() > 1).any()


def test_pdmx_flags_of_the_paper_determine_each_other() -> None:
    table = paper.table("pdmx", 4_000)
    flags = ["hasannotations", "hasmetadata", "isdraft", "isofficial", "isuserpublisher", "subsetall"]
    assert len(table[flags].drop_duplicates()) == 2
    assert table["bestpath"].nunique() < table["path"].nunique() == 4_000
    assert (table["isbestpath"] == (table["bestpath"] == table["path"])).all()


def test_beer_is_like_the_published_table() -> None:
    """Statistics of the 28,479 rows that the authors of the paper published."""
    table = paper.table("beer")
    published = {
        "review/profileName": (4862, 8.2),
        "review/time": (3738, 10.0),
        "review/overall": (20, 4.9),
        "review/taste": (10, 4.0),
        "review/palate": (5, 3.0),
        "review/appearance": (5, 3.0),
        "beer/name": (1423, 29.4),
        "beer/style": (78, 13.0),
        "beer/beerId": (1423, 4.2),
    }
    assert list(table.columns) == list(published)
    for field, (distinct, characters) in published.items():
        assert table[field].nunique() == pytest.approx(distinct, rel=0.12), field
        assert table[field].astype(str).str.len().mean() == pytest.approx(characters, rel=0.5), field
    # how large a group a row is in, on average: 740 for the beer, 28 for the reviewer, 11 for the day
    for field, mean in (("beer/name", 740), ("review/profileName", 28), ("review/time", 11)):
        counts = table[field].value_counts()
        assert (counts**2).sum() / len(table) == pytest.approx(mean, rel=0.6), field


def test_retrieved_texts_repeat_but_never_within_a_row() -> None:
    table = paper.table("squad", 2_300)
    contexts = [f"context{rank}" for rank in range(1, 6)]
    assert (table[contexts].nunique(axis=1) == 5).all()
    assert table["context1"].nunique() == pytest.approx(500, rel=0.1)
    together = len(table[contexts[:3]].drop_duplicates())
    assert 500 < together < 1_400  # rows of a paragraph mostly find the same others, not always in the same order


def test_groups_share_one_field_each_and_all_fields_serve() -> None:
    table = paper.disjoint_groups(2_000, rows_per_group=250)
    counts = [int((table[field].value_counts() == 250).sum()) for field in table.columns]
    assert counts == [2, 2, 2, 2]
    assert all(set(table[field].value_counts()) == {1, 250} for field in table.columns)
    with pytest.raises(ValueError, match="rows_per_group"):
        paper.disjoint_groups(10, rows_per_group=0)


def test_refuses_what_makes_no_table() -> None:
    with pytest.raises(ValueError, match="rows >= 0"):
        paper.table("beer", -1)
    with pytest.raises(KeyError):
        paper.table("wine")


def test_texts_are_english_of_the_length_asked_for_and_seldom_begin_alike() -> None:
    texts = Texts(generator("a test", 0)).texts(4_000, 25)
    words = pd.Series(texts).str.split()
    assert words.str.len().mean() == pytest.approx(25, rel=0.05)
    assert len(set(texts)) > 3_990
    starts = pd.Series([tuple(w[:4]) for w in words])
    assert starts.duplicated().mean() < 0.1
    assert pd.Series(texts).str.contains('"').mean() > 0.01  # quotes, as in real reviews
    assert all(text == text.strip() and text.endswith(".") for text in texts)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), more=st.integers(0, 200), skew=st.floats(0, 3))
def test_every_entity_has_a_row(count: int, more: int, skew: float) -> None:
    chosen = popular(generator("a test", 0), count, count + more, skew)
    assert len(chosen) == count + more
    assert set(chosen.tolist()) == set(range(count))


def test_entities_need_rows() -> None:
    with pytest.raises(ValueError, match="cannot name"):
        popular(generator("a test", 0), 3, 2, 1.0)
    assert (entities(0, 20), entities(3, 20), entities(1_000, 20)) == (0, 1, 50)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 300), nearest=st.integers(1, 6), per=st.floats(1, 20), topic=st.floats(1, 50))
def test_what_is_retrieved_are_documents_that_are_there(rows: int, nearest: int, per: float, topic: float) -> None:
    documents, found = _retrieved(generator("a test", 0), rows, nearest, per, max(topic, nearest))
    assert found.shape == (rows, nearest)
    assert ((found >= 0) & (found < documents)).all()
    assert all(len(set(row)) == nearest for row in found.tolist())


class TestQueries:
    def test_sixteen_of_five_kinds(self) -> None:
        kinds = [query.kind for query in paper.QUERIES.values()]
        assert {kind: kinds.count(kind) for kind in sorted(set(kinds))} == {"T1": 5, "T2": 5, "T3": 2, "T4": 2, "T5": 2}

    @pytest.mark.parametrize("name", paper.QUERIES)
    def test_a_query_reads_all_fields_of_its_table(self, name: str) -> None:
        query = paper.QUERIES[name]
        assert query.sql.count("llm(") == query.calls
        assert query.sql.count("max_tokens =>") == query.calls
        missing = [column for column in paper.table(query.table, 0).columns if f"`{column}`" not in query.sql]
        assert missing == []

    def test_each_table_has_an_instruction(self) -> None:
        assert all(paper.instruction(name) in paper.QUERIES[f"{kind} {name}"].sql for kind, name in FIRST)


FIRST = [("T1", name) for name in ("movies", "products", "bird", "pdmx", "beer")] + [("T5", "squad"), ("T5", "fever")]
