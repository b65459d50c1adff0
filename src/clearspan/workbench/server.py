"""The server: what the page asks for over HTTP, on 127.0.0.1 alone."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from clearspan.bridge import TransformerBridge
from clearspan.checks import check_fields, check_kind
from clearspan.errors import ClearspanError
from clearspan.view.scripts import DRAWINGS, script
from clearspan.workbench.facts import model_facts, read_prompt
from clearspan.workbench.feed import Feed
from clearspan.workbench.gate import Gate
from clearspan.workbench.scripts import notebook
from clearspan.workbench.sessions import Desk, Session
from clearspan.workbench.views import parse_view
from clearspan.workbench.work import Job, Worker

Found = TypeVar("Found")
_PAGE = Path(__file__).parent / "page"


class Workbench:
    """A model, its session, and the page: what `clearspan open` serves.

    Args:
        bridge: The model; the workbench's thread owns it from here on.
        model: What was booted, as scripts write it.
        folder: The session's; by default that of the model's weights.
        port: Of the server; 0 for a free one.
    """

    def __init__(self, bridge: TransformerBridge, model: str, folder: Path | None = None, port: int = 0) -> None:
        self.socket = socket.create_server(("127.0.0.1", port))
        self.session = Session(folder, bridge)
        self._model, self._facts, self._feed = model, model_facts(bridge), Feed()
        self.worker = Worker(bridge, self.session, self._feed.changed)
        self.gate = Gate(self._app(), self.socket.getsockname()[1])
        self._server = _Server(uvicorn.Config(self.gate, log_level="warning", access_log=False), self._feed)

    @property
    def address(self) -> str:
        """What opens the page."""
        return self.gate.address

    def serve(self) -> None:
        """Serves until Ctrl-C, or `stop`."""
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self._server.run([self.socket])
        finally:
            self.worker.close()
            self.socket.close()

    def stop(self) -> None:
        """Ends `serve`; may be called in any thread."""
        self._server.should_exit = True

    def _app(self) -> Starlette:
        pages = [Route(path, _sender(content, kind)) for path, content, kind in _pages()]
        return Starlette(
            routes=[
                *pages,
                Route("/api/model", self._tell_model),
                Route("/api/tokens", self._read_text, methods=["POST"]),
                Route("/api/token", self._read_token, methods=["POST"]),
                Route("/api/desk", self._desk, methods=["GET", "PUT"]),
                Route("/api/events", self._events),
                Route("/api/jobs", self._submit, methods=["POST"]),
                Route("/api/jobs/{key}", self._cancel, methods=["DELETE"]),
                Route("/api/jobs/{key}/answer", self._answer),
                Route("/api/jobs/{key}/{form:str}", self._written),
            ],
            exception_handlers={ClearspanError: _explain},
        )

    async def _tell_model(self, _: Request) -> Response:
        return JSONResponse(self._facts)

    async def _asked(self, function: Callable[[TransformerBridge], Found]) -> Found:
        return await asyncio.wrap_future(self.worker.ask(function))

    async def _read_text(self, request: Request) -> Response:
        given = await _json(request)
        return JSONResponse(await self._asked(lambda bridge: read_prompt(bridge, given)))

    async def _read_token(self, request: Request) -> Response:
        data = await _body(request, "text")
        return JSONResponse({"token": await self._asked(lambda bridge: bridge.to_single_token(data["text"]))})

    async def _desk(self, request: Request) -> Response:
        if request.method == "PUT":
            self.session.desk = Desk.from_json(await _json(request))
        return JSONResponse(self.session.desk.to_json())

    async def _events(self, request: Request) -> Response:
        stream = self._feed.listen(request.query_params.get("client", ""), self.worker.jobs.values())
        return StreamingResponse(stream, media_type="text/event-stream")

    async def _submit(self, request: Request) -> Response:
        data = await _body(request, "client")
        check_fields("job", data, "request", "client")
        return JSONResponse(self.worker.submit(parse_view(data["request"]), data["client"]).to_json())

    def _job(self, request: Request) -> Job:
        job = self.worker.jobs.get(request.path_params["key"])
        if job is None:
            raise HTTPException(404, "there is no such job")
        return job

    async def _cancel(self, request: Request) -> Response:
        job = self._job(request)
        self.worker.cancel(job.key, request.query_params.get("client", ""), self._feed.clients)
        return JSONResponse(job.to_json())

    async def _answer(self, request: Request) -> Response:
        content = self.session.content(self._job(request).key)
        if content is None:
            raise HTTPException(404, "there is no answer yet")
        return Response(content, media_type="application/octet-stream")

    async def _written(self, request: Request) -> Response:
        view = self._job(request).view
        match request.path_params["form"]:
            case "script":
                return PlainTextResponse(view.script(self._model))
            case "notebook":
                return JSONResponse(notebook(view, self._model))
        raise HTTPException(404, "a view is written as a script or a notebook")


class _Server(uvicorn.Server):
    """A server whose event streams end when it does."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._feed.close()
        await super().shutdown(sockets)


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise HTTPException(400, "this is no JSON") from error


async def _body(request: Request, name: str) -> Mapping[str, Any]:
    """Returns a body that has a text under a name."""
    data = await _json(request)
    check_fields("request", data, name)
    check_kind(str, **{name: data[name]})
    return data


async def _explain(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def _pages() -> list[tuple[str, bytes, str]]:
    """Returns the page's files: address, content, type."""
    style = "".join(path.read_text(encoding="utf-8") for path in (DRAWINGS / "drawings.css", _PAGE / "page.css"))
    return [
        ("/", (_PAGE / "index.html").read_bytes(), "text/html"),
        ("/page.css", style.encode(), "text/css"),
        ("/page.js", script(_PAGE / "main.js").encode(), "text/javascript"),
    ]


def _sender(content: bytes, kind: str) -> Callable[[Request], Any]:
    async def send(_: Request) -> Response:
        return Response(content, media_type=kind)

    return send
