"""Who waits for the core: nobody is forgotten, and nobody who has left gets anything."""

from __future__ import annotations

import asyncio

from actors.answers import Answers
from actors.leasing import Grant
from scheduler import events as ev
from scheduler.errors import ArrieroError, Unavailable
from scheduler.units import LeaseId, ReplicaId, RequestId

LEASE = Grant(LeaseId("lease"), ReplicaId("replica"), None, "a", 60.0, 4096)
ONE = ev.RequestArrived(RequestId("one"), "a")


async def started(answers: Answers, arrived: ev.RequestArrived = ONE) -> asyncio.Task[Grant | ArrieroError]:
    asking = asyncio.ensure_future(answers.ask(arrived))
    await asyncio.sleep(0)
    return asking


def test_a_request_that_is_cancelled_before_the_core_is_settled_never_gets_there() -> None:
    async def scenario() -> None:
        posted: list[ev.Event] = []
        answers = Answers(posted.append)
        asking = await started(answers)
        answers.cancel(RequestId("one"))
        answers.settled.set()
        assert isinstance(await asking, Unavailable)
        assert not any(isinstance(event, ev.RequestArrived) for event in posted)
        assert not len(answers)

    asyncio.run(scenario())


def test_a_caller_that_goes_away_while_it_waits_takes_its_request_along() -> None:
    async def scenario() -> None:
        posted: list[ev.Event] = []
        answers = Answers(posted.append)
        answers.settled.set()
        asking = await started(answers)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert posted == [ONE, ev.RequestCancelled(RequestId("one"))]
        assert not answers.give(RequestId("one"), LEASE)  # so the lease is given back

    asyncio.run(scenario())


def test_asked_twice_the_second_is_answered() -> None:
    async def scenario() -> None:
        posted: list[ev.Event] = []
        answers = Answers(posted.append)
        first = await started(answers)
        second = await started(answers)
        answers.settled.set()
        assert isinstance(await first, Unavailable)
        assert answers.give(RequestId("one"), LEASE)
        assert await second is LEASE
        assert [event for event in posted if isinstance(event, ev.RequestArrived)] == [ONE]

    asyncio.run(scenario())


def test_all_are_refused_when_the_scheduler_closes() -> None:
    async def scenario() -> None:
        answers = Answers(lambda event: None)
        answers.settled.set()
        asking = await started(answers)
        closing = Unavailable("closing")
        answers.refuse_all(closing)
        assert await asking is closing

    asyncio.run(scenario())
