"""What asks a workbench, as its page does."""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np

TEXT, OTHER = "import os\nimport", "import re\nimport"
TYPES = {"F32": np.float32, "I32": np.int32, "BOOL": np.bool_}


class Page:
    """Asks a workbench as its page does."""

    def __init__(self, workbench: Any, client: str = "one") -> None:
        self.workbench, self.client = workbench, client
        self.base = workbench.address.partition("/?")[0]
        self.http = httpx.Client(base_url=self.base, headers={"origin": self.base}, timeout=60)
        assert self.http.get(workbench.address).status_code == 303

    def tokens(self, text: str) -> dict[str, Any]:
        found = self.http.post("/api/tokens", json={"text": text}).json()
        return {"tokens": found["tokens"], "text": found["text"]}

    def submit(self, **request: Any) -> dict[str, Any]:
        return self.http.post("/api/jobs", json={"client": self.client, "request": request}).json()

    def cancel(self, key: str) -> None:
        assert self.http.delete(f"/api/jobs/{key}", params={"client": self.client}).status_code == 200

    def until(self, key: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Returns the first state of a job that is so, as the events tell it."""
        for job in self.events():
            if job["key"] == key and is_so(job):
                return job
            assert job["key"] != key or job["state"] in ("waiting", "running"), job
        raise AssertionError("the events ended")

    def ended(self, **request: Any) -> dict[str, Any]:
        """Returns the last state of a request's job."""
        key = self.submit(**request)["key"]
        return self.until(key, lambda job: job["state"] in ("done", "failed", "cancelled"))

    def events(self) -> Iterator[dict[str, Any]]:
        with self.http.stream("GET", "/api/events", params={"client": self.client}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def answer(self, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns an answer's facts and tensors, read as the page reads them."""
        return read_answer(self.http.get(f"/api/jobs/{key}/answer").content)


def read_answer(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    facts = json.loads(header.pop("__metadata__")["facts"])
    tensors = {}
    for name, one in header.items():
        first, last = one["data_offsets"]
        found = np.frombuffer(content[start + first : start + last], TYPES[one["dtype"]])
        tensors[name] = found.reshape(one["shape"])
    return facts, tensors
