-- Retrieval-augmented: for each question the three best matching reviews of each camera, by BM25 in plain SQL, and an
-- answer from each of them. A review that many questions retrieve stands first in their prompts and is shared.
-- data: products

CREATE OR REPLACE TEMPORARY VIEW retrieved AS
WITH passages AS (
  SELECT r.review_id, p.name AS camera, r.body, size(split(r.body, ' ')) AS length
  FROM product_reviews AS r
  JOIN products AS p USING (product_id)
  WHERE p.category = 'digital camera' AND length(r.body) < 1200
),
words AS (
  SELECT review_id, camera, length, word, count(*) AS n
  FROM (SELECT *, explode(regexp_extract_all(lower(body), '([a-z]+)', 1)) AS word FROM passages)
  GROUP BY review_id, camera, length, word
),
weights AS (
  SELECT word, ln((SELECT count(*) FROM passages) / count(*)) AS weight FROM words GROUP BY word
),
asked AS (
  SELECT question_id, question, explode(regexp_extract_all(lower(question), '([a-z]+)', 1)) AS word
  FROM questions
  WHERE category = 'digital camera'
),
scored AS (
  SELECT question_id, question, camera, review_id,
         sum(weight * n * 2.2 / (n + 0.3 + 0.9 * length / 120)) AS relevance
  FROM asked
  JOIN words USING (word)
  JOIN weights USING (word)
  GROUP BY question_id, question, camera, review_id
),
ranked AS (
  SELECT *, row_number() OVER (PARTITION BY question_id, camera ORDER BY relevance DESC, review_id) AS rank
  FROM scored
)
SELECT camera, question_id, question, rank, review_id, passages.body AS review
FROM ranked
JOIN passages USING (review_id, camera)
WHERE rank <= 3;

SELECT camera, question, rank, review_id,
       llm('Answer the question from the review in a few words.',
           review, question,
           max_tokens => 10) AS answer
FROM retrieved;
