-- Filter: keep the rows whose answer passes.
-- Which reviews pan a documentary? The plot repeats for every review of a film; it stands first, so that they share it.
-- data: movies

CREATE OR REPLACE TEMPORARY VIEW documentary_reviews AS
SELECT r.review_id, m.title, m.plot, r.quote, r.verdict
FROM reviews AS r
JOIN movies AS m USING (movie_id)
WHERE m.genre LIKE '%Documentary%';

SELECT title, quote, verdict
FROM documentary_reviews
WHERE llm('Classify the sentiment of the review as positive or negative. Reply with one word only.',
          plot, review => quote,
          system => 'You are a sentiment classifier. You reply with one word: positive or negative.',
          max_tokens => 3) ILIKE 'negative%';
