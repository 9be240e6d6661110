"""Tests of app.py: what it answers, in this process and from a real uvicorn.

Async tests run on anyio's pytest plugin, which httpx brings: the `anyio` mark selects
them, and the `anyio_backend` fixture names asyncio, the event loop that Django needs.
"""

import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import httpx
import pytest

import app

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
PATIENCE = 15  # seconds before a test gives up; one that passes never waits for them

ANSWERS = {
    "/health/": '{"status": "healthy", "async": true}',
    "/data/": '{"message": "Data fetched asynchronously"}',
    "/dashboard/": (
        '{"users": {"users": 1000, "active": 250}, '
        '"transactions": {"total": 5000, "today": 42}}'
    ),
}
NOT_FOUND = '{"error": "Not found", "paths": ["/health/", "/data/", "/dashboard/"]}'
SUMMARY = """\
=== Django Async Views ===

Basic Async View:
  async def my_view(request):
      return JsonResponse({...})

With Await:
  async def my_view(request):
      data = await async_operation()
      return JsonResponse(data)

Concurrent Calls:
  results = await asyncio.gather(
      api_call_1(),
      api_call_2()
  )

Running ASGI:
  uvicorn app:application --reload               # this file
  uvicorn myproject.asgi:application --reload    # a whole project
"""

T = TypeVar("T")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the ASGI application in this process."""
    transport = httpx.ASGITransport(app.application)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


def wait_for(condition: Callable[[], T]) -> T:
    """Return what `condition` returns, as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


@contextmanager
def serve(application: str) -> Iterator[httpx.Client]:
    """Run uvicorn on a free port; yield a client for it."""
    command = [sys.executable, "-m", "uvicorn", application, "--port", "0"]
    with TemporaryDirectory() as folder:
        log = Path(folder, "stderr")
        with log.open("w") as stderr:
            process = subprocess.Popen(command, cwd=HERE, stderr=stderr)
        try:
            running = re.compile(r"running on (\S+)")
            url = wait_for(lambda: running.search(log.read_text()))[1]
            with httpx.Client(
                base_url=url, timeout=PATIENCE, trust_env=False
            ) as client:
                yield client
        finally:
            process.terminate()
            process.wait(PATIENCE)
            print(log.read_text())  # pytest shows it when the test fails


@pytest.mark.parametrize("path", ANSWERS)
async def test_get_answers_json(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == ANSWERS[path]


@pytest.mark.parametrize("path", ANSWERS)
async def test_head_answers_without_a_body(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.head(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == ""


@pytest.mark.parametrize("path", ["/", "/health", "/unknown/"])
async def test_unknown_path_lists_the_routes(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == NOT_FOUND


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ANSWERS)
async def test_other_methods_are_not_allowed(
    client: httpx.AsyncClient, path: str, method: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


def test_uvicorn_answers_over_tcp() -> None:
    with serve("app:application") as client:
        for path, text in ANSWERS.items():
            assert client.get(path).text == text
            assert client.head(path).status_code == 200


def test_running_the_file_prints_the_summary() -> None:
    command = [sys.executable, "-W", "error", HERE / "app.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, SUMMARY, "")


def test_importing_the_file_prints_nothing() -> None:
    command = [sys.executable, "-c", "import app"]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
