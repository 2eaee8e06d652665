-- Aggregation over answers: the share of favourable reviews of each film, beside the critics' own verdicts.
-- data: movies

CREATE OR REPLACE TEMPORARY VIEW biography_reviews AS
SELECT r.review_id, m.title, m.plot, r.quote, r.verdict
FROM reviews AS r
JOIN movies AS m USING (movie_id)
WHERE m.genre LIKE '%Biography%';

SELECT title,
       count(*) AS reviews,
       round(100 * avg(CASE WHEN sentiment ILIKE 'positive%' THEN 1 WHEN sentiment ILIKE 'negative%' THEN 0 END))
         AS percent_positive,
       round(100 * avg(CASE WHEN verdict = 'fresh' THEN 1 ELSE 0 END)) AS percent_fresh,
       count_if(NOT (sentiment ILIKE 'positive%' OR sentiment ILIKE 'negative%')) AS other_answers
FROM (
  SELECT title, verdict,
         llm('Classify the sentiment of the review as positive or negative. Reply with one word only.',
             plot, review => quote,
             system => 'You are a sentiment classifier. You reply with one word: positive or negative.',
             max_tokens => 3) AS sentiment
  FROM biography_reviews
)
GROUP BY title
ORDER BY percent_positive DESC;
