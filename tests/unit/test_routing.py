"""The router of several engines: where groups go, what is kept of them, and what happens when engines go."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.service.routing import POLICIES, Block, Path, PrefixGroup, Router, path_of, runs_of
from spark_llm.engine.service.routing.deficits import Deficits
from spark_llm.engine.service.routing.fleet import Fleet
from spark_llm.engine.service.routing.group import OUTPUT_WEIGHT
from spark_llm.engine.service.routing.holdings import Holdings

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
LONG: Path = (Block(1, 100), Block(2, 900))
OTHER: Path = (Block(1, 100), Block(3, 900))


def group(client: str = "a", path: Path = LONG, rows: int = 8, own: float = 50, output: float = 5) -> PrefixGroup:
    return PrefixGroup(client=client, path=path, rows=rows, own_tokens=own, output_tokens=output)


def router(engines: int, policy: str = "d2lpm", quantum: float = 100_000) -> Router:
    made = Router(policy, quantum)
    for number in range(engines):
        made.engine_added(f"e{number}")
    return made


def sent(made: Router, asked: PrefixGroup) -> list[tuple[str, int]]:
    return [(share.engine, share.group.rows) for share in made.dispatch(asked)]


class TestWhereGroupsGo:
    def test_one_engine_gets_all_and_nothing_is_kept_of_prefixes_and_clients(self) -> None:
        made = router(1)
        (share,) = made.dispatch(group(rows=1000))
        assert (share.engine, share.group.rows) == ("e0", 1000)
        assert len(made.holdings) == 0
        made.finished(share.id, 1000, 60_000, 5_000)
        assert made.queued()["e0"] == (0, 0.0)

    def test_a_group_returns_to_the_engine_that_holds_its_prefix(self) -> None:
        made = router(4)
        ((first, _),) = sent(made, group(rows=2))
        ((other, _),) = sent(made, group(path=OTHER, rows=2))
        assert other != first
        assert sent(made, group(rows=2)) == [(first, 2)]
        assert sent(made, group(path=OTHER, rows=2)) == [(other, 2)]

    def test_loads_that_are_in_line_do_not_move_it(self) -> None:
        made = router(2)
        home = made.dispatch(group(rows=10))[0].engine
        (away,) = {"e0", "e1"} - {home}
        assert sent(made, group(path=OTHER, rows=10)) == [(away, 10)]
        for _ in range(2):
            assert sent(made, group(rows=10)) == [(home, 10)]
        assert made.queued()[home].service > 1.3 * made.queued()[away].service

    def test_it_leaves_for_an_engine_that_is_about_to_idle(self) -> None:
        made = router(2)
        home = made.dispatch(group(rows=1))[0].engine  # 1,060 tokens of service
        while sent(made, group(rows=1)) == [(home, 1)]:  # of 60 each
            assert made.queued()[home].service < 10_000
        assert made.queued()[home].service > 2 * 1_000, "moved for less than the prefix costs again"

    def test_a_large_group_is_split_over_idle_engines_and_a_small_one_is_not(self) -> None:
        assert len(router(4).dispatch(group(rows=8))) == 1
        shares = sent(router(4), group(rows=400))
        assert sum(rows for _, rows in shares) == 400
        assert len(shares) == 4
        assert max(rows for _, rows in shares) < 2 * min(rows for _, rows in shares)

    def test_a_client_beside_others_goes_on_to_engines_with_which_it_has_credit(self) -> None:
        made = router(2, quantum=1_000)
        made.dispatch(group("b", path=OTHER, rows=1))
        homes = [engine for _ in range(20) for engine, _ in sent(made, group(rows=5))]  # 300 a group
        assert 7 <= homes.count("e0") <= 13

    def test_a_fast_engine_gets_more(self) -> None:
        made = Router("d2lpm", 1_000)
        made.engine_added("slow")
        made.engine_added("fast", speed=4.0)
        shares = dict(sent(made, group(path=(Block(1, 10),), rows=500)))
        assert 3 < shares["fast"] / shares["slow"] < 5

    def test_the_baselines_keep_groups_whole(self) -> None:
        assert [sent(made := router(3, "roundRobin"), group()), sent(made, group()), sent(made, group())] == [
            [("e0", 8)],
            [("e1", 8)],
            [("e2", 8)],
        ]
        made = router(3, "leastLoaded")
        assert {engine for _ in range(3) for engine, _ in sent(made, group())} == {"e0", "e1", "e2"}
        made = router(3, "prefix")
        assert len({engine for _ in range(9) for engine, _ in sent(made, group())}) == 1

    def test_an_eviction_notice_ends_the_belief(self) -> None:
        made = router(2, "prefix")
        ((first, _),) = sent(made, group())
        assert sent(made, group()) == [(first, 8)]
        made.evicted(first, [2, 77])
        assert [engine for engine, _ in sent(made, group())] != [first]  # the block that is left is not enough

    def test_without_an_engine_there_is_nothing_to_say(self) -> None:
        with pytest.raises(LookupError):
            Router().dispatch(group())
        with pytest.raises(ValueError, match="a weight of 0"):
            router(2).dispatch(msgspec.structs.replace(group(), weight=0.0))
        with pytest.raises(ValueError, match="no policy"):
            Router("random")
        with pytest.raises(ValueError, match="is known"):
            router(1).engine_added("e0")


@EXAMPLES
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    quantum=st.sampled_from([1.0, 500.0, 100_000.0]),
    operations=st.lists(
        st.one_of(
            st.tuples(st.just("dispatch"), st.integers(0, 3), st.integers(0, 5), st.integers(1, 60)),
            st.tuples(st.just("finish"), st.integers(0, 99), st.integers(1, 60), st.integers(0, 2)),
            st.tuples(st.just("lose"), st.integers(0, 3), st.just(0), st.just(0)),
            st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 2), st.just(0)),
            st.tuples(st.just("evict"), st.integers(0, 3), st.integers(1, 9), st.just(0)),
        ),
        max_size=60,
    ),
)
def test_every_row_is_under_way_done_or_returned(
    policy: str, quantum: float, operations: list[tuple[str, int, int, int]]
):
    """Whatever comes and goes: rows, loads and the accounts of clients add up."""
    made = Router(policy, quantum, max_blocks=4)
    made.engine_added("e0")
    open_: dict[int, tuple[str, int]] = {}  # share -> engine, rows left
    for kind, which, size, more in operations:
        engine = f"e{which}"
        if kind == "dispatch":
            asked = group(f"c{which}", path_of([str(size % 2), str(size)], [50, 20 * size]), rows=more)
            if not made.engines:
                continue
            shares = made.dispatch(asked)
            assert sum(share.group.rows for share in shares) == more
            assert len({share.engine for share in shares}) == len(shares)
            open_ |= {share.id: (share.engine, share.group.rows) for share in shares}
        elif kind == "finish" and open_:
            share = sorted(open_)[which % len(open_)]
            engine, left = open_.pop(share)
            made.finished(share, size, 70 * size * more, 5 * size)
            if left > size:
                open_[share] = engine, left - size
        elif kind == "lose":
            lost = made.engine_lost(engine)
            assert {share.id: (share.engine, share.group.rows) for share in lost} == {
                share: found for share, found in open_.items() if found[0] == engine
            }
            for share in lost:
                del open_[share.id]
                made.finished(share.id, 1, 1, 1)  # a late word
        elif kind == "add" and engine not in made.engines:
            made.engine_added(engine, speed=float(size))
        elif kind == "evict":
            made.evicted(engine, [block.hash for block in path_of([str(size % 2), str(size)], [0, 0])])
        queued = made.queued()
        assert {name: found.rows for name, found in queued.items()} == {
            name: sum(rows for engine, rows in open_.values() if engine == name) for name in made.engines
        }
        assert all((found.service > 0) == (found.rows > 0) for found in queued.values())
        assert len(made.holdings) <= 4


class TestDeficits:
    @EXAMPLES
    @given(
        deficits=st.lists(st.integers(-1000, 10).map(float), min_size=1, max_size=5),
        quantum=st.integers(1, 50).map(float),
        weight=st.sampled_from([0.25, 0.5, 1.0, 4.0]),
    )
    def test_refilling_at_once_is_refilling_in_rounds(
        self, deficits: list[float], quantum: float, weight: float
    ) -> None:
        books, fleet = Deficits(quantum), Fleet()
        for engine in range(len(deficits)):
            fleet.add(1.0 + engine % 2)
        account = books.opened("a", 1, weight, len(fleet))
        account.deficits[:] = deficits
        credit = books.refill(account, fleet)
        while all(q <= 0 for q in deficits):
            deficits = [q + weight * quantum * (1.0 + engine % 2) for engine, q in enumerate(deficits)]
        assert account.deficits.tolist() == deficits
        assert credit.tolist() == [q > 0 for q in deficits]

    def test_a_client_returns_to_its_debts(self) -> None:
        books = Deficits(10)
        books.opened("a", 2, 1.0, engines=1)
        books.charge("a", 0, 25)
        books.closed("a", 2)
        assert not books.accounts
        assert books.opened("a", 1, 1.0, engines=2).deficits.tolist() == [-25, 0]

    def test_a_new_engine_in_a_lost_ones_place_owes_nothing(self) -> None:
        books = Deficits(10)
        account = books.opened("a", 1, 1.0, engines=2)
        books.charge("a", 0, 25)
        books.charge("a", 1, 5)
        books.engine_added(0)
        assert account.deficits.tolist() == [0, -5]


class TestHoldings:
    def test_a_prefix_is_held_as_far_as_each_of_its_blocks_is(self) -> None:
        held = Holdings(100)
        held.add(LONG, 0)
        held.add(OTHER, 2)
        assert held.missing(LONG, 0b111, 3).tolist() == [0, 1000, 900]
        held.remove([1], 0)
        assert held.missing(LONG, 0b111, 3).tolist() == [1000, 1000, 900]
        held.forget(2)
        assert held.missing(LONG, 0b111, 3).tolist() == [1000] * 3

    @EXAMPLES
    @given(paths=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=40), most=st.integers(0, 6))
    def test_what_is_forgotten_are_ends_of_prefixes(self, paths: list[list[int]], most: int) -> None:
        held = Holdings(most)
        latest: Path = ()
        for segments in paths:
            latest = path_of([str(segment) for segment in segments], [1] * len(segments))
            held.add(latest, 0)
            assert len(held) <= most
        kept = latest[:most]
        assert held.missing(latest, 1, 1).tolist() == [len(latest) - len(kept)]


class TestPaths:
    def test_a_hash_names_the_whole_prefix(self) -> None:
        path = path_of(["ab", "c", "c"], [2, 1, 1])
        assert len({block.hash for block in path}) == 3
        assert path[:2] == path_of(["ab", "c"], [2, 1])
        assert path_of(["c"], [1])[0] != path[1]
        assert path_of(["ab"], [2], start=5)[0].hash != path[0].hash

    @EXAMPLES
    @given(
        rows=st.lists(
            st.lists(st.sampled_from(["instruction", "x", "y", "z"]), min_size=1, max_size=4), min_size=1, max_size=12
        )
    )
    def test_runs_share_more_than_all_rows_do(self, rows: list[list[str]]) -> None:
        paths = [path_of(row, [len(text) for text in row]) for row in rows]
        runs = runs_of(paths)
        assert [run.start for run in runs] + [len(rows)] == [0] + [run.end for run in runs]
        assert all(run.start < run.end for run in runs)
        for run in runs:
            assert all(path[: len(run.path)] == run.path for path in paths[run.start : run.end])
        common = len(set.intersection(*({block.hash for block in path} for path in paths)))
        if len(runs) > 1:
            assert all(len(run.path) > common for run in runs if run.end - run.start > 1)
            assert all(
                (
                    paths[after.start - 1][:common] == paths[after.start][:common]
                    and paths[after.start - 1][common : common + 1] != paths[after.start][common : common + 1]
                )
                or common == min(len(paths[after.start - 1]), len(paths[after.start]))
                for after in runs[1:]
            )

    def test_rows_that_share_the_instruction_alone_are_one_run(self) -> None:
        paths = [path_of(["instruction", str(row)], [10, 5]) for row in range(5)]
        ((start, end, path),) = runs_of(paths)
        assert (start, end, len(path)) == (0, 5, 1)
        assert runs_of([]) == []


def test_the_weights_of_service_are_the_engines() -> None:
    assert group(own=10, output=3).row_cost == 10 + OUTPUT_WEIGHT * 3
