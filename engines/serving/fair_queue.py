"""Whose turn it is: each tenant's requests in a queue of its own, and the tenant that was served least goes first.

A request's priority counts among those of its tenant alone: clients send it, and none may go before other tenants.

The virtual token counter of Sheng et al. 2024 (arXiv 2401.00588): a tenant's counter grows by the tokens that it reads
and generates, divided by its weight. One that comes back from idling starts where the others are, so nobody saves up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from engines.serving.account import Account, Share
from engines.serving.entry import Entry


class FairQueue:
    """The waiting requests of all tenants."""

    def __init__(self, shares: Mapping[str, Share] | None = None) -> None:
        """Start empty.

        Args:
            shares: tenant's name to what it gets; ``*`` for all that are not named. Read whenever a new one comes.
        """
        self._shares = {} if shares is None else shares
        self.accounts: dict[str, Account] = {}
        """By the tenant's name."""
        self._queued: dict[Account, None] = {}
        """Those with requests that wait."""
        self._size = 0
        self._arrivals = 0
        self._level = 0.0
        """The counter of the tenant that was chosen last: where one that comes back starts."""

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Entry]:
        return (entry for account in self._queued for _, _, entry in account.waiting)

    def share_of(self, tenant: str) -> Share:
        """What a tenant gets."""
        return self._shares.get(tenant) or self._shares.get("*") or Share()

    def add(self, entry: Entry) -> None:
        """Let a request wait for its turn."""
        name = entry.tenant.name
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(self.share_of(name))
        if not account.waiting and not account.running:
            account.served = max(account.served, self._level)
        entry.account = account
        self._arrivals += 1
        heapq.heappush(account.waiting, (entry.request.priority, self._arrivals, entry))
        self._queued[account] = None
        self._size += 1

    def peek(self) -> Entry | None:
        """The request whose turn it is: of the tenant that was served least, its smallest priority, then the first that
        came; None where nothing waits, or all that wait have their rows.
        """
        ready = [account for account in self._queued if account.may_start]
        if not ready:
            return None
        chosen = min(ready, key=lambda account: (account.served, account.waiting[0][1]))
        return chosen.waiting[0][2]

    def take(self, entry: Entry) -> None:
        """A request that `peek` gave gets a row."""
        heapq.heappop(entry.account.waiting)
        self._shrunk(entry.account)
        self._level = max(self._level, entry.account.served)
        entry.account.running += 1
        entry.account.read(len(entry.instruction))

    def drop(self, entry: Entry) -> None:
        """A waiting request goes."""
        account = entry.account
        account.waiting = [item for item in account.waiting if item[2] is not entry]
        heapq.heapify(account.waiting)
        self._shrunk(account)

    def _shrunk(self, account: Account) -> None:
        self._size -= 1
        if not account.waiting:
            del self._queued[account]
