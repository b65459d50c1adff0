"""The gate: lets a request in only from the page that this server gave out.

A server on this machine can be reached by every page that the browser shows. So each request needs a cookie that only
the address with the start's token sets; must name this server as its host, since another name that leads here is an
attack (DNS rebinding); and must come from this server's own pages, since those of other ports have the cookie too.
"""

import secrets
from collections.abc import Mapping
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 4_000_000
"""Of a request's body."""
HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Gate:
    """Stands before an application.

    Args:
        app: What is behind it.
        port: Of this server.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._port = app, port
        self.token, self._secret = secrets.token_urlsafe(32), secrets.token_urlsafe(32)

    @property
    def address(self) -> str:
        """What opens the page: the only place where the token is written."""
        return f"http://127.0.0.1:{self._port}/?token={self.token}"

    @property
    def _cookie(self) -> str:
        """The cookie's name: the browser sends a host's cookies to all of its ports."""
        return f"clearspan-{self._port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands the request on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                own = ((name.encode(), value.encode()) for name, value in HEADERS.items())
                message["headers"] = [*message["headers"], *(one for one in own if one[0] not in known)]
            await send(message)

        answer = self._refused(scope)
        await (self._app if answer is None else answer)(scope, receive, guarded)

    def _refused(self, scope: Scope) -> Response | None:
        """Returns the answer to a request that goes no further; None where it does."""
        headers = Headers(scope=scope)
        host, origin, site = headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site")
        is_read = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        if scope["type"] != "http" or host not in (f"127.0.0.1:{self._port}", f"localhost:{self._port}"):
            return _refusal("this server is not called so")
        if origin is None and not is_read:
            return _refusal("a request that changes something says where it comes from")
        if origin is not None and origin != f"http://{host}":
            return _refusal("another page asked")
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and is_read and _is_same(given, self.token):
            entered = RedirectResponse("/", 303)
            entered.set_cookie(self._cookie, self._secret, httponly=True, samesite="strict", path="/")
            return entered
        if site not in (None, "same-origin", "none"):
            return _refusal("another page asked")
        if not _is_same(cookie_parser(headers.get("cookie", "")).get(self._cookie, ""), self._secret):
            return _refusal("open the address that `clearspan open` printed")
        if "transfer-encoding" in headers:
            return PlainTextResponse("a body has a length", 411)
        if int(headers.get("content-length", "0")) > MOST_BYTES:
            return PlainTextResponse(f"a body has {MOST_BYTES:,} bytes at most", 413)
        return None


def _is_same(given: str, own: str) -> bool:
    return secrets.compare_digest(given.encode(), own.encode())


def _refusal(reason: str) -> Response:
    return PlainTextResponse(f"refused: {reason}", 403)
