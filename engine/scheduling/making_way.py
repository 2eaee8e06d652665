"""A client none of whose rows runs does not wait for long answers of others: one of their rows makes way for it.

Rows end every few steps as a rule, and who has credit gets their place. Where none does, because answers are long and
one client's rows were all admitted at once, a row is preempted: it keeps its answer so far, and of its prompt what the
cache can keep. Nobody loses the last row that runs, so clients cannot take their places from each other in turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from spark_llm.engine.scheduling.accounts import UserAccount
from spark_llm.engine.scheduling.row import Row

PATIENCE = 16  # steps without an admission


def row_that_makes_way(candidate: Row, running: Iterable[Row], users: Iterable[UserAccount]) -> Row | None:
    """A running row to preempt for ``candidate``, whose turn it is; None: its client has one that runs, or must wait.

    It is the first of ``running`` of the client that runs most rows by its weight, if these are two at least.
    """
    assert candidate.account is not None
    most = max(users, key=lambda user: user.running / user.weight)
    if candidate.account.user.running or most.running < 2:
        return None
    return next(row for row in running if row.account is not None and row.account.user is most)
