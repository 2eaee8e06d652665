"""PDMX: the shape of the metadata table of public domain scores, 57 fields of which most are short and repeat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from spark_llm.datasets.paper.texts import Ints, Strings, Texts, entities, generator, missing, popular

_LICENCES = ("publicdomain", "cc-zero")
_LICENCE_URLS = (
    "https://creativecommons.org/publicdomain/mark/1.0/",
    "https://creativecommons.org/publicdomain/zero/1.0/",
)
_GENRES = ("classical", "folk", "religiousmusic", "jazz", "soundtrack", "pop", "worldmusic", "rock", "holiday")
_TRACKS = ("0", "0-0", "0-0-0-0", "52-52-52-52", "73", "40", "40-40-41-42", "56-57", "65", "24", "0-73", "6")


def pdmx(rows: int, seed: int = 0) -> pd.DataFrame:
    """PDMX: a score a row, in the column order of the published PDMX.csv.

    Known: the fields (appendix B lists 60; without postdate, postid and text, which are BIRD's, they are the 57 of
    table 1), that path and metadata determine each other, and that hasannotations, hasmetadata, isdraft, isofficial,
    isuserpublisher and subsetall do, which only fields that are the same almost everywhere can; paths end in
    46-character hashes; 738 input tokens. Assumed: that there are 1.8 scores of a song on average and many of a few,
    so that bestpath and its like repeat; how often tags, genres and subtitles are missing; that composers and
    publishers follow a heavy tail; the numbers' distributions. The paper's algorithm finds less here (30 %) than the
    paper says of the real table (57 %): more of that must repeat.
    """
    random = generator("pdmx", seed)
    texts = Texts(random)
    hashes = "Qm" + texts.hashes(rows, 44)
    folders = np.array([f"{key[2]}/{key[3]}" for key in hashes], object)
    path = "./data/" + folders + "/" + hashes + ".json"

    def flag(share: float) -> npt.NDArray[np.bool_]:
        return random.random(rows) < share

    def counts(mean: float, share: float = 1.0) -> npt.NDArray[np.int64]:
        drawn = np.rint(random.lognormal(np.log(mean), 1.1, rows)).astype(np.int64)
        return np.where(flag(share), np.maximum(drawn, 1), 0)

    def some(values: Strings, share: float, skew: float = 1.2) -> Strings:
        chosen = values[popular(random, len(values), max(rows, len(values)), skew)[:rows]]
        return missing(chosen, flag(1 - share))

    def best_of(versions: Ints) -> tuple[Strings, npt.NDArray[np.bool_]]:
        _, first, song = np.unique(versions, return_index=True, return_inverse=True)
        return path[first[song]], first[song] == np.arange(rows)

    odd = flag(0.002)  # the group of fields that determine each other
    licence = random.choice(2, rows, p=[0.85, 0.15])
    rated, has_lyrics, has_annotations = flag(0.06), flag(0.3), ~odd
    title = texts.texts(rows, 4, spread=0.5, end="")
    songname = np.where(flag(0.75), title, texts.texts(rows, 4, spread=0.5, end=""))
    composers = texts.names(entities(rows, 9), 2)
    bars, beats_a_bar = counts(40), random.choice([4, 3, 2, 6], rows, p=[0.6, 0.2, 0.1, 0.1])
    beats = bars * beats_a_bar
    seconds = np.round(beats * 60.0 / random.choice([120, 100, 80, 60, 140], rows, p=[0.6, 0.1, 0.1, 0.1, 0.1]), 1)
    notes = counts(350)
    song = popular(random, entities(rows, 1.8), rows, 1.6)
    arrangement = np.where(flag(0.8), song, rows + np.arange(rows))
    best_path, is_best = best_of(song)
    best_arrangement, is_best_arrangement = best_of(arrangement)
    best_unique, is_best_unique = best_of(np.where(flag(0.9), arrangement, 2 * rows + np.arange(rows)))
    tracks = np.array(_TRACKS, object)[random.choice(len(_TRACKS), rows, p=_zipf(len(_TRACKS)))]
    return pd.DataFrame(
        {
            "id": random.permutation(np.arange(rows)) + 1_000_000,
            "path": path,
            "metadata": "./metadata/" + folders + "/" + hashes + ".json",
            "hasmetadata": ~odd,
            "version": random.choice(np.array(["3.01", "2.06", "3.02", "2.0", "4.00"], object), rows, p=_zipf(5)),
            "isuserpro": flag(0.2),
            "isuserpublisher": odd,
            "isuserstaff": flag(0.01),
            "haspaywall": flag(0.01),
            "isofficial": odd,
            "isoriginal": flag(0.25),
            "isdraft": odd,
            "hascustomaudio": flag(0.02),
            "hascustomvideo": flag(0.02),
            "ncomments": counts(2, 0.1),
            "nfavorites": counts(4, 0.45),
            "nviews": counts(180),
            "nratings": np.where(rated, counts(4), 0),
            "rating": np.where(rated, np.round(random.uniform(3.0, 5.0, rows), 2), 0.0),
            "license": np.array(_LICENCES, object)[licence],
            "licenseurl": np.array(_LICENCE_URLS, object)[licence],
            "genre": some(np.array(_GENRES, object), 0.12),
            "groups": some(texts.names(entities(rows, 60), 2), 0.1),
            "tags": some(texts.names(entities(rows, 12), 1), 0.35),
            "songname": songname,
            "title": title,
            "subtitle": missing(texts.texts(rows, 4, end=""), flag(0.75)),
            "artistname": some(composers, 0.3),
            "composername": some(composers, 0.8),
            "publisher": some(texts.names(entities(rows, 100), 2), 0.05),
            "complexity": random.choice([0, 1, 2, 3], rows, p=[0.15, 0.35, 0.35, 0.15]),
            "ntracks": np.array([len(text.split("-")) for text in tracks], np.int64),
            "tracks": tracks,
            "songlength": beats * 480,
            "songlengthseconds": seconds,
            "songlengthbars": bars,
            "songlengthbeats": beats,
            "nnotes": notes,
            "notesperbar": np.round(notes / np.maximum(bars, 1), 4),
            "nannotations": counts(40),
            "hasannotations": has_annotations,
            "nlyrics": np.where(has_lyrics, counts(90), 0),
            "haslyrics": has_lyrics,
            "ntokens": notes + counts(60),
            "pitchclassentropy": np.round(random.normal(2.6, 0.3, rows), 6),
            "scaleconsistency": np.round(np.minimum(1.0, random.normal(0.96, 0.04, rows)), 6),
            "grooveconsistency": np.round(np.minimum(1.0, random.normal(0.98, 0.02, rows)), 6),
            "bestpath": best_path,
            "isbestpath": is_best,
            "bestarrangement": best_arrangement,
            "isbestarrangement": is_best_arrangement,
            "bestuniquearrangement": best_unique,
            "isbestuniquearrangement": is_best_unique,
            "subsetall": ~odd,
            "subsetrated": rated,
            "subsetdeduplicated": is_best & is_best_unique,
            "subsetrateddeduplicated": rated & is_best & is_best_unique,
        }
    )


def _zipf(values: int) -> npt.NDArray[np.float64]:
    weights = 1.0 / np.arange(1, values + 1)
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares
