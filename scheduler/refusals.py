"""Requests that are refused: those whose deadline cannot be met, those that end runners, those that have no place."""

from __future__ import annotations

from scheduler import commands as cmd
from scheduler.choice.explain import explain_refusal
from scheduler.choice.placement import Chooser
from scheduler.cluster.models import Model
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.suspects import Suspects
from scheduler.decide import Ladder
from scheduler.errors import ArrieroError, DeadlineExceeded
from scheduler.forecast import Forecast
from scheduler.outbox import Outbox


class Refusals:
    """Takes requests out of the queue and says why."""

    def __init__(
        self, queue: RequestQueue, suspects: Suspects, ladder: Ladder, forecast: Forecast, outbox: Outbox
    ) -> None:
        self._queue = queue
        self._suspects = suspects
        self._ladder = ladder
        self._forecast = forecast
        self._out = outbox

    def refuse_late(self, now: float) -> None:
        """Requests whose deadline has passed, or cannot be met any more."""
        for waiting in self._queue.expired(now):
            waited = f"{waiting.model}: waited {now - waiting.arrived_at:.0f} s; {waiting.reason or 'no free slot'}"
            retry_s = self._forecast.wait_s(waiting, self._ladder.coming(waiting), now)
            self.refuse_as_late(waiting, DeadlineExceeded(waited, retry_after_s=retry_s, model=waiting.model))
        for head in tuple(self._queue.heads()):
            self.refuse_if_late(head, now)

    def refuse_if_late(self, waiting: Waiting, now: float) -> None:
        """Refuse a waiting request if its place in the queue is too far back for its deadline."""
        if waiting.request_id in self._queue:
            try:
                self._forecast.check(waiting, self._ladder.coming(waiting), now)
            except DeadlineExceeded as error:
                self.refuse_as_late(waiting, error)

    def refuse_as_late(self, waiting: Waiting, error: DeadlineExceeded) -> None:
        self._out.announce("request_expired", f"a request's deadline cannot be met: {error.message}", waiting.model)
        self.refuse(waiting, error)

    def refuse(self, waiting: Waiting, error: ArrieroError) -> None:
        """Take the request out of the queue, with this error."""
        self._queue.remove(waiting.request_id)
        self._out.post(cmd.RefuseRequest(waiting.request_id, error))

    def refuse_condemned(self, model: str, fingerprint: str, now: float) -> None:
        """Refuse all requests like the one under which runners end."""
        verdict = self._suspects.verdict(model, fingerprint, now)
        for waiting in self._queue.of_model(model):
            if verdict is not None and waiting.fingerprint == fingerprint:
                self.refuse(waiting, verdict)

    def refuse_alike(self, head: Waiting, error: ArrieroError) -> None:
        """Refuse the request, and those behind it that want the same."""
        for waiting in self._queue.of_model(head.model):
            if (waiting.kind, waiting.n_ctx) == (head.kind, head.n_ctx):
                self.refuse(waiting, error)
        told = {key: error.details[key] for key in ("reasons", "would_fit_if") if key in error.details}
        self._out.announce("request_refused", error.message, head.model, **told)

    def of_no_room(self, kind: type[ArrieroError], model: Model, chooser: Chooser) -> ArrieroError:
        """The error for a model that has no place."""
        choice = chooser.choose(explain=True)
        history = model.history
        because = ""
        if history.pauses:
            because = f"and nothing is evicted for it after repeated failures (last: {history.last_failure})"
        because = ", ".join(filter(None, (str(chooser.workload.wishes), because)))
        return explain_refusal(kind, model.name, choice.rejections, choice.would_fit_if, because)
