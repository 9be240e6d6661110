"""Tests of app.py, and a pattern for testing async Django with pytest and httpx alone.

Async tests run on anyio's pytest plugin, which httpx brings: the `anyio` mark selects
them, and `anyio_backend` names asyncio, the event loop that Django needs. `client`
calls the application in this process; `serve` runs uvicorn in a process of its own.
The pattern is for an app without a database. A project that has one tests with
Django's own `AsyncClient` and test runner, or with pytest-django.

No test asserts how long something took: a busy machine would break it. What should
overlap is held until the test has seen all of it in flight at once. Calls made one
after the other never get there, and the test fails when its `PATIENCE` is over.
"""

import asyncio
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
from asyncio import Task, create_task, gather, to_thread
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import NamedTemporaryFile, TemporaryDirectory
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.management import call_command
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern
from httpx import ASGITransport, AsyncClient, Client, Response, TransportError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # pytest does so too, but not in every import mode.

import app  # noqa: E402

pytestmark = pytest.mark.anyio

PATIENCE = 10  # seconds until a wait gives up; one that succeeds never takes them
ANSWERS = {
    "/health/": '{"status": "healthy", "async": true}',
    "/data/": '{"message": "Data fetched asynchronously"}',
    "/dashboard/": '{"users": {"users": 1000, "active": 250}, '
    '"transactions": {"total": 5000, "today": 42}}',
}
NOT_FOUND = '{"error": "Not found", "paths": ["/health/", "/data/", "/dashboard/"]}'
JSON = {"content-type": "application/json"}
HTML = {"content-type": "text/html; charset=utf-8"}
# Read before a plugin of pytest can change them.
SETTINGS = {n for n in dir(settings) if n.isupper() and settings.is_overridden(n)}
Calls = SimpleNamespace
Get = Callable[[], Any]


@pytest.fixture(autouse=True)
def ends_in_order(capfd: pytest.CaptureFixture) -> Iterator[None]:
    """End what the test started when the run is told to end, or when the test hangs."""

    def end_run(number: int, frame: FrameType) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends its signal twice.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(15)  # In case that the end hangs as well.
        reason = f"{signal.Signals(number).name} in {os.environ['PYTEST_CURRENT_TEST']}"
        with capfd.disabled():
            print(reason, flush=True)
            faulthandler.dump_traceback()  # Of all threads: it says what hangs.
        raise KeyboardInterrupt(reason)

    signals = [signal.SIGTERM, signal.SIGHUP, signal.SIGALRM]
    caught = [n for n in signals if signal.getsignal(n) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end_run)
    signal.alarm(25)  # in seconds; a test that fails waits less than that
    yield
    signal.alarm(0)
    for number in caught:
        signal.signal(number, signal.SIG_DFL)


def wait_for(what: str, get: Get, wanted: object, *requests: Task | Future) -> None:
    """Poll until `get` returns what is wanted; fail when a request ends before that."""
    deadline = time.monotonic() + PATIENCE
    while (got := get()) != wanted:
        answers = [request.result() for request in requests if request.done()]
        if answers or time.monotonic() > deadline:
            pytest.fail(f"{what}: {got!r}, not {wanted!r}; answers: {answers}")
        time.sleep(0.01)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    transport = ASGITransport(app.application)
    async with AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Hold each simulated call, an `asyncio.sleep`, until all of them are released."""
    calls = Calls(started=[], ended=[], released=asyncio.Event())

    async def sleep(seconds: float) -> None:
        calls.started.append(seconds)
        await calls.released.wait()
        calls.ended.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return calls


def exact(answer: Response) -> tuple[int, dict[str, str], str]:
    return answer.status_code, dict(answer.headers), answer.text


def test_not_found_reads_nothing() -> None:
    assert app.not_found(object(), object()).content.decode() == NOT_FOUND


async def test_views_wait_without_blocking(client: AsyncClient, calls: Calls) -> None:
    blocking = []

    def note(frame: FrameType, event: str, function: object) -> None:
        if function is time.sleep:
            blocking.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")

    calls.released.set()
    threading.setprofile(note)  # Django calls the 404 handler in another thread.
    sys.setprofile(note)
    try:
        for url in (*ANSWERS, "/unknown/"):
            await client.get(url)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert blocking == []
    assert calls.started == [0.1, 0.05, 0.05]


@pytest.mark.parametrize("url", [*ANSWERS, "/a/health/"])
async def test_answer_depends_on_path_and_method_alone(
    client: AsyncClient, calls: Calls, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    calls.released.set()
    caplog.set_level("DEBUG")
    read = (200, JSON, ANSWERS[url]) if url in ANSWERS else (404, JSON, NOT_FOUND)
    refused = (405, {**HTML, "allow": "GET, HEAD"}, "") if url in ANSWERS else read
    wanted = {"GET": read, "HEAD": (*read[:2], "")}
    methods = ["GET"] * 100 + ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    for number, method in enumerate(methods):
        headers = dict.fromkeys(["Accept", "Cookie", "Host"], f"{number}={number}")
        answer = await client.request(method, f"{url}?{number}", headers=headers)
        assert exact(answer) == wanted.get(method, refused), (method, number)
    assert app.__file__ not in {record.pathname for record in caplog.records}


@pytest.mark.parametrize("route", app.urlpatterns, ids=str)
async def test_view_reads_the_method_alone(route: URLPattern, calls: Calls) -> None:
    calls.released.set()
    answer = await route.callback(SimpleNamespace(method="GET"))
    assert answer.content.decode() == ANSWERS[f"/{route.pattern}"]


@pytest.mark.parametrize("route", app.urlpatterns[1:], ids=str)
async def test_view_heeds_its_cancellation(route: URLPattern, calls: Calls) -> None:
    view = create_task(route.callback(SimpleNamespace(method="GET")))
    await to_thread(wait_for, "call started", lambda: bool(calls.started), True, view)
    view.cancel()
    with pytest.raises(asyncio.CancelledError):
        await view


@pytest.mark.parametrize(("url", "count"), [("/data/", 100), ("/dashboard/", 200)])
async def test_one_event_loop_serves_100_requests_at_once(
    client: AsyncClient, calls: Calls, url: str, count: int
) -> None:
    requests = [create_task(client.get(url)) for _ in range(100)]
    in_flight = ("calls in flight", lambda: len(calls.started), count)
    await to_thread(wait_for, *in_flight, *requests)
    assert (await client.get("/health/")).text == ANSWERS["/health/"]
    assert not any(request.done() for request in requests)
    calls.released.set()
    assert {answer.text for answer in await gather(*requests)} == {ANSWERS[url]}


class ServiceError(ConnectionError, TimeoutError):
    """What a real call may raise, so that nothing which catches it stays unseen."""


@pytest.mark.parametrize("source", ["get_user_stats", "get_transaction_stats"])
async def test_call_that_raises_is_a_500_at_once_and_the_other_runs_on(
    client: AsyncClient, calls: Calls, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    with patch.object(app, source, side_effect=ServiceError("service is down")) as call:
        request = create_task(client.get("/dashboard/"))
        await to_thread(wait_for, "answer while a call is held", request.done, True)
    status, headers, text = exact(await request)
    assert (status, headers) == (500, HTML)
    assert "Server Error (500)" in text
    assert "service is down" not in text
    assert [record.exc_info[1] for record in caplog.records] == [call.side_effect]
    call.assert_awaited_once()
    assert calls.ended == []
    calls.released.set()
    await to_thread(wait_for, "the other call's end", lambda: calls.ended, [0.05])


async def test_sync_view_that_blocks_leaves_async_view_free(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked, unblocked = threading.Event(), threading.Event()

    def blocking_view(request: HttpRequest) -> HttpResponse:
        blocked.set()
        return HttpResponse(f"unblocked: {unblocked.wait(PATIENCE)}")

    monkeypatch.setattr(app.urlpatterns[1], "callback", blocking_view)
    request = create_task(client.get("/data/"))
    await to_thread(wait_for, "sync view called", blocked.is_set, True, request)
    health = await client.get("/health/")
    unblocked.set()
    assert health.text == ANSWERS["/health/"]
    assert (await request).text == "unblocked: True"


def test_django_is_as_it_comes_but_for_two_settings() -> None:
    assert {"LOGGING_CONFIG", "ROOT_URLCONF"} == SETTINGS
    assert type(app.application) is ASGIHandler


# Without what would change how Python, Django or uvicorn runs.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not re.match("DJANGO_|PYTHON(?!PATH)|UVICORN_|WEB_CONCURRENCY", name)
} | {"PYTHONUNBUFFERED": "1"}


@contextmanager
def python(*arguments: str, folder: str | Path = HERE) -> Iterator[tuple[Popen, Get]]:
    """Run Python; yield its process and what reads its output. Leave no process."""
    with NamedTemporaryFile() as output:
        read = Path(output.name).read_text
        process = Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=PIPE,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
        )
        try:
            yield process, read
        finally:
            process.terminate()
            process.stdin.close()  # This frees the calls that are held.
            try:
                process.wait(PATIENCE)
            finally:
                # What it started may be left over, such as a --reload worker.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                print(read())  # pytest shows it when the test fails.


@contextmanager
def serve(
    *arguments: str, folder: str | Path = HERE
) -> Iterator[tuple[Popen, Get, Client]]:
    """Run uvicorn on a free port; yield its process, what reads its log, a client."""
    uvicorn = ("-m", "uvicorn", "--port", "0", "--no-access-log", "--no-use-colors")
    with python(*uvicorn, *arguments, folder=folder) as (process, log):

        def started() -> bool:
            assert process.poll() is None
            return "running on" in log() and "startup complete" in log()

        wait_for("uvicorn started", started, True)
        url = re.search(r"running on (\S+)", log())[1]
        with Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            yield process, log, client


def test_uvicorn_answers_over_tcp_and_logs_failures_alone() -> None:
    with serve("app:application") as (_, log, client):
        assert {url: client.get(url).text for url in ANSWERS} == ANSWERS
        assert {client.head(url).status_code for url in ANSWERS} == {200}
        assert client.get("/health").text == NOT_FOUND
        assert client.post("/health/").status_code == 405
        *start, running, missing, refused = log().splitlines()
        assert {line.split(":")[0] for line in [*start, running]} == {"INFO"}
        assert "running on" in running
        assert missing == "Not Found: /health"
        assert refused == "Method Not Allowed (POST): /health/"


def failing_application() -> ASGIHandler:
    """Give the app a source that cannot be called; uvicorn's own process calls this."""
    app.get_user_stats = None
    return app.application


def test_traceback_of_a_view_is_on_stderr_once() -> None:
    with serve("test_app:failing_application", "--factory") as (_, log, client):
        assert client.get("/dashboard/").status_code == 500
        failure = log().partition("(Press CTRL+C to quit)\n")[2]
        assert failure.startswith("Internal Server Error: /dashboard/\nTraceback")
        assert failure.endswith("TypeError: 'NoneType' object is not callable\n")
        assert failure.count("Traceback") == 1


def held_application() -> ASGIHandler:
    """Hold each simulated call until stdin ends; uvicorn's own process calls this."""

    async def sleep(seconds: float) -> None:
        print("in flight")
        try:
            await to_thread(sys.stdin.buffer.read)
        except asyncio.CancelledError:
            print("cancelled")
            raise

    app.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
    return app.application


def test_requests_over_tcp_overlap_and_outlive_sigterm() -> None:
    server = serve("test_app:held_application", "--factory")
    with ThreadPoolExecutor() as pool, server as (process, log, client):
        requests = [pool.submit(client.get, "/dashboard/") for _ in range(2)]
        wait_for("calls in flight", lambda: log().count("in flight"), 4, *requests)
        process.terminate()
        wait_for("waiting", lambda: "Waiting for connections" in log(), True, *requests)
        process.stdin.close()
        answers = [request.result().text for request in requests]
        assert answers == [ANSWERS["/dashboard/"]] * 2


def test_client_that_leaves_cancels_the_calls() -> None:
    server = serve("test_app:held_application", "--factory")
    with ThreadPoolExecutor() as pool, server as (_, log, client):
        address = (client.base_url.host, client.base_url.port)
        for url, calls in (("/data/", 1), ("/dashboard/", 1 + 2)):
            with socket.create_connection(address, PATIENCE) as leaver:
                leaver.sendall(f"GET {url} HTTP/1.1\r\nHost: app\r\n\r\n".encode())
                answer = pool.submit(leaver.recv, 100)
                wait_for("in flight", lambda: log().count("in flight"), calls, answer)
                leaver.shutdown(socket.SHUT_RDWR)
            wait_for("cancelled", lambda: log().count("cancelled"), calls)
        assert client.get("/health/").text == ANSWERS["/health/"]


def test_reload_serves_an_edited_copy_under_another_name() -> None:
    with TemporaryDirectory() as folder:
        copy = Path(folder, "renamed.py")
        source = Path(app.__file__).read_text()
        copy.write_text(source)

        def edit_and_ask() -> list[str]:
            """Edit until it is noticed: the watcher starts later than the worker."""
            if "Reloading" not in log():
                copy.write_text(source.replace("healthy", "edited"))
            with suppress(TransportError):  # The worker is on its way up or down.
                return [client.get(url).text for url in ("/health/", "/")]

        server = serve("renamed:application", "--reload", folder=folder)
        with server as (_, log, client):
            assert client.get("/health/").text == ANSWERS["/health/"]
            assert client.get("/").text == NOT_FOUND
            edited = ANSWERS["/health/"].replace("healthy", "edited")
            wait_for("answers after an edit", edit_and_ask, [edited, NOT_FOUND])


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


def test_running_the_file_prints_the_summary_and_ends() -> None:
    with python("-W", "ignore", "app.py") as (process, output):
        assert (process.wait(PATIENCE), output()) == (0, SUMMARY)


README = (HERE / "README.md").read_text()


def block(word: str) -> str:
    """Return the README's first block of Python that has the word in it."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if word in block)


async def test_readme_answers_and_urls_are_true(
    client: AsyncClient, calls: Calls
) -> None:
    calls.released.set()
    examples = r"```sh\n(curl [^`]*)```\n\n```json\n([^`]*)```"
    asked, shown = re.search(examples, README).groups()
    answers = [(await client.get(url)).text for url in re.findall(r"http\S+", asked)]
    assert answers == shown.splitlines() == [*ANSWERS.values()]
    for url in re.findall(r"http://127\.0\.0\.1[\w:/.]*", README):
        assert (await client.get(url)).status_code == 200


async def test_readme_real_calls_overlap(client: AsyncClient) -> None:
    with serve("test_app:held_application", "--factory") as (process, log, service):
        source = block("httpx").replace("https://users.example/stats/", "/dashboard/")
        options = f"base_url='{service.base_url}', trust_env=False, timeout={PATIENCE}"
        exec(source.replace("timeout=2", options), real := {})
        stats = real["get_user_stats"]
        with patch.multiple(app, get_user_stats=stats, get_transaction_stats=stats):
            request = create_task(client.get("/dashboard/"))
            in_flight = ("calls in flight", lambda: log().count("in flight"), 4)
            await to_thread(wait_for, *in_flight, request)
        process.stdin.close()
        both = ANSWERS["/dashboard/"]
        assert (await request).text == f'{{"users": {both}, "transactions": {both}}}'
        await real["client"].aclose()


@pytest.mark.parametrize("debug", ["True", "False"])
def test_readme_leads_into_a_project(debug: str) -> None:
    with TemporaryDirectory() as folder:
        call_command("startproject", "myproject", folder)
        package = Path(folder, "myproject")
        source = Path(app.__file__).read_text()
        imports = re.findall("import asyncio|from django.http.*|from django.views.*", source)
        views = source[source.index("async def get_") : source.index("# Not async")]
        package.joinpath("views.py").write_text("\n".join(imports) + "\n" + views)
        failing = 'urlpatterns.append(path("failing/", lambda request: 1 / 0))'
        urls = package.joinpath("urls.py").read_text() + block("urlpatterns") + failing
        package.joinpath("urls.py").write_text(urls)
        hosts = f'DEBUG = {debug}\nALLOWED_HOSTS = ["127.0.0.1"]\n'
        settings = package.joinpath("settings.py").read_text()
        package.joinpath("settings.py").write_text(settings + block("LOGGING") + hosts)
        with serve("myproject.asgi:application", folder=folder) as (_, log, client):
            assert {url: client.get(url).text for url in ANSWERS} == ANSWERS
            assert client.get("/admin/").headers["location"].startswith("/admin/login/")
            assert client.get("/failing/").status_code == 500
            assert log().count("ZeroDivisionError: division by zero") == 1
