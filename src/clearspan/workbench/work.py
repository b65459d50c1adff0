"""Work: one thread owns the model, and answers requests one after the other."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from clearspan.bridge import TransformerBridge
from clearspan.errors import ClearspanError
from clearspan.workbench.sessions import Session
from clearspan.workbench.views import Answer, View

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Found = TypeVar("Found")


@dataclass(eq=False)
class Job:
    """A request and how far it is.

    Attributes:
        key: Of its answer.
        view: The request.
        state: Where it is.
        stage: What is done at present.
        done: Steps of the stage that are done.
        total: All of its steps.
        error: Why it failed.
        revision: Grows whenever more of the answer can be read.
        made: When the answer was written; empty before.
        seconds: How long it took.
        clients: Who asked for it.
    """

    key: str
    view: View
    state: State = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    error: str | None = None
    revision: int = 0
    made: str = ""
    seconds: float = 0.0
    clients: set[str] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        names = ("key", "state", "stage", "done", "total", "error", "revision", "made", "seconds")
        return {"request": self.view.to_json(), **{name: getattr(self, name) for name in names}}


class Worker:
    """The thread that owns the model.

    Args:
        bridge: The model. Nothing else runs it, and nothing changes its weights, while the worker is there.
        session: Where answers are kept.
        changed: Called in any thread after a job has changed.
    """

    def __init__(self, bridge: TransformerBridge, session: Session, changed: Callable[[Job], None]) -> None:
        self._bridge, self._session, self._changed = bridge, session, changed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="clearspan-model")
        self.jobs = {
            key: Job(key, one.view, "done" if one.is_finished else "cancelled", made=one.made, seconds=one.seconds)
            for key, one in session.history().items()
        }

    def submit(self, view: View, client: str) -> Job:
        """Returns the job of a request: the one that is there, or a new one at the end of the queue.

        A job that failed or was cancelled is begun anew, from what was kept of it.
        """
        key = self._session.key(view)
        job = self.jobs.get(key)
        if job is None or job.state in ("failed", "cancelled") or job.stop.is_set():
            self.jobs.pop(key, None)  # the latest is last
            job = self.jobs[key] = Job(key, view)
            future = self._pool.submit(self._answer, job)
            future.add_done_callback(lambda ended: self._end(job, ended))
            self._changed(job)
        job.clients.add(client)
        return job

    def cancel(self, key: str, client: str, present: set[str]) -> None:
        """Takes back a client's request; the job stops unless another client asked for it too.

        Args:
            key: Of the job.
            client: Who takes it back.
            present: The clients that are there; those that have gone keep no job alive.
        """
        job = self.jobs[key]
        job.clients = (job.clients - {client}) & present
        if not job.clients and job.state in ("waiting", "running"):
            job.stop.set()

    def ask(self, function: Callable[[TransformerBridge], Found]) -> "Future[Found]":
        """Returns what a function of the model returns, once it is its turn."""
        return self._pool.submit(function, self._bridge)

    def close(self) -> None:
        """Ends the work: the running job stops at its next step."""
        for job in tuple(self.jobs.values()):
            job.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, job: Job) -> None:
        if job.stop.is_set():
            raise CancelledError
        job.state = "running"
        begun = time.monotonic()
        watch = _Watching(job, self._session, self._changed, self._session.begun(job.key))
        answer = job.view.run(self._bridge, watch)
        job.seconds = time.monotonic() - begun
        job.made = self._session.keep(job.view, answer, job.seconds, is_finished=True).made
        job.revision += 1

    def _end(self, job: Job, ended: "Future[None]") -> None:
        error = CancelledError() if ended.cancelled() else ended.exception()
        match error:
            case None:
                job.state = "done"
            case CancelledError():
                job.state = "cancelled"
            case ClearspanError():
                job.state, job.error = "failed", str(error)
            case _:
                job.state, job.error = "failed", f"{type(error).__name__}: {error}"
        self._changed(job)


@dataclass(frozen=True)
class _Watching:
    """Follows a job: stops it where it was cancelled, and keeps what is there so far."""

    job: Job
    session: Session
    changed: Callable[[Job], None]
    begun: Answer | None

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.job.stop.is_set():
            raise CancelledError
        self.job.stage, self.job.done, self.job.total = stage, done, total
        self.changed(self.job)

    def show(self, answer: Answer) -> None:
        self.session.keep(self.job.view, answer, 0.0, is_finished=False)
        self.job.revision += 1
        self.changed(self.job)
