"""What the server lets in."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from tests.pages import Page

from clearspan.workbench.gate import HEADERS, MOST_BYTES


@pytest.fixture
def stranger(page: Page) -> Iterator[httpx.Client]:
    """Somebody on this machine without the cookie."""
    with httpx.Client(base_url=page.base) as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/api/model", "/api/events", "/page.js", "/nowhere"])
def test_without_the_cookie_nothing_is_given(stranger: httpx.Client, path: str) -> None:
    answer = stranger.get(path)
    assert answer.status_code == 403
    assert answer.text == "refused: open the address that `clearspan open` printed"


def test_a_wrong_token_opens_nothing(stranger: httpx.Client) -> None:
    answer = stranger.get("/?token=wrong")
    assert (answer.status_code, answer.headers.get("set-cookie")) == (403, None)


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(page: Page) -> None:
    answer = httpx.get(page.workbench.address)
    cookie = answer.headers["set-cookie"]
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert cookie.startswith(f"clearspan-{urlsplit(page.base).port}=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert page.workbench.gate.token not in cookie


def test_each_start_has_another_token(page: Page, opened, tmp_path) -> None:
    assert opened(tmp_path).gate.token != page.workbench.gate.token


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}"])
def test_another_name_for_this_server_is_refused(page: Page, host: str) -> None:
    given = host.format(port=urlsplit(page.base).port)
    for path in ("/", "/api/model", f"/?token={page.workbench.gate.token}"):
        answer = page.http.get(path, headers={"host": given, "origin": f"http://{given}"})
        assert (answer.status_code, answer.text) == (403, "refused: this server is not called so")


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null", "https://127.0.0.1:{port}"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_another_page_is_refused_though_it_has_the_cookie(page: Page, origin: str, method: str) -> None:
    given = origin.format(port=urlsplit(page.base).port)
    answer = page.http.request(method, "/api/desk", headers={"origin": given}, json={})
    assert (answer.status_code, answer.text) == (403, "refused: another page asked")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_page_embeds_is_refused(page: Page, site: str) -> None:
    del page.http.headers["origin"]
    assert page.http.get("/api/model", headers={"sec-fetch-site": site}).text == "refused: another page asked"
    assert page.http.get("/api/model", headers={"sec-fetch-site": "none"}).status_code == 200


def test_a_change_says_where_it_comes_from(page: Page) -> None:
    del page.http.headers["origin"]
    answer = page.http.post("/api/tokens", json={"text": "a"})
    assert answer.text == "refused: a request that changes something says where it comes from"


def test_a_body_is_bounded(page: Page) -> None:
    too_long = page.http.post("/api/tokens", content=b"0" * (MOST_BYTES + 1))
    assert (too_long.status_code, too_long.text) == (413, "a body has 4,000,000 bytes at most")
    in_pieces = page.http.post("/api/tokens", content=iter([b"0"]))
    assert (in_pieces.status_code, in_pieces.text) == (411, "a body has a length")


@pytest.mark.parametrize("path", ["/", "/api/model", "/api/jobs/none/answer", "/?token=wrong"])
def test_every_answer_keeps_the_page_to_this_server(page: Page, path: str) -> None:
    answer = page.http.get(path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_it_listens_on_this_machine_alone(page: Page) -> None:
    assert page.workbench.socket.getsockname()[0] == "127.0.0.1"
