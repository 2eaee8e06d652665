-- Filter: keep the rows whose answer passes.
-- Which sentences of reviews of a phone complain? A sentence is judged within its review, so the review repeats
-- for each of its sentences; it stands first, so that they share it.
-- data: products

CREATE OR REPLACE TEMPORARY VIEW phone_sentences AS
SELECT review_id, sentence_no, p.name AS product, r.body AS review, s.sentence, s.score
FROM review_sentences AS s
JOIN product_reviews AS r USING (review_id)
JOIN products AS p USING (product_id)
WHERE p.category = 'mobile phone' AND length(r.body) < 800;

SELECT review_id, sentence_no, sentence, score AS score_by_people
FROM phone_sentences
WHERE llm('Classify the sentiment of the sentence as positive or negative. Reply with one word only.',
          product, review, sentence,
          system => 'You are a sentiment classifier. You reply with one word: positive or negative.',
          max_tokens => 3) ILIKE 'negative%';
