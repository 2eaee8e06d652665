-- Two calls in one query: the first decides which rows the second sees.
-- Reviews that pan a film, with what the film is about. The second call depends on the plot alone: reviews of one
-- film ask the same question, which is answered once.
-- data: movies

CREATE OR REPLACE TEMPORARY VIEW war_film_reviews AS
SELECT r.review_id, m.title, m.plot, r.quote, r.verdict
FROM reviews AS r
JOIN movies AS m USING (movie_id)
WHERE m.genre LIKE '%War%';

SELECT title, quote, verdict,
       llm('What is the film about? Answer in a few words.', plot, max_tokens => 10) AS about
FROM war_film_reviews
WHERE llm('Classify the sentiment of the review as positive or negative. Reply with one word only.',
          plot, review => quote,
          system => 'You are a sentiment classifier. You reply with one word: positive or negative.',
          max_tokens => 3) ILIKE 'negative%';
