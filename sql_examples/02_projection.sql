-- Projection: a text column that the model writes.
-- Why does each critic like or dislike the film? The plot, which all reviews of a film share, stands first.
-- data: movies

CREATE OR REPLACE TEMPORARY VIEW sport_film_reviews AS
SELECT r.review_id, m.title, m.plot, r.quote, r.verdict
FROM reviews AS r
JOIN movies AS m USING (movie_id)
WHERE m.genre LIKE '%Sport%';

SELECT title, quote, verdict,
       llm('Why does the critic like or dislike the film? Answer in a few words.',
           plot, review => quote,
           max_tokens => 10) AS reason
FROM sport_film_reviews;
