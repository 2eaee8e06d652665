"""Long texts that several rows share: the shapes of BIRD (a post and its comments), SQuAD and FEVER (retrieval)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from spark_llm.datasets.paper.texts import Ints, Strings, Texts, entities, generator, popular

COMMENTS_PER_POST = 12.0
QUESTIONS_PER_PARAGRAPH = 4.6  # SQuAD 1.1: 87,599 questions on 18,896 paragraphs of 442 articles
PARAGRAPHS_PER_ARTICLE = 43.0
CLAIMS_PER_PAGE = 5.0
PAGES_PER_TOPIC = 30.0


def bird(rows: int, seed: int = 0) -> pd.DataFrame:
    """BIRD: comments joined with their post (codebase_community, a Stack Exchange site).

    Known: the fields, that Body and PostId determine each other (appendix B), that a Body is HTML, 765 input tokens.
    Assumed: 560 tokens a Body, 45 a comment and 12 comments a post, which leave unshared what the paper's hit rate of
    85 % leaves; PostDate is the comment's, to the second.
    """
    random = generator("bird", seed)
    texts = Texts(random)
    count = entities(rows, COMMENTS_PER_POST)
    paragraphs = random.integers(3, 8, count)
    drawn = texts.texts(int(paragraphs.sum()), 78, spread=0.6)
    ends = np.cumsum(paragraphs)
    bodies = np.empty(count, object)
    bodies[:] = [
        "<p>" + "</p>\n\n<p>".join(drawn[end - n : end]) + "</p>\n" for end, n in zip(ends, paragraphs, strict=True)
    ]
    post = popular(random, count, rows, 0.5)
    seconds = 1_279_000_000 + random.integers(0, 130_000_000, rows)
    return pd.DataFrame(
        {
            "Body": bodies[post],
            "PostDate": pd.to_datetime(seconds, unit="s").strftime("%Y-%m-%d %H:%M:%S.0").to_numpy(object),
            "PostId": (random.permutation(count) * 11 + 1)[post],
            "Text": texts.texts(rows, 36, spread=0.6),
        }
    )


def squad(rows: int, seed: int = 0) -> pd.DataFrame:
    """SQuAD: questions with the five paragraphs that a vector index found for them, the nearest first.

    Known: five contexts a question (section 6.1.2), the fields (appendix B: six, though table 1 says five), 1,047
    input tokens; 4.6 questions a paragraph and 43 paragraphs an article in SQuAD 1.1. Assumed: how far what the index
    finds agrees between questions, set so that hit rates come near the paper's.
    """
    random = generator("squad", seed)
    texts = Texts(random)
    paragraphs, found = _retrieved(random, rows, 5, QUESTIONS_PER_PARAGRAPH, PARAGRAPHS_PER_ARTICLE)
    context = texts.texts(paragraphs, 138, spread=0.4)
    columns: dict[str, Strings] = {"question": texts.texts(rows, 11, spread=0.3, end="?")}
    return pd.DataFrame(columns | {f"context{rank + 1}": context[found[:, rank]] for rank in range(5)})


def fever(rows: int, seed: int = 0) -> pd.DataFrame:
    """FEVER: claims with the four pieces of evidence that a vector index found for them, the nearest first.

    Known: four pieces of evidence a claim (section 6.1.2), the fields (appendix B), 1,302 input tokens. Assumed: five
    claims a page, 30 pages on a topic, and how far what the index finds agrees between claims, set as for
    SQuAD.
    """
    random = generator("fever", seed)
    texts = Texts(random)
    pages, found = _retrieved(random, rows, 4, CLAIMS_PER_PAGE, PAGES_PER_TOPIC)
    evidence = texts.texts(pages, 235, spread=0.5)
    columns: dict[str, Strings] = {"claim": texts.texts(rows, 9, spread=0.3)}
    return pd.DataFrame(columns | {f"evidence{rank + 1}": evidence[found[:, rank]] for rank in range(4)})


def _retrieved(
    random: np.random.Generator, rows: int, nearest: int, rows_per_document: float, documents_per_topic: float
) -> tuple[int, Ints]:
    """How many documents there are, and int64 [rows, nearest]: those found for each row, the nearest first.

    Documents of a topic are random points in six dimensions; a row is its own document's point and a tenth as much
    noise. So a row finds its own document first, and rows of one document mostly find the same others, sometimes in
    another order; the noise is what gives a fixed field order nearly the hit rates of the paper. Found documents are
    of the row's topic.
    """
    documents = max(nearest, entities(rows, rows_per_document))
    topics = max(1, min(round(documents / documents_per_topic), documents // nearest))
    bounds = np.linspace(0, documents, topics + 1).astype(np.int64)
    points = random.normal(size=(documents, _DIMENSIONS))
    own = np.sort(popular(random, min(documents, rows), rows, 0.3)) if rows else np.empty(0, np.int64)
    asked = points[own] + _NOISE * random.normal(size=(rows, _DIMENSIONS))
    found = np.empty((rows, nearest), np.int64)
    cuts = np.searchsorted(own, bounds)
    for topic in range(topics):
        first, last = bounds[topic], bounds[topic + 1]
        some = slice(cuts[topic], cuts[topic + 1])
        distance = np.square(asked[some, None, :] - points[None, first:last, :]).sum(axis=2)
        found[some] = first + np.argsort(distance, axis=1, kind="stable")[:, :nearest]
    return documents, found[random.permutation(rows)]


_DIMENSIONS = 6
_NOISE = 0.1
