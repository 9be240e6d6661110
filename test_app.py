"""Tests of app.py, and a pattern for testing async Django with pytest and httpx alone.

Async tests run on anyio's pytest plugin, which httpx brings: the `anyio` mark selects
them, and `anyio_backend` names asyncio, the event loop that Django needs. `client`
calls the application in this process; `serve` runs uvicorn in a process of its own.

No test asserts how long something took: a busy machine would break it. What should
overlap is held until the test has seen all of it in flight at once. Calls made one
after the other never get there, and the test fails when its `PATIENCE` is over.
"""

import asyncio
import inspect
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired, run
from tempfile import TemporaryDirectory
from typing import NamedTuple

import anyio
import pytest
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import URLPattern, path
from httpx import ASGITransport, AsyncClient, Client, Response, TransportError

import app

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent
PATIENCE = 10  # seconds until a test gives up; one that passes never waits for them
ANSWERS = {
    "/health/": '{"status": "healthy", "async": true}',
    "/data/": '{"message": "Data fetched asynchronously"}',
    "/dashboard/": '{"users": {"users": 1000, "active": 250}, '
    '"transactions": {"total": 5000, "today": 42}}',
}
NOT_FOUND = '{"error": "Not found", "paths": ["/health/", "/data/", "/dashboard/"]}'


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    transport = ASGITransport(app.application)
    async with AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


@pytest.mark.parametrize("url", ANSWERS)
async def test_get_and_head_answer(client: AsyncClient, url: str) -> None:
    get, head = await client.get(url), await client.head(url)
    assert (get.status_code, get.text) == (200, ANSWERS[url])
    assert get.headers["content-type"] == "application/json"
    assert (head.status_code, head.headers) == (200, get.headers)


@pytest.mark.parametrize("url", ["/", "/health", "/unknown/"])
async def test_unknown_path_lists_routes(client: AsyncClient, url: str) -> None:
    answer = await client.get(url)
    assert (answer.status_code, answer.text) == (404, NOT_FOUND)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("url", ANSWERS)
async def test_unsafe_is_refused(client: AsyncClient, url: str, method: str) -> None:
    answer = await client.request(method, url)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("url", [*ANSWERS, "/secret/"])
async def test_no_answer_repeats_the_request(client: AsyncClient, url: str) -> None:
    for method in ("GET", "POST"):
        answer = await client.request(method, url, params={"secret": "secret"})
        assert "secret" not in f"{answer.headers} {answer.text}"


@pytest.mark.parametrize("route", app.urlpatterns, ids=str)
def test_view_is_a_coroutine_function(route: URLPattern) -> None:
    assert inspect.iscoroutinefunction(route.callback)


class Calls(NamedTuple):
    seconds: asyncio.Queue[float]
    released: asyncio.Event


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Queue the seconds that each `asyncio.sleep` is asked for; hold all of them."""
    calls = Calls(asyncio.Queue(), asyncio.Event())

    async def sleep(seconds: float) -> None:
        calls.seconds.put_nowait(seconds)
        await calls.released.wait()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return calls


async def test_views_wait_for_their_calls(client: AsyncClient, calls: Calls) -> None:
    calls.released.set()
    for url in ("/health/", "/data/", "/dashboard/"):
        await client.get(url)
    seconds = [calls.seconds.get_nowait() for _ in range(calls.seconds.qsize())]
    assert seconds == [0.1, 0.05, 0.05]


async def test_dashboard_calls_overlap(client: AsyncClient, calls: Calls) -> None:
    async def release_both() -> None:
        await calls.seconds.get()
        await calls.seconds.get()
        calls.released.set()

    with anyio.fail_after(PATIENCE):
        answer, _ = await asyncio.gather(client.get("/dashboard/"), release_both())
    assert answer.text == ANSWERS["/dashboard/"]


@pytest.mark.parametrize(("url", "in_flight"), [("/data/", 100), ("/dashboard/", 200)])
async def test_one_event_loop_serves_100_requests_at_once(
    client: AsyncClient, calls: Calls, url: str, in_flight: int
) -> None:
    async def ask_for_health_and_release() -> Response:
        for _ in range(in_flight):
            await calls.seconds.get()
        health = await client.get("/health/")
        calls.released.set()
        return health

    requests = [client.get(url) for _ in range(100)]
    with anyio.fail_after(PATIENCE):
        health, *answers = await asyncio.gather(ask_for_health_and_release(), *requests)
    assert health.text == ANSWERS["/health/"]
    assert {answer.text for answer in answers} == {ANSWERS[url]}


meeting = threading.Barrier(2, timeout=PATIENCE)


def blocking_view(request: HttpRequest) -> HttpResponse:
    meeting.wait()  # From here on, the test knows that this view blocks,
    meeting.wait()  # until the test has the async view's answer.
    return HttpResponse("unblocked")


urlpatterns = [path("blocking/", blocking_view), path("health/", app.health_check)]


@override_settings(ROOT_URLCONF=__name__)
async def test_blocking_sync_view_leaves_async_view_free(client: AsyncClient) -> None:
    blocked = asyncio.create_task(client.get("/blocking/"))
    await asyncio.to_thread(meeting.wait)
    assert (await client.get("/health/")).text == ANSWERS["/health/"]
    await asyncio.to_thread(meeting.wait)
    assert (await blocked).text == "unblocked"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(TransportError):  # A server on its way up or down.
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError


@contextmanager
def serve(
    *arguments: str, folder: str | Path = HERE
) -> Iterator[tuple[Popen, Path, Client]]:
    """Run uvicorn on a free port, which its log names; yield it, its log, a client."""
    command = [sys.executable, "-m", "uvicorn", "--port", "0", *arguments]
    with TemporaryDirectory() as log_folder:
        log = Path(log_folder, "stderr")
        with log.open("w") as stderr:
            process = Popen(
                command, cwd=folder, stdin=PIPE, stderr=stderr, start_new_session=True
            )
        try:
            wait_for(lambda: "running on" in log.read_text())
            url = re.search(r"running on (\S+)", log.read_text())[1]
            with Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
                yield process, log, client
        finally:
            process.terminate()
            try:
                process.communicate(timeout=PATIENCE)  # Closing stdin frees held calls.
            except TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # Takes a --reload worker along.
                raise
            finally:
                print(log.read_text())  # pytest shows it when the test fails.


def test_uvicorn_answers_over_tcp() -> None:
    with serve("app:application") as (_, _, client):
        assert {url: client.get(url).text for url in ANSWERS} == ANSWERS
        assert {client.head(url).status_code for url in ANSWERS} == {200}


def failing_application() -> ASGIHandler:
    async def get_user_stats() -> dict[str, int]:
        raise RuntimeError("user service is down")

    app.get_user_stats = get_user_stats
    return app.application


def test_view_that_raises_puts_its_traceback_on_stderr_only() -> None:
    with serve("test_app:failing_application", "--factory") as (_, log, client):
        answer = client.get("/dashboard/")
        assert answer.status_code == 500
        assert "Server Error (500)" in answer.text
        assert not re.search("Traceback|RuntimeError|user service", answer.text)
        assert "Traceback" in log.read_text()
        assert "RuntimeError: user service is down" in log.read_text()
        assert client.get("/health/").text == ANSWERS["/health/"]


def held_application() -> ASGIHandler:
    async def get_user_stats() -> dict[str, int]:
        print("in flight", file=sys.stderr)
        await asyncio.to_thread(sys.stdin.readline)
        return {"users": 1000, "active": 250}

    app.get_user_stats = get_user_stats
    return app.application


def test_requests_over_tcp_overlap_and_outlive_sigterm() -> None:
    server = serve("test_app:held_application", "--factory")
    with ThreadPoolExecutor() as pool, server as (process, log, client):
        requests = [pool.submit(client.get, "/dashboard/") for _ in range(3)]
        wait_for(lambda: log.read_text().count("in flight") == 3)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Waiting for connections" in log.read_text())
        process.communicate(b"release\n" * 3, timeout=PATIENCE)
        answers = [request.result().text for request in requests]
        assert answers == [ANSWERS["/dashboard/"]] * 3


def test_reload_serves_an_edited_copy_under_another_name() -> None:
    with TemporaryDirectory() as folder:
        copy = Path(folder, "renamed.py")
        source = Path(app.__file__).read_text()
        edited = source.replace("healthy", "edited")
        copy.write_text(source)
        server = serve("renamed:application", "--reload", folder=folder)
        with server as (_, log, client):
            wait_for(lambda: "healthy" in client.get("/health/").text)
            # Edited until it is noticed: the watcher starts later than the worker.
            wait_for(
                lambda: "Reloading" in log.read_text() or not copy.write_text(edited)
            )
            wait_for(lambda: "edited" in client.get("/health/").text)


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
  pip install "Django>=5.2" "uvicorn[standard]"
  uvicorn app:application --reload               # this file
  uvicorn myproject.asgi:application --reload    # a whole project
"""


@pytest.mark.parametrize(
    ("argument", "output"), [("app.py", SUMMARY), ("-cimport app", "")]
)
def test_only_running_the_file_prints(argument: str, output: str) -> None:
    python = [sys.executable, "-W", "error", argument]
    ended = run(python, cwd=HERE, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == (output, "")


def test_debug_is_off() -> None:
    assert settings.DEBUG is False


README = (HERE / "README.md").read_text()


async def test_readme_answers_and_urls_are_true(client: AsyncClient) -> None:
    examples = re.findall(r"curl (http\S+)\n```\n\n```json\n(.+)\n```", README)
    assert len(examples) == README.count("```json")
    assert {text for _, text in examples} == {*ANSWERS.values()}
    for url, text in examples:
        assert (await client.get(url)).text == text
    for url in re.findall(r"http://127\.0\.0\.1[\w:/.]*", README):
        assert (await client.get(url)).status_code == 200
