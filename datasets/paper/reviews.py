"""Reviews of something that repeats: the shapes of Movies, Products and Beer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from spark_llm.datasets import films
from spark_llm.datasets.paper.texts import Ints, Strings, Texts, entities, generator, missing, popular

REVIEWS_PER_MOVIE = 20.0
REVIEWS_PER_PRODUCT = 20.0
REVIEWS_PER_BEER = 20.0  # 28,479 / 1,423
REVIEWS_PER_DRINKER = 5.86  # 28,479 / 4,862
REVIEWS_PER_DAY = 7.62  # 28,479 / 3,738


def movies(rows: int, seed: int = 0) -> pd.DataFrame:
    """Movies: critics' reviews joined with their film (Rotten Tomatoes).

    Known: the fields, and that movieinfo, movietitle and rottentomatoeslink determine each other (appendix B); 51
    films of 20 reviews, 333 characters of movieinfo and 91 of reviewcontent, a fifth of the reviews without text, in
    the sample of 1,019 rows that the authors published. Assumed: that all films have about as many reviews; genres
    and productioncompany of a film repeat with it; 62 % Fresh, 25 % top critics. Titles and genres are Wikidata's.
    """
    random = generator("movies", seed)
    texts = Texts(random)
    count = entities(rows, REVIEWS_PER_MOVIE)
    known = films.load()["films"].drop_duplicates("title")
    number = np.arange(count)
    chosen = random.permutation(len(known))[number % len(known)]
    sequel = np.array(["" if n < len(known) else f" ({n // len(known) + 1})" for n in number.tolist()], object)
    title = known["title"].to_numpy(object)[chosen] + sequel
    film = popular(random, count, rows, 0.15)
    link = [
        "m/" + "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) + f"_{n}"
        for name, n in zip(title, number.tolist(), strict=True)
    ]
    info = texts.texts(count, 58, spread=0.35)
    company = texts.names(entities(count, 3), 2)[random.integers(0, entities(count, 3), count)]
    content = missing(texts.texts(rows, 20), random.random(rows) < 0.2)
    return pd.DataFrame(
        {
            "genres": known["genre"].fillna("Drama").to_numpy(object)[chosen][film],
            "movieinfo": info[film],
            "movietitle": title[film],
            "productioncompany": (company + " Pictures")[film],
            "reviewcontent": content,
            "reviewtype": np.where(random.random(rows) < 0.62, "Fresh", "Rotten").astype(object),
            "rottentomatoeslink": np.array(link, object)[film],
            "topcritic": random.random(rows) < 0.25,
        }
    )


def products(rows: int, seed: int = 0) -> pd.DataFrame:
    """Products: Amazon reviews joined with the product's description.

    Known: the fields, and that parent_asin and product_title determine each other, but not the description (appendix
    B): some products share one. Assumed: 20 reviews a product, popular ones many more; 170 tokens of description, 30
    of review text, which give the paper's 377 input tokens and leave unshared what its hit rate of 83 % leaves.
    """
    random = generator("products", seed)
    texts = Texts(random)
    count = entities(rows, REVIEWS_PER_PRODUCT)
    descriptions = texts.texts(entities(count, 1.25), 135, spread=0.5)
    product = popular(random, count, rows, 0.8)
    title = texts.texts(count, 14, spread=0.4, end="")
    asin = "B0" + texts.hashes(count, 8)
    return pd.DataFrame(
        {
            "description": descriptions[random.integers(0, len(descriptions), count)][product],
            "id": random.permutation(np.arange(rows)) + 100_000,
            "parent_asin": np.array([text.upper() for text in asin], object)[product],
            "product_title": title[product],
            "rating": random.choice([1.0, 2.0, 3.0, 4.0, 5.0], rows, p=[0.13, 0.06, 0.08, 0.13, 0.6]),
            "review_title": texts.texts(rows, 4, spread=0.6, end=""),
            "text": texts.texts(rows, 24, spread=0.8),
            "verified_purchase": random.random(rows) < 0.91,
        }
    )


def beer(rows: int, seed: int = 0) -> pd.DataFrame:
    """Beer: RateBeer reviews, short fields only, stored beer by beer.

    Known, from the table of 28,479 rows that the authors published: the fields (nine, though table 1 of the paper
    says eight), that beer/beerId and beer/name determine each other and beer/style; 1,423 beers of which three have
    a quarter of the reviews, 78 styles, 4,862 reviewers with a heavy tail, 3,738 days, 20, 10, 5 and 5 different
    marks, which go together; the lengths of all fields. Assumed: the rest of their joint distribution, for example
    that a reviewer's day holds 1.25 reviews.
    """
    random = generator("beer", seed)
    texts = Texts(random)
    count = entities(rows, REVIEWS_PER_BEER)
    beer_of = np.sort(popular(random, count, rows, 1.9))
    styles = texts.names(entities(rows, 365), 2)
    style = styles[popular(random, len(styles), max(count, len(styles)), 0.9)[:count]]
    brewery = texts.names(entities(count, 12), 2)[np.sort(random.integers(0, entities(count, 12), count))]
    profile, day = _visits(random, texts, rows)
    mark = random.normal(0.0, 1.0, rows)

    def marks(mean: float, spread: float, agreement: float, best: int) -> Strings:
        noise = random.normal(0.0, 1.0, rows)
        value = mean + spread * (agreement * mark + np.sqrt(1 - agreement**2) * noise)
        return np.array([f"{int(v)}/{best}" for v in np.clip(np.rint(value), 1, best)], object)

    return pd.DataFrame(
        {
            "review/profileName": profile,
            "review/time": day,
            "review/overall": marks(14.0, 2.8, 0.95, 20),
            "review/taste": marks(6.8, 1.4, 0.9, 10),
            "review/palate": marks(3.4, 0.85, 0.75, 5),
            "review/appearance": marks(3.55, 0.8, 0.6, 5),
            "beer/name": (brewery + " " + texts.names(count, 2))[beer_of],
            "beer/style": style[beer_of],
            "beer/beerId": (random.permutation(count) * 37 + 1_000)[beer_of],
        }
    )


def _visits(random: np.random.Generator, texts: Texts, rows: int) -> tuple[Strings, Ints]:
    """Who reviews and when (seconds since the epoch at midnight); people review several beers on a day."""
    visits = entities(rows, 1.25)
    people = entities(rows, REVIEWS_PER_DRINKER)
    names = texts.names(people, 1) if people <= 1_000 else texts.names(people, 2)
    short = np.array([name.replace(" ", "")[:10] for name in names], object)
    digits = np.array([str(n % 1_000) if n % 3 else "" for n in range(people)], object)
    days = 951_782_400 + 86_400 * np.sort(random.choice(4_500, min(4_500, entities(rows, REVIEWS_PER_DAY)), False))
    person = popular(random, min(people, visits), visits, 1.35)
    day = popular(random, min(len(days), visits), visits, 0.75)
    visit = popular(random, visits, rows, 0.4)
    return (short + digits)[person][visit], days[day][visit]
