-- Aggregates over answers: what the critics of each film agree on, and the review that says most about the acting.
-- data: movies

SELECT m.title,
       count(*) AS reviews,
       ai_agg(r.quote, 'What do these critics say about the film?', max_tokens => 32) AS verdict,
       ai_top_k(r.quote, 'talks about the acting', 1)[0] AS about_acting
FROM reviews AS r
JOIN movies AS m USING (movie_id)
WHERE m.genre LIKE '%Biography%'
GROUP BY m.title
ORDER BY m.title
LIMIT 5;
