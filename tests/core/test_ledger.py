"""The books: each method keeps the invariants or raises and changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.cluster.ledger import AccountId, EntryState, Ledger
from scheduler.errors import InvariantBroken
from scheduler.units import ReplicaId

RAM, GPU = AccountId("host:box"), AccountId("device:gpu0")
A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")


def books(ram: int = 10, gpu: int = 10) -> Ledger:
    ledger = Ledger()
    ledger.open(RAM, ram)
    ledger.open(GPU, gpu)
    return ledger


def test_a_replica_s_life() -> None:
    ledger = books()
    ledger.promise(A, {GPU: 10})
    assert ledger.state(A) == "promised" and ledger.booked(GPU, "promised") == 10
    ledger.hold(A)
    ledger.rebook(A, GPU, 8)
    ledger.releasing(A)
    assert ledger.booked(GPU, "releasing") == 8 and ledger.booked(GPU, "held") == 0
    ledger.release(A)
    assert ledger.state(A) is None and ledger.amount(A, GPU) == 0 == ledger.booked(GPU, "held", "releasing", "promised")
    ledger.check()


def test_a_promise_may_count_on_what_is_being_released() -> None:
    ledger = books()
    ledger.promise(A, {GPU: 10})
    ledger.hold(A)
    ledger.releasing(A)
    ledger.promise(B, {GPU: 10})
    with pytest.raises(InvariantBroken, match="oversubscribed \\(now\\): 20 booked of 10"):
        ledger.hold(B)
    assert ledger.state(B) == "promised"
    ledger.release(A)
    ledger.hold(B)


def test_two_promises_never_count_on_the_same_bytes() -> None:
    ledger = books()
    ledger.promise(A, {GPU: 6})
    with pytest.raises(InvariantBroken, match="oversubscribed \\(soon\\): 12 booked of 10"):
        ledger.promise(B, {GPU: 6})
    assert ledger.state(B) is None
    ledger.promise(B, {GPU: 4})


@pytest.mark.parametrize("amounts", [{AccountId("device:none"): 1}, {GPU: -1}])
def test_wrong_amounts_are_refused(amounts: dict[AccountId, int]) -> None:
    ledger = books()
    with pytest.raises(InvariantBroken):
        ledger.promise(A, amounts)
    ledger.promise(A, {GPU: 1})
    for account, amount in amounts.items():
        with pytest.raises(InvariantBroken):
            ledger.rebook(A, account, amount)
    assert ledger.amount(A, GPU) == 1


def test_steps_out_of_order_are_refused() -> None:
    ledger = books()
    for step in (ledger.hold, ledger.releasing, ledger.release):
        with pytest.raises(InvariantBroken):
            step(A)
    ledger.promise(A, {GPU: 1})
    with pytest.raises(InvariantBroken, match="is promised, not held"):
        ledger.releasing(A)
    with pytest.raises(InvariantBroken, match="has an entry already"):
        ledger.promise(A, {GPU: 1})
    with pytest.raises(InvariantBroken):
        ledger.rebook(B, GPU, 1)


def test_a_rebooking_that_does_not_fit_leaves_the_old_amount() -> None:
    ledger = books()
    ledger.promise(A, {GPU: 6})
    ledger.promise(B, {GPU: 4})
    with pytest.raises(InvariantBroken):
        ledger.rebook(A, GPU, 7)
    assert ledger.amount(A, GPU) == 6


def test_accounts_are_opened_once_and_closed_with_their_bookings() -> None:
    ledger = books()
    with pytest.raises(InvariantBroken):
        ledger.open(GPU, 20)
    with pytest.raises(InvariantBroken):
        ledger.open(AccountId("x"), -1)
    ledger.promise(A, {GPU: 6, RAM: 1})
    ledger.close(GPU)
    ledger.check()
    assert ledger.accounts() == (RAM,) and ledger.amount(A, GPU) == 0 and ledger.amount(A, RAM) == 1
    assert ledger.capacity(RAM) == 10


def test_check_finds_what_should_never_be() -> None:
    ledger = books()
    ledger.promise(A, {GPU: 6})
    ledger._entries[A].amounts[GPU] = 11
    with pytest.raises(InvariantBroken):
        ledger.check()
    ledger._entries[A].amounts = {AccountId("nowhere"): 1}
    with pytest.raises(InvariantBroken, match="books 1 on nowhere"):
        ledger.check()


class LedgerMachine(RuleBasedStateMachine):
    """A random book-keeper beside a plain model: whatever is refused changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = books(ram=20, gpu=10)
        self.capacity = {RAM: 20, GPU: 10}
        self.entries: dict[ReplicaId, tuple[EntryState, dict[AccountId, int]]] = {}

    def attempt(
        self, replica_id: ReplicaId, after: tuple[EntryState, dict[AccountId, int]] | None, step: object
    ) -> None:
        """Do `step`; it must succeed exactly if the model balances with the entry as `after`."""
        wanted = {key: entry for key, entry in self.entries.items() if key != replica_id}
        if after is not None:
            wanted[replica_id] = after
        if all(
            sum(amounts.get(account, 0) for state, amounts in wanted.values() if state in states) <= capacity
            for account, capacity in self.capacity.items()
            for states in (("held", "releasing"), ("held", "promised"))
        ):
            step()  # type: ignore[operator]
            self.entries = wanted
        else:
            with pytest.raises(InvariantBroken):
                step()  # type: ignore[operator]

    @rule(replica_id=st.sampled_from((A, B, C)), ram=st.integers(0, 12), gpu=st.integers(0, 8))
    def promise(self, replica_id: ReplicaId, ram: int, gpu: int) -> None:
        if replica_id not in self.entries:
            amounts = {RAM: ram, GPU: gpu}
            self.attempt(replica_id, ("promised", amounts), lambda: self.ledger.promise(replica_id, amounts))

    @rule(replica_id=st.sampled_from((A, B, C)))
    def hold(self, replica_id: ReplicaId) -> None:
        if replica_id in self.entries and self.entries[replica_id][0] == "promised":
            held: tuple[EntryState, dict[AccountId, int]] = ("held", self.entries[replica_id][1])
            self.attempt(replica_id, held, lambda: self.ledger.hold(replica_id))

    @rule(replica_id=st.sampled_from((A, B, C)))
    def releasing(self, replica_id: ReplicaId) -> None:
        if replica_id in self.entries and self.entries[replica_id][0] == "held":
            going: tuple[EntryState, dict[AccountId, int]] = ("releasing", self.entries[replica_id][1])
            self.attempt(replica_id, going, lambda: self.ledger.releasing(replica_id))

    @rule(replica_id=st.sampled_from((A, B, C)))
    def release(self, replica_id: ReplicaId) -> None:
        if replica_id in self.entries:
            self.attempt(replica_id, None, lambda: self.ledger.release(replica_id))

    @rule(replica_id=st.sampled_from((A, B, C)), amount=st.integers(0, 12))
    def rebook(self, replica_id: ReplicaId, amount: int) -> None:
        if replica_id in self.entries:
            state, amounts = self.entries[replica_id]
            changed: tuple[EntryState, dict[AccountId, int]] = (state, {**amounts, GPU: amount})
            self.attempt(replica_id, changed, lambda: self.ledger.rebook(replica_id, GPU, amount))

    @invariant()
    def balances(self) -> None:
        self.ledger.check()
        for replica_id in (A, B, C):
            state, amounts = self.entries.get(replica_id, (None, {}))
            assert self.ledger.state(replica_id) == state
            assert all(self.ledger.amount(replica_id, account) == amount for account, amount in amounts.items())


LedgerMachine.TestCase.settings = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLedgerMachine = LedgerMachine.TestCase
