"""The feed: changes of jobs as Server-Sent Events. Whoever connects, or connects again, is told the state of all."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from clearspan.workbench.work import Job

_PAUSE = 15.0
"""Seconds after which a line is sent that says nothing, so that a connection that is gone is noticed."""


@dataclass(eq=False)
class _Listener:
    client: str
    loop: asyncio.AbstractEventLoop
    news: dict[str, Job]
    is_awake: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, job: Job) -> None:
        """Keeps the latest of a job until it is sent: a slow listener misses steps, and never the last."""
        self.news[job.key] = job
        self.is_awake.set()


class Feed:
    """Who listens."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._is_closed = False

    @property
    def clients(self) -> set[str]:
        """The clients that listen."""
        return {one.client for one in tuple(self._listeners)}

    def changed(self, job: Job) -> None:
        """Tells every listener of a job; may be called in any thread."""
        for one in tuple(self._listeners):
            one.loop.call_soon_threadsafe(one.note, job)

    def close(self) -> None:
        """Ends all streams; called in the loop's thread."""
        self._is_closed = True
        for one in tuple(self._listeners):
            one.is_awake.set()

    async def listen(self, client: str, jobs: Iterable[Job]) -> AsyncIterator[str]:
        """Yields events: each the state of a job that changed."""
        listener = _Listener(client, asyncio.get_running_loop(), {job.key: job for job in jobs})
        self._listeners.add(listener)
        listener.is_awake.set()
        try:
            yield ": connected\n\n"
            while not self._is_closed:
                try:
                    await asyncio.wait_for(listener.is_awake.wait(), _PAUSE)
                except TimeoutError:
                    yield ": still here\n\n"
                listener.is_awake.clear()
                news, listener.news = listener.news, {}
                for job in news.values():
                    yield f"event: job\ndata: {json.dumps(job.to_json())}\n\n"
        finally:
            self._listeners.discard(listener)
