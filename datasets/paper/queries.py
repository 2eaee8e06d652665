"""The 16 queries of Liu et al. (MLSys 2025, section 6.1.2 and appendix C), with instructions written anew.

Five kinds: T1 a filter, T2 a projection, T3 both (the projection runs on what the filter lets through), T4 an
aggregate of answers, T5 an answer from retrieved texts. Each call gets all fields of its table, as in the paper, but
for T3's filter, which reads the review alone. Answers are short, so that prompts make most of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spark_llm.datasets.paper.tables import table

Kind = Literal["T1", "T2", "T3", "T4", "T5"]

_FILTERS = {
    "movies": ("Would this film suit young children? Use all that the fields say. Answer only Yes or No.", "Yes", 2),
    "products": (
        "Does the review speak well of the product (POSITIVE), badly (NEGATIVE), or neither (NEUTRAL)? Answer only "
        "POSITIVE, NEGATIVE or NEUTRAL.",
        "NEGATIVE",
        3,
    ),
    "bird": (
        "The fields are of a post and a comment on it. Is the post about statistics? Answer only YES or NO.",
        "YES",
        2,
    ),
    "pdmx": ("Does anything about this score name a particular person? Answer only YES or NO.", "YES", 2),
    "beer": ("Judging by its description, is this beer from Europe? Answer only YES or NO.", "YES", 2),
}
_PROJECTIONS = {
    "movies": "The fields describe a film and a critic's review. Sum up which of the film's merits earn it praise.",
    "products": "The fields are a product and a review of it. Sum up the product, then say whether its description "
    "agrees with the quality that the reviewer found.",
    "bird": "The fields are of a post in a programmers' community and a comment. Sum up how the comment relates to the "
    "body of the post.",
    "pdmx": "Describe what kind of music this score is, and what its numbers say of it, in 50 words.",
    "beer": "Give a general picture of this beer and of its review in one paragraph of 20 words.",
}
_REVIEWS = {"movies": "reviewcontent", "products": "text"}
_FEELING = "Is the feeling of this review POSITIVE or NEGATIVE? Answer only POSITIVE or NEGATIVE."
_SCORES = {
    "movies": "The fields describe a film and a review of it. How much did the reviewer like it? Answer only with a "
    "whole number from 1 (not at all) to 5 (very much).",
    "products": "The fields describe a product and a review of it. How content is the reviewer? Answer only with a "
    "whole number from 1 (not at all) to 5 (very).",
}
_RETRIEVAL = {
    "fever": (
        "You get a claim and four pieces of evidence. Answer only SUPPORTS if the evidence supports the claim, REFUTES "
        "if it contradicts it, or NOT ENOUGH INFO if it does neither.",
        3,
    ),
    "squad": ("Answer the question from the contexts that come with it.", 10),
}
_PROJECTED_TOKENS = 10


@dataclass(frozen=True, slots=True)
class PaperQuery:
    """A query over the view that has the name of its table. calls: how many llm() calls it makes of a row."""

    kind: Kind
    table: str
    sql: str
    calls: int = 1


def _queries() -> dict[str, PaperQuery]:
    queries = [
        PaperQuery("T1", name, f"SELECT count(*) AS found FROM {name}\nWHERE {_call(text, name, most)} = '{label}'")
        for name, (text, label, most) in _FILTERS.items()
    ]
    for name, text in _PROJECTIONS.items():
        queries.append(PaperQuery("T2", name, f"SELECT {_call(text, name, _PROJECTED_TOKENS)} AS answer FROM {name}"))
    for name, review in _REVIEWS.items():
        answer = _call(_PROJECTIONS[name], name, _PROJECTED_TOKENS)
        feeling = f"llm({_literal(_FEELING)},\n  {review}, max_tokens => 3)"
        # the demo model seldom says exactly POSITIVE, and a filter that lets nothing through would test one call
        sql = f"SELECT {answer} AS answer FROM {name}\nWHERE {feeling} <> 'NEGATIVE'"
        queries.append(PaperQuery("T3", name, sql, calls=2))
    for name, text in _SCORES.items():
        score = f"avg(try_cast({_call(text, name, 2)} AS DOUBLE))"
        queries.append(PaperQuery("T4", name, f"SELECT {score} AS score FROM {name}"))
    for name, (text, most) in _RETRIEVAL.items():
        queries.append(PaperQuery("T5", name, f"SELECT {_call(text, name, most)} AS answer FROM {name}"))
    return {f"{query.kind} {query.table}": query for query in queries}


def instruction(name: str) -> str:
    """The instruction of a table's first query (filter or retrieval)."""
    return _FILTERS[name][0] if name in _FILTERS else _RETRIEVAL[name][0]


def _call(text: str, name: str, most: int) -> str:
    """The call over all fields of the table, by name: Spark takes no ``*`` in WHERE."""
    fields = ", ".join(f"`{column}`" for column in table(name, 0).columns)
    return f"llm({_literal(text)},\n  {fields}, max_tokens => {most})"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


QUERIES: Mapping[str, PaperQuery] = _queries()
