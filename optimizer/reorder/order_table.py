"""The order table of a query: which field order a row's prompt has, as a pure function of the row's values.

A table is a small tree. Its root has the field order of all rows; below it, heavy (field, value) groups have orders of
their own, and groups inside them again. The driver makes it once (see ``plan_order``) and every task reads the same.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.hashing import Hashes

Ints = npt.NDArray[np.int64]

MAX_GROUPS = 4096
MAX_LEVELS = 3
KEY_POSITIONS = 16
_BLOOM_BITS = np.uint64(0xFFFF)


class Group(NamedTuple):
    """Rows whose ``field`` has the value of this ``hash``, among the rows of ``parent`` (a group's number; -1: all).

    ``order``: the field order of its rows, all fields; its head is what the rows of the group share.
    """

    parent: int
    field: int
    hash: int
    order: tuple[int, ...]


class Placement(NamedTuple):
    """Where rows go in a shuffle.

    ``key``: uint64 [rows, at most 16], the rows' leading cells; rows sorted by it have equal leading cells together, at
    every depth. ``group``: int64 [rows], the top-level group's number, -1 for none.
    """

    key: Hashes
    group: Ints


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    version: int
    num_fields: int
    default_order: list[int]
    parents: bytes
    fields: bytes
    hashes: bytes
    orders: bytes


class OrderTable:
    """Field orders by heavy (field, value) groups. Immutable; equal tables have equal bytes (``encode``).

    A row belongs to the first group, in the order of ``groups``, that one of its values names; within that group the
    same rule applies again to the groups whose parent it is, at most 3 levels deep.
    """

    def __init__(self, default_order: Sequence[int], groups: Sequence[Group] = ()) -> None:
        """Raises ValueError where an order is not a permutation, or where groups are too many, too deep or out of
        order (a parent stands before its children) or named twice."""
        self.num_fields = len(default_order)
        self.default_order = tuple(int(field) for field in default_order)
        self.groups = tuple(groups)
        if len(self.groups) > MAX_GROUPS:
            raise ValueError(f"an order table has at most {MAX_GROUPS} groups, not {len(self.groups)}")
        levels: list[int] = []
        for number, group in enumerate(self.groups):
            if not -1 <= group.parent < number:
                raise ValueError(f"group {number} stands before its parent {group.parent}")
            levels.append(levels[group.parent] + 1 if group.parent >= 0 else 0)
        if levels and max(levels) >= MAX_LEVELS:
            raise ValueError(f"groups are nested at most {MAX_LEVELS} deep")
        if len({group[:3] for group in self.groups}) != len(self.groups):
            raise ValueError("two groups have the same parent, field and value")
        permutations = {self.default_order} | {group.order for group in self.groups}
        if any(sorted(order) != list(range(self.num_fields)) for order in permutations):
            raise ValueError(f"a field order is a permutation of 0 to {self.num_fields - 1}")
        self._orders = np.array([g.order for g in self.groups] + [self.default_order], np.int64)
        self._levels = np.array(levels, np.int64)
        self._roots = np.arange(len(self.groups) + 1)  # the top-level group above each; the last is "none"
        for number, group in enumerate(self.groups):
            if group.parent >= 0:
                self._roots[number] = self._roots[group.parent]
        self._roots[-1] = -1

    @classmethod
    def fixed(cls, order: Sequence[int]) -> OrderTable:
        """One order for all rows."""
        return cls(order)

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OrderTable) and self.encode() == other.encode()

    def __hash__(self) -> int:
        return hash((self.default_order, self.groups))

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderTable.decode, (self.encode(),)

    def __repr__(self) -> str:
        return f"OrderTable({self.default_order}, {self.num_groups} groups)"

    def encode(self) -> bytes:
        """Compact bytes, the same for equal tables."""
        groups = self.groups
        wire = _Wire(
            version=1,
            num_fields=self.num_fields,
            default_order=list(self.default_order),
            parents=np.array([g.parent for g in groups], "<i2").tobytes(),
            fields=np.array([g.field for g in groups], "<i4").tobytes(),
            hashes=np.array([g.hash for g in groups], "<u8").tobytes(),
            orders=self._orders[:-1].astype("<i4").tobytes(),
        )
        return zlib.compress(msgspec.msgpack.encode(wire), 6)

    @classmethod
    def decode(cls, data: bytes) -> OrderTable:
        """The table that ``encode`` wrote. Raises ValueError on other bytes."""
        try:
            wire = msgspec.msgpack.decode(zlib.decompress(data), type=_Wire)
        except (zlib.error, msgspec.MsgspecError) as error:
            raise ValueError(f"not an order table: {error}") from error
        if wire.version != 1:
            raise ValueError(f"an order table of version {wire.version}, but this is version 1")
        parents = np.frombuffer(wire.parents, "<i2").tolist()
        orders = np.frombuffer(wire.orders, "<i4").reshape(len(parents), wire.num_fields).tolist()
        fields = np.frombuffer(wire.fields, "<i4").tolist()
        hashes = np.frombuffer(wire.hashes, "<u8").tolist()
        return cls(
            wire.default_order,
            [Group(p, f, h, tuple(o)) for p, f, h, o in zip(parents, fields, hashes, orders, strict=True)],
        )

    def orders(self, hashes: Hashes) -> Ints:
        """The field order of each row, int64 [rows, fields], from the hashes of its values (``hash_values``)."""
        return self._orders[self.nodes(hashes)]

    def place(self, hashes: Hashes) -> Placement:
        """Where rows of these value hashes, uint64 [rows, fields], go in a shuffle."""
        nodes = self.nodes(hashes)
        positions = min(self.num_fields, KEY_POSITIONS)
        fields = self._orders[nodes][:, :positions]
        key = mix(np.take_along_axis(hashes, fields, axis=1), fields.astype(np.uint64))
        return Placement(key, self._roots[nodes])

    def nodes(self, hashes: Hashes) -> Ints:
        """The innermost group of each row, int64 [rows]; ``num_groups`` where it has none. Hashes as for ``orders``."""
        if hashes.ndim != 2 or hashes.shape[1] != self.num_fields:
            raise ValueError(f"hashes of {self.num_fields} fields expected, not of shape {hashes.shape}")
        none = self.num_groups
        nodes = np.full(len(hashes), none, np.int64)
        rows: Ints | None = None  # None: all
        for level in self._lookups:
            part = hashes if rows is None else hashes[rows]
            # "No parent" has number num_groups, too.
            parents = nodes if rows is None else nodes[rows]
            found = np.full(len(part), none, np.int64)
            for lookup in level:
                lookup.first_match(part[:, lookup.field], parents, found)
            taken = np.flatnonzero(found < none)
            rows = taken if rows is None else rows[taken]
            nodes[rows] = found[taken]
        return nodes

    @functools.cached_property
    def _lookups(self) -> list[list[_Lookup]]:
        """For each level, the groups of each field that has some."""
        fields = np.array([g.field for g in self.groups], np.int64)
        hashes = np.array([g.hash for g in self.groups], np.uint64)
        parents = np.array([g.parent for g in self.groups], np.int64)
        parents[parents < 0] = self.num_groups
        lookups = []
        for level in range(int(self._levels.max()) + 1 if len(self._levels) else 0):
            members = np.flatnonzero(self._levels == level)
            lookups.append(
                [
                    _Lookup(field, hashes[of_field], parents[of_field], of_field)
                    for field in np.unique(fields[members]).tolist()
                    if len(of_field := members[fields[members] == field])
                ]
            )
        return lookups


class _Lookup:
    """The groups of one field at one level, found by (hash, parent)."""

    def __init__(self, field: int, hashes: Hashes, parents: Ints, numbers: Ints) -> None:
        keys = mix(hashes, parents.astype(np.uint64))
        by_key = np.argsort(keys, kind="stable")
        self.field = field
        self.keys, self.hashes = keys[by_key], hashes[by_key]
        self.parents, self.numbers = parents[by_key], numbers[by_key]
        # Most rows of a large table are in no group: one bit tells that without a search.
        self.bloom = np.zeros(int(_BLOOM_BITS) + 1, np.bool_)
        self.bloom[(hashes & _BLOOM_BITS).astype(np.int64)] = True

    def first_match(self, hashes: Hashes, parents: Ints, found: Ints) -> None:
        """Lower ``found`` to the number of the group that holds a row, where that is less."""
        maybe = np.flatnonzero(self.bloom[(hashes & _BLOOM_BITS).astype(np.int64)])
        value, parent = hashes[maybe], parents[maybe]
        slot = np.searchsorted(self.keys, mix(value, parent.astype(np.uint64)))
        slot[slot == len(self.keys)] = 0
        match = (self.hashes[slot] == value) & (self.parents[slot] == parent)
        rows = maybe[match]
        found[rows] = np.minimum(found[rows], self.numbers[slot[match]])


def mix(values: Hashes, salt: Hashes | np.uint64) -> Hashes:
    """A hash of each value with its salt, uint64 (the finaliser of splitmix64; a bijection for each salt)."""
    # As an array of at least one dimension, because only arrays wrap around in silence.
    mixed = values + (np.atleast_1d(salt) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    final: Hashes = mixed ^ (mixed >> np.uint64(31))
    return final
