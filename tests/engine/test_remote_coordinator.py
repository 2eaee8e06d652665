"""The coordinator's bookkeeping: engines come, fall silent, are lost and return; work ends with the task that asked."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service.coordinator import Coordinator
from spark_llm.engine.service.coordinator_protocol import (
    SILENT_SECONDS,
    Beat,
    Dispatch,
    Done,
    Endpoint,
    EngineList,
    Finished,
    Gone,
    Lost,
    Register,
    Stopped,
    Subscribe,
    WindowAsk,
    pool_of,
)
from spark_llm.engine.service.protocol import WindowRequest
from spark_llm.engine.service.routing import Block, PrefixGroup

T = TypeVar("T")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakePeer:
    def __init__(self) -> None:
        self.told: list[msgspec.Struct] = []

    def push(self, message: msgspec.Struct) -> None:
        self.told.append(message)

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.told if isinstance(message, kind)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(clock: Clock) -> Coordinator:
    return Coordinator(clock)


def join(coordinator: Coordinator, *names: str, pool: str = "p") -> list[FakePeer]:
    peers = [FakePeer() for _ in names]
    for name, peer in zip(names, peers, strict=True):
        coordinator.register(Register(name, pool, Endpoint("10.0.0.1", 1000 + len(name)), 1), peer)
    return peers


def task(coordinator: Coordinator, pool: str = "p") -> FakePeer:
    peer = FakePeer()
    coordinator.task_came(peer)
    coordinator.subscribe(Subscribe(0, pool), peer)
    return peer


def group(prefix: int, rows: int = 4) -> PrefixGroup:
    return PrefixGroup(client="c", path=(Block(prefix, 1000),), rows=rows, own_tokens=10, output_tokens=1)


def place(coordinator: Coordinator, peer: FakePeer, *groups: PrefixGroup, policy: str = "prefix") -> list[str]:
    """The engine of each group, which goes to one as a whole."""
    shares = coordinator.dispatch(Dispatch(1, "p", policy, list(groups)), peer).shares
    assert all(len(each) == 1 for each in shares)
    return [each[0][1] for each in shares]


def test_tasks_hear_of_the_engines_of_their_pool(coordinator: Coordinator) -> None:
    join(coordinator, "a")
    first, other = task(coordinator), task(coordinator, "another model")
    (engine,) = join(coordinator, "bb")
    assert [list(told.engines) for told in first.of(EngineList)] == [["a", "bb"]]
    coordinator.engine_gone("bb", engine)
    assert list(first.of(EngineList)[-1].engines) == ["a"]
    assert other.told == []
    assert coordinator.subscribe(Subscribe(7, "p"), other) == EngineList("p", {"a": Endpoint("10.0.0.1", 1001)}, 7)


def test_a_prefix_is_where_it_was_until_its_engine_evicts_it(coordinator: Coordinator) -> None:
    join(coordinator, "a", "bb")
    peer = task(coordinator)
    (home,) = place(coordinator, peer, group(1))
    coordinator.dispatch(Dispatch(2, "p", "prefix", [group(2, rows=1)]), peer)  # it is less busy, and holds nothing
    assert place(coordinator, peer, group(1)) == [home]
    coordinator.beat(home, Beat([1]))
    assert place(coordinator, peer, group(1)) != [home]
    assert coordinator.cost.groups == 4
    assert coordinator.cost.rows == 13
    assert coordinator.cost.seconds > 0


def test_a_silent_engine_is_gone_and_its_tasks_are_told(coordinator: Coordinator, clock: Clock) -> None:
    join(coordinator, "a", "bb")
    peer = task(coordinator)
    clock.now += SILENT_SECONDS
    coordinator.beat("a", Beat())
    coordinator.look()
    assert not peer.of(Gone)
    clock.now += 1
    coordinator.look()
    assert [told.engine for told in peer.of(Gone)] == ["bb"]
    assert list(peer.of(EngineList)[-1].engines) == ["a"]
    assert set(place(coordinator, peer, group(1), group(2))) == {"a"}
    coordinator.beat("bb", Beat())  # too late: it has to register anew
    assert set(place(coordinator, peer, group(3), group(4))) == {"a"}


def test_an_engine_that_a_task_lost_returns_with_a_later_sign_of_life(coordinator: Coordinator, clock: Clock) -> None:
    join(coordinator, "a", "bb")
    peer = task(coordinator)
    coordinator.lost(Lost("bb"))
    coordinator.lost(Lost("bb"))
    coordinator.lost(Lost("unknown"))
    clock.now += 0.5
    coordinator.beat("bb", Beat())  # may have been under way when it died
    assert set(place(coordinator, peer, group(1), group(2), policy="roundRobin")) == {"a"}
    clock.now += 10
    coordinator.beat("bb", Beat())
    assert set(place(coordinator, peer, group(1), group(2), policy="roundRobin")) == {"a", "bb"}
    assert not peer.of(Gone), "others' connections to it stand"


def test_an_engine_back_on_another_connection_outlives_the_old_one(coordinator: Coordinator) -> None:
    (old,) = join(coordinator, "a")
    join(coordinator, "a")
    coordinator.engine_gone("a", old)
    peer = task(coordinator)
    assert place(coordinator, peer, group(1)) == ["a"]


def test_what_a_task_left_undone_is_nobodys_load(coordinator: Coordinator) -> None:
    join(coordinator, "a", "bb")
    peers = [task(coordinator), task(coordinator)]
    (((share, engine, rows),),) = coordinator.dispatch(Dispatch(1, "p", "d2lpm", [group(1)]), peers[0]).shares
    coordinator.dispatch(Dispatch(1, "p", "d2lpm", [group(2)]), peers[1])
    (router,) = coordinator._routers.values()
    assert router.queued()[engine].rows == rows == 4
    coordinator.finished(Finished("p", "d2lpm", [Done(share, 3, 30, 3), Done(999, 1, 1, 1)]), peers[0])
    assert router.queued()[engine].rows == 1
    coordinator.finished(Finished("p", "d2lpm", [Done(share, 1, 30, 3)]), peers[1])  # not its share
    assert router.queued()[engine].rows == 1
    coordinator.task_gone(peers[0])
    assert router.queued()[engine].rows == 0
    coordinator.task_gone(peers[1])
    assert all(queued.rows == 0 and queued.service == 0 for queued in router.queued().values())


def test_without_engines_there_are_no_shares(coordinator: Coordinator) -> None:
    assert coordinator.dispatch(Dispatch(1, "p", "d2lpm", [group(1)]), task(coordinator)).shares == []


def test_all_who_ask_for_windows_of_a_node_are_told_of_its_end(coordinator: Coordinator) -> None:
    def ask(peer: FakePeer, node: str, **done: int) -> int:
        number = peers.index(peer)
        request = WindowRequest(query="q", node=node, limit=2, partition=number, attempt=number, **done)
        return coordinator.window(WindowAsk(1, request), peer).rows

    peers = [task(coordinator) for _ in range(3)]
    assert ask(peers[0], "n") == ask(peers[1], "n") == ask(peers[2], "other") == 1
    assert ask(peers[0], "n", rows=1, hits=2) == 0
    assert [peer.of(Stopped) for peer in peers] == [[Stopped("q", "n")], [Stopped("q", "n")], []]
    assert ask(peers[1], "n") == 0


def test_a_pool_is_of_engines_that_answer_alike() -> None:
    pool = pool_of(EngineSpec(device="cuda:0", threads=4))
    assert pool == pool_of(EngineSpec(device="cuda:3", threads=1, instance=3))
    assert pool != pool_of(EngineSpec(device="cpu"))
    assert pool != pool_of(EngineSpec(device="cuda:0", dtype="float32"))
    assert pool != pool_of(EngineSpec(device="cuda:0", model="/other"))
