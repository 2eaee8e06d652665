"""Prompts made of segments -> token ids, equal to those of the whole string, each distinct piece encoded once.

A piece is a run of segments without an exact cut inside (cuts.py); the template's text beside the message joins
the first or last piece unless a cut or a special token stands between. Special tokens of the template become
ids directly; text of rows and instructions is encoded with special tokens not recognised, so that no field can
forge the end of its turn. For text that holds no special token this gives the ids of transformers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from spark_llm.engine.request import TokenIds
from spark_llm.engine.text.batch import Ints, SegmentBatch
from spark_llm.engine.text.cuts import CutRule, without_prefix
from spark_llm.engine.text.pieces import PieceEncoder
from spark_llm.engine.text.template import ChatFrame

_MOST_FRAMES = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """A ChatFrame in ids, but for the text that touches the message. ``first`` encodes a row's first piece."""

    head_ids: TokenIds
    head_text: str
    tail_text: str
    tail_ids: TokenIds
    first: PieceEncoder


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """The pieces of all rows in order. Row i owns pieces ``rows[i]:rows[i + 1]`` and atoms ``atom_rows[i]:...``.

    atoms: numbers into ``texts``. starts, ends: each piece's atoms. codes: each piece's number into ``texts``.
    """

    texts: list[str]
    atoms: Ints
    atom_rows: Ints
    starts: Ints
    ends: Ints
    codes: Ints
    rows: Ints


class SegmentEncoder:
    """Encodes batches of segments with a tokenizer of which exact cuts are known.

    Changes ``tokenizer``: it no longer recognises special tokens in text. Safe to call from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, rule: CutRule, cache_bytes: int) -> None:
        self._rule = rule
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token.content: token_id for token_id, token in added if token.special}
        names = sorted(self._special, key=len, reverse=True)
        self._find_special = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        rewrites = rule.prefix != "never"
        # Such tokens reach beyond their own characters; a template that uses one is not taken apart here.
        self._wide = {
            token.content
            for _, token in added
            if token.lstrip or token.rstrip or token.single_word or (token.normalized and rewrites)
        }
        tokenizer.encode_special_tokens = True
        self._start = self._after_special = self._inside = PieceEncoder(tokenizer, cache_bytes // 2)
        if rewrites:
            bare = without_prefix(tokenizer)
            bare.encode_special_tokens = True
            self._inside = PieceEncoder(bare, cache_bytes // 2)
            self._after_special = self._start if rule.prefix == "always" else self._inside
        self._frames: dict[ChatFrame, _Frame] = {}

    def supports(self, frame: ChatFrame) -> bool:
        """False if the frame's special tokens take in what stands beside them."""
        found = self._find_special.findall(frame.prefix) + self._find_special.findall(frame.suffix)
        return self._wide.isdisjoint(found)

    def encode(
        self, frame: ChatFrame, batch: SegmentBatch, leading: Sequence[int]
    ) -> tuple[list[TokenIds], list[Ints]]:
        """Each row's prompt in ids, and how many of them are template prefix and ``leading[i]`` leading segments.

        A token that reaches beyond those segments does not count.
        """
        num_rows = len(batch.offsets) - 1
        if num_rows == 0:
            return [], [np.empty(0, np.int64) for _ in leading]
        fixed = self._frames.get(frame) or self._remember(frame)
        batch = batch.message(frame.strips_start, frame.strips_end)
        pieces = self._cut(fixed, batch)
        leads = np.zeros(len(pieces.codes), np.int64)
        if fixed.first is not self._inside:
            leads[pieces.rows[:-1][np.diff(pieces.rows) > 0]] = 1
        used, which = np.unique(pieces.codes * 2 + leads, return_inverse=True)
        table = self._encode_distinct(fixed, pieces.texts, used)
        lengths = np.array([len(ids) for ids in table], np.int64)[which]

        # Two parts more a row: head and tail.
        table += [fixed.head_ids, fixed.tail_ids]
        sequence = np.full(len(which) + 2 * num_rows, len(table) - 1, np.int64)
        row_of_piece = np.repeat(np.arange(num_rows), np.diff(pieces.rows))
        sequence[pieces.rows[:-1] + 2 * np.arange(num_rows)] = len(table) - 2
        sequence[np.arange(len(which)) + 2 * row_of_piece + 1] = which
        flat = np.concatenate([table[part] for part in sequence.tolist()])
        before = np.concatenate(([0], np.cumsum(lengths)))
        around = len(fixed.head_ids) + len(fixed.tail_ids)
        bounds = (before[pieces.rows] + around * np.arange(num_rows + 1)).tolist()
        prompts = [flat[start:end] for start, end in itertools.pairwise(bounds)]

        counts = []
        for segments in leading:
            limits = pieces.atom_rows[:-1] + np.minimum(np.diff(batch.offsets), segments) + bool(fixed.head_text)
            counts.append(self._tokens_before(fixed, pieces, limits, before, leads) + len(fixed.head_ids))
        return prompts, counts

    def _cut(self, fixed: _Frame, batch: SegmentBatch) -> _Pieces:
        """The rows' atoms (head text, segments, tail text) grouped into pieces."""
        texts = [*batch.texts, fixed.head_text, fixed.tail_text]
        head, tail = bool(fixed.head_text), bool(fixed.tail_text)
        atom_rows = batch.offsets + (head + tail) * np.arange(len(batch.offsets))
        atoms = np.full(atom_rows[-1], -1, np.int64)
        if head:
            atoms[atom_rows[:-1]] = len(texts) - 2
        if tail:
            atoms[atom_rows[1:] - 1] = len(texts) - 1
        atoms[atoms < 0] = batch.codes

        ends, begins = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
        for code in np.unique(atoms).tolist():
            ends[code] = self._rule.ends(texts[code])
            begins[code] = self._rule.begins(texts[code])
        is_start = np.empty(len(atoms), bool)
        is_start[1:] = ends[atoms[:-1]] & begins[atoms[1:]]
        is_start[atom_rows[:-1][np.diff(atom_rows) > 0]] = True
        starts = np.flatnonzero(is_start)
        stops = np.append(starts[1:], len(atoms)) if len(starts) else starts
        codes = atoms[starts]
        listed, joined = atoms.tolist(), dict[tuple[int, ...], int]()
        merged = np.flatnonzero(stops - starts > 1)
        for piece, start, stop in zip(merged.tolist(), starts[merged].tolist(), stops[merged].tolist(), strict=True):
            parts = tuple(listed[start:stop])
            if parts not in joined:
                joined[parts] = len(texts)
                texts.append("".join([texts[part] for part in parts]))
            codes[piece] = joined[parts]
        rows = np.concatenate(([0], np.cumsum(is_start)))[atom_rows]
        return _Pieces(texts, atoms, atom_rows, starts, stops, codes, rows)

    def _encode_distinct(self, fixed: _Frame, texts: Sequence[str], used: Ints) -> list[TokenIds]:
        """The ids of pieces numbered ``2 * code + leads``."""
        if fixed.first is self._inside:
            return self._inside.encode([texts[key >> 1] for key in used.tolist()])
        leading = (used & 1).astype(bool)
        firsts = iter(fixed.first.encode([texts[key >> 1] for key in used[leading].tolist()]))
        others = iter(self._inside.encode([texts[key >> 1] for key in used[~leading].tolist()]))
        return [next(firsts) if leads else next(others) for leads in leading.tolist()]

    def _tokens_before(
        self, fixed: _Frame, pieces: _Pieces, limits: Ints, before: Ints, leads: npt.NDArray[np.int64]
    ) -> Ints:
        """How many tokens of each row's pieces stand before atom ``limits[row]``."""
        begun = np.searchsorted(pieces.starts, limits, "left")  # pieces that begin before the limit
        tokens = before[begun] - before[pieces.rows[:-1]]
        inside = begun > pieces.rows[:-1]
        last = np.maximum(begun - 1, 0)
        inside[inside] = pieces.ends[last[inside]] > limits[inside]
        rows = np.flatnonzero(inside)
        if not len(rows):
            return tokens
        listed = pieces.atoms.tolist()
        keys = []
        for row, piece in zip(rows.tolist(), last[rows].tolist(), strict=True):
            keys.append((bool(leads[piece]), *listed[pieces.starts[piece] : limits[row]]))
        distinct = {key: "".join([pieces.texts[part] for part in key[1:]]) for key in dict.fromkeys(keys)}
        lengths: dict[tuple[int, ...], int] = {}
        for is_first, encoder in ((True, fixed.first), (False, self._inside)):
            wanted = {key: text for key, text in distinct.items() if key[0] is is_first}
            encoded = encoder.encode(list(dict.fromkeys(wanted.values())))
            by_text = dict(zip(dict.fromkeys(wanted.values()), map(len, encoded), strict=True))
            lengths |= {key: by_text[text] for key, text in wanted.items()}
        whole = before[last[rows] + 1] - before[last[rows]]
        tokens[rows] += np.minimum(np.array([lengths[key] for key in keys], np.int64), whole) - whole
        return tokens

    def _remember(self, frame: ChatFrame) -> _Frame:
        found = list(self._find_special.finditer(frame.prefix))
        text_start = found[-1].end() if found else 0
        special = self._find_special.search(frame.suffix)
        text_end = special.start() if special else len(frame.suffix)
        fixed = _Frame(
            head_ids=self._encode_template(frame.prefix[:text_start]),
            head_text=frame.prefix[text_start:],
            tail_text=frame.suffix[:text_end],
            tail_ids=self._encode_template(frame.suffix[text_end:]),
            first=self._start if frame.plain or not found else self._after_special,
        )
        if len(self._frames) >= _MOST_FRAMES:
            self._frames.clear()
        self._frames[frame] = fixed
        return fixed

    def _encode_template(self, text: str) -> TokenIds:
        """Ids of template text that begins at the string's start or with a special token, and ends with one."""
        parts: list[TokenIds] = []
        position, encoder = 0, self._start
        for found in self._find_special.finditer(text):
            if found.start() > position:
                parts += encoder.encode([text[position : found.start()]])
            parts.append(np.array([self._special[found.group()]], np.int32))
            position, encoder = found.end(), self._after_special
        if position < len(text):
            parts += encoder.encode([text[position:]])
        return np.concatenate(parts) if parts else np.empty(0, np.int32)
