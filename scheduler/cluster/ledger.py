"""The books: what each replica has been promised or given, per account, in integers.

An account is a device's memory, a node's host RAM, or the number of active models. An entry belongs to a replica. Its
state is

    promised   booked for later: other replicas may still be stopping to make room for it
    held       given: the replica is loading or ready
    releasing  still charged: the replica is stopping, and its memory may not be free yet

Invariants for every account, checked by `check()` after every event in tests:  held + releasing <= capacity  (now)  and
held + promised <= capacity  (after the stopping replicas are gone). Sums per account are stored. So a change costs only
the accounts of one entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NewType

from scheduler.errors import InvariantBroken
from scheduler.units import DeviceId, NodeId, ReplicaId

AccountId = NewType("AccountId", str)
EntryState = Literal["promised", "held", "releasing"]
STATES: tuple[EntryState, ...] = ("promised", "held", "releasing")
ACTIVE = AccountId("active")


def device_account(device_id: DeviceId) -> AccountId:
    return AccountId(f"device:{device_id}")


def host_account(node_id: NodeId) -> AccountId:
    return AccountId(f"host:{node_id}")


@dataclass(slots=True)
class Entry:
    state: EntryState
    amounts: dict[AccountId, int] = field(default_factory=dict)


class Ledger:
    """All accounts and entries. Every method keeps the invariants, or raises InvariantBroken and changes nothing."""

    def __init__(self) -> None:
        self._capacity: dict[AccountId, int] = {}
        self._entries: dict[ReplicaId, Entry] = {}
        self._sums: dict[EntryState, dict[AccountId, int]] = {state: {} for state in STATES}

    # accounts

    def open(self, account: AccountId, capacity: int) -> None:
        """Open an account."""
        if capacity < 0 or account in self._capacity:
            raise InvariantBroken(f"{account} cannot be opened with {capacity}: it is open, or that is negative")
        self._capacity[account] = capacity

    def close(self, account: AccountId) -> None:
        """Forget an account (its device or node is gone) and what was booked on it."""
        self._capacity.pop(account, None)
        for entry in self._entries.values():
            entry.amounts.pop(account, None)
        for sums in self._sums.values():
            sums.pop(account, None)

    def capacity(self, account: AccountId) -> int:
        return self._capacity[account]

    def accounts(self) -> tuple[AccountId, ...]:
        return tuple(self._capacity)

    # entries

    def promise(self, replica_id: ReplicaId, amounts: Mapping[AccountId, int]) -> None:
        self._insert(replica_id, Entry("promised", dict(amounts)))

    def reserve(self, replica_id: ReplicaId, amounts: Mapping[AccountId, int]) -> None:
        self._insert(replica_id, Entry("held", dict(amounts)))

    def hold(self, replica_id: ReplicaId) -> None:
        """The promised room is free: the promise becomes a holding."""
        self._change(replica_id, "promised", "held")

    def releasing(self, replica_id: ReplicaId) -> None:
        self._change(replica_id, "held", "releasing")

    def release(self, replica_id: ReplicaId) -> None:
        """The memory is free again, or the promise is withdrawn."""
        entry = self._entries.pop(replica_id, None)
        if entry is None:
            raise InvariantBroken(f"release of {replica_id}, which has no entry")
        self._count(entry, -1)

    def rebook(self, replica_id: ReplicaId, account: AccountId, amount: int) -> None:
        """Replace one amount by what the load really took."""
        entry = self._entries.get(replica_id)
        if entry is None or account not in self._capacity or amount < 0:
            raise InvariantBroken(f"{replica_id} cannot book {amount} on {account}")
        before = entry.amounts.get(account, 0)
        self._put(entry, account, amount)
        try:
            self._check_account(account)
        except InvariantBroken:
            self._put(entry, account, before)
            raise

    def amount(self, replica_id: ReplicaId, account: AccountId) -> int:
        entry = self._entries.get(replica_id)
        return entry.amounts.get(account, 0) if entry else 0

    def state(self, replica_id: ReplicaId) -> EntryState | None:
        entry = self._entries.get(replica_id)
        return entry.state if entry else None

    def booked(self, account: AccountId, *states: EntryState) -> int:
        """Sum over the entries in `states`."""
        return sum(self._sums[state].get(account, 0) for state in states)

    def check(self) -> None:
        """Raise InvariantBroken unless every account balances, and every stored sum equals that of its entries."""
        sums: dict[EntryState, dict[AccountId, int]] = {state: {} for state in STATES}
        for replica_id, entry in self._entries.items():
            for account, amount in entry.amounts.items():
                if amount < 0 or account not in self._capacity:
                    raise InvariantBroken(f"{replica_id} books {amount} on {account}")
                sums[entry.state][account] = sums[entry.state].get(account, 0) + amount
        for state, kept in self._sums.items():
            if sums[state] != {account: amount for account, amount in kept.items() if account in sums[state] or amount}:
                raise InvariantBroken(f"{state}: {kept} is kept, {sums[state]} is booked")
        for account in self._capacity:
            self._check_account(account)

    def _insert(self, replica_id: ReplicaId, entry: Entry) -> None:
        if replica_id in self._entries:
            raise InvariantBroken(f"{replica_id} has an entry already")
        wrong = {a: count for a, count in entry.amounts.items() if a not in self._capacity or count < 0}
        if wrong:
            raise InvariantBroken(f"{replica_id} cannot book {wrong}")
        self._entries[replica_id] = entry
        self._count(entry, 1)
        try:
            self._check_accounts(entry)
        except InvariantBroken:
            self._count(entry, -1)
            del self._entries[replica_id]
            raise

    def _change(self, replica_id: ReplicaId, before: EntryState, after: EntryState) -> None:
        entry = self._entries.get(replica_id)
        if entry is None or entry.state != before:
            raise InvariantBroken(f"{replica_id} is {entry.state if entry else 'absent'}, not {before}")
        self._become(entry, after)
        try:
            self._check_accounts(entry)
        except InvariantBroken:
            self._become(entry, before)
            raise

    def _become(self, entry: Entry, state: EntryState) -> None:
        self._count(entry, -1)
        entry.state = state
        self._count(entry, 1)

    def _put(self, entry: Entry, account: AccountId, amount: int) -> None:
        sums = self._sums[entry.state]
        sums[account] = sums.get(account, 0) + amount - entry.amounts.get(account, 0)
        entry.amounts[account] = amount

    def _count(self, entry: Entry, sign: int) -> None:
        sums = self._sums[entry.state]
        for account, amount in entry.amounts.items():
            sums[account] = sums.get(account, 0) + sign * amount

    def _check_accounts(self, entry: Entry) -> None:
        for account in entry.amounts:
            self._check_account(account)

    def _check_account(self, account: AccountId) -> None:
        capacity = self._capacity[account]
        now, soon = self.booked(account, "held", "releasing"), self.booked(account, "held", "promised")
        if max(now, soon) > capacity:
            when, total = ("now", now) if now > capacity else ("soon", soon)
            raise InvariantBroken(f"{account} is oversubscribed ({when}): {total} booked of {capacity}")
