"""ai_embed and ai_similarity on the real engine and the packaged encoder, beside transformers."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import SparkSession

import spark_llm
from spark_llm.engine.model.source import packaged_encoder

pytestmark = [pytest.mark.spark, pytest.mark.model]

TEXTS = (
    "A puppy makes a noise in the yard.",
    "The stock market fell sharply on Friday.",
    "Bread is baked in a hot oven",
    "it arrived broken and nobody answered my mails",
    "É um dia bonito, não é? 100 % 🌞",
    "",
)


@pytest.fixture(scope="module")
def session(spark: SparkSession) -> SparkSession:
    """A session whose encoder computes in float32, with a table of the texts, one of them twice, and a NULL."""
    session = spark_llm.enable(spark.newSession(), engine_dtype="float32", engine_threads=1, cache_enabled=False)
    rows = [*enumerate(TEXTS), (len(TEXTS), TEXTS[0]), (len(TEXTS) + 1, None)]
    session.createDataFrame(rows, "id int, t string").repartition(2).createOrReplaceTempView("texts")
    return session


def expected(texts: tuple[str, ...]) -> np.ndarray:
    """float32 [texts, 384]: transformers' last layer, the mean over a text's tokens, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(packaged_encoder())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for text in texts:
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            found.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(found)


def test_vectors_are_those_of_transformers(session: SparkSession) -> None:
    found = {row.id: row.v for row in session.sql("SELECT id, ai_embed(t) AS v FROM texts").collect()}
    assert found[len(TEXTS) + 1] is None
    assert found[len(TEXTS)] == found[0]
    vectors = np.array([found[number] for number in range(len(TEXTS))], np.float32)
    assert vectors.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(vectors, expected(TEXTS), atol=1e-5)
    report = spark_llm.last_report(session)
    assert report is not None
    assert (report.rows, report.nulls, report.failed, report.output_tokens) == (8, 1, 0, 0)
    assert (report.calls, report.duplicates) == (6, 1)


def test_search_finds_what_means_alike(session: SparkSession) -> None:
    def nearest(question: str) -> str:
        query = f"SELECT t FROM texts WHERE t > '' ORDER BY ai_similarity(t, '{question}') DESC LIMIT 1"
        return session.sql(query).collect()[0].t

    assert nearest("a young dog barks") == TEXTS[0]
    assert nearest("shares lost value") == TEXTS[1]
    assert nearest("how to make a loaf") == TEXTS[2]
    assert nearest("damaged parcel, bad service") == TEXTS[3]


def test_similarity_is_the_cosine(session: SparkSession) -> None:
    vectors = expected(TEXTS)
    pairs = session.sql(
        "SELECT a.id AS one, b.id AS other, ai_similarity(a.t, b.t) AS s FROM texts AS a JOIN texts AS b "
        f"ON a.id < b.id WHERE b.id < {len(TEXTS)}"
    ).collect()
    assert len(pairs) == len(TEXTS) * (len(TEXTS) - 1) // 2
    for one, other, similarity in pairs:
        assert similarity == pytest.approx(float(vectors[one] @ vectors[other]), abs=1e-5)
    assert session.sql(f"SELECT ai_similarity('{TEXTS[2]}', '{TEXTS[2]}')").collect() == [(1.0,)]


def test_long_texts_are_errors_of_their_rows_or_cut(session: SparkSession) -> None:
    session.sql("SELECT * FROM VALUES (1, 'short'), (2, repeat('word ', 600)) AS v(id, t)").createOrReplaceTempView("v")
    query = "SELECT id, ai_embed(t, failOnError => false, usage => true {}) AS v FROM v ORDER BY id"
    short, long = (row.v for row in session.sql(query.format("")).collect())
    assert short.errorMessage is None
    assert short.usage.prompt_tokens == 3  # with what the encoder puts around a text
    assert long.result is None
    assert "[LLM_CONTEXT_LENGTH_EXCEEDED]" in long.errorMessage
    _, cut = (row.v for row in session.sql(query.format(", truncate => 'longest'")).collect())
    assert len(cut.result) == 384
    assert cut.usage.prompt_tokens == 256


def test_a_prompt_and_vectors_in_one_query(session: SparkSession) -> None:
    """Two engines: the model of answers is asked only about what the encoder leaves."""
    query = (
        "SELECT id, llm('What is it about? One word.', t, max_tokens => 3) AS about FROM texts "
        "WHERE llm('Is there an animal in it?', t, returns => 'BOOLEAN') IS NOT NULL AND "
        "ai_similarity(t, 'a dog barks') > 0.3"
    )
    assert sorted(row.id for row in session.sql(query).collect()) == [0, len(TEXTS)]
    report = spark_llm.last_report(session)
    assert report is not None
    assert report.by_call["Is there an animal in it?\nAnswer true or false."].calls == 1
