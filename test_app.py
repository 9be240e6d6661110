"""Tests of app.py, and a pattern for testing async views with pytest and httpx.

The `anyio` mark runs async tests; its pytest plugin comes with httpx. `client` sends
requests to the application without a server. `calls` takes the place of the simulated
calls, and holds each until the test has seen all of them start. Calls made one after
the other never get there, so no test measures time.
"""

import asyncio
import inspect
import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from socket import create_server
from subprocess import PIPE, STDOUT, Popen, check_output
from unittest.mock import AsyncMock

import pytest
import uvicorn
from anyio import fail_after, move_on_after
from django.conf import settings
from django.test import AsyncRequestFactory
from django.urls import resolve
from httpx import ASGITransport, AsyncClient, Client, HTTPTransport, TransportError

import app

pytestmark = pytest.mark.anyio

PATIENCE = 10  # seconds until a wait gives up


@pytest.fixture
def anyio_backend():
    return "asyncio"  # the event loop that Django needs


@pytest.fixture(autouse=True)
def production_settings(monkeypatch):
    monkeypatch.setattr(settings, "DEBUG", False)
    monkeypatch.setattr(settings, "ALLOWED_HOSTS", ["*"])


@pytest.fixture
async def client():
    transport = ASGITransport(app.application)
    async with AsyncClient(transport=transport, base_url="http://testserver") as client:
        yield client


class Calls:
    """Hold each call until `released` is set, and record what happens to it."""

    def __init__(self):
        self.released = asyncio.Event()
        self.events = asyncio.Queue()

    def returning(self, result):
        async def call(*args, **kwargs):
            self.events.put_nowait("started")
            try:
                with fail_after(PATIENCE):
                    await self.released.wait()
            except asyncio.CancelledError:
                self.events.put_nowait("cancelled")
                raise
            return result

        return call

    async def expect(self, event, count):
        seen = []
        with move_on_after(PATIENCE):
            while len(seen) < count:
                seen.append(await self.events.get())
        assert seen == [event] * count


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(app, "get_data", calls.returning({"message": "hello"}))
    monkeypatch.setattr(app, "get_user_stats", calls.returning({"users": 2}))
    monkeypatch.setattr(app, "get_transaction_stats", calls.returning({"total": 3}))
    return calls


DASHBOARD = {"users": {"users": 2}, "transactions": {"total": 3}}
RESPONSES = {
    "/": DASHBOARD,
    "/health/": {"status": "healthy", "async": True},
    "/data/": {"message": "hello"},
    "/dashboard/": DASHBOARD,
}


@pytest.mark.parametrize("url", RESPONSES)
async def test_get_returns_json(client, calls, url):
    calls.released.set()
    response = await client.get(url)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == RESPONSES[url]


@pytest.mark.parametrize("url", RESPONSES)
async def test_only_get_and_head_are_allowed(client, calls, url):
    calls.released.set()
    assert (await client.head(url)).status_code == 200
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"]:
        response = await client.request(method, url)
        assert response.status_code == 405
        assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("url", RESPONSES)
async def test_path_that_only_resembles_a_known_one_is_a_404(client, url):
    assert (await client.get(f"/unknown{url}")).status_code == 404
    assert (await client.get(f"{url}unknown")).status_code == 404


@pytest.mark.parametrize(
    ("name", "seconds", "result"),
    [
        ("get_data", 0.1, {"message": "Data fetched asynchronously"}),
        ("get_user_stats", 0.05, {"users": 1000, "active": 250}),
        ("get_transaction_stats", 0.05, {"total": 5000, "today": 42}),
    ],
)
async def test_simulated_call(monkeypatch, name, seconds, result):
    sleep = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    for module in [time, app]:  # time.sleep, also if app.py imports it by name
        monkeypatch.setattr(module, "sleep", None, raising=False)
    call = getattr(app, name)
    assert await call() == result
    sleep.assert_awaited_once_with(seconds)
    sleep.side_effect = asyncio.CancelledError
    with pytest.raises(asyncio.CancelledError):
        await call()


@pytest.mark.parametrize("url", RESPONSES)
def test_view_is_async(url):
    # A plain `def` view that calls `async_to_sync` would answer requests as well.
    assert inspect.iscoroutinefunction(resolve(url).func)


async def test_health_check_waits_for_nothing():
    coroutine = app.health_check(AsyncRequestFactory().get("/health/"))
    with pytest.raises(StopIteration):  # It returns in its first step.
        coroutine.send(None)


WAITING_VIEWS = [("/data/", 1), ("/dashboard/", 2)]  # with the number of their calls


@pytest.mark.parametrize(("url", "count"), WAITING_VIEWS)
async def test_50_requests_wait_at_once(client, calls, monkeypatch, url, count):
    for module in [asyncio, time, app]:  # Only the calls may wait.
        monkeypatch.setattr(module, "sleep", None, raising=False)
    requests = [asyncio.create_task(client.get(url)) for _ in range(50)]
    await calls.expect("started", 50 * count)
    assert (await client.get("/health/")).status_code == 200
    calls.released.set()
    for request in requests:
        assert (await request).json() == RESPONSES[url]
    assert calls.events.empty()  # No request made more calls.


@pytest.mark.parametrize(
    "name", ["get_data", "get_user_stats", "get_transaction_stats"]
)
async def test_failing_call_is_a_500_at_once(client, calls, monkeypatch, caplog, name):
    monkeypatch.setattr(logging.getLogger("django"), "propagate", True)  # for caplog
    monkeypatch.setattr(app, name, AsyncMock(side_effect=RuntimeError("no reply")))
    url = "/data/" if name == "get_data" else "/dashboard/"
    with fail_after(PATIENCE):  # `calls` holds the other call.
        response = await client.get(url)
    assert response.status_code == 500
    assert "no reply" not in response.text
    assert "RuntimeError: no reply" in caplog.text


@pytest.mark.parametrize(("url", "count"), WAITING_VIEWS)
async def test_view_passes_its_cancellation_on(calls, url, count):
    view, args, kwargs = resolve(url)
    request = AsyncRequestFactory().get(url)
    task = asyncio.create_task(view(request, *args, **kwargs))
    await calls.expect("started", count)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(("url", "count"), WAITING_VIEWS)
async def test_client_that_leaves_cancels_the_calls(calls, url, count):
    listener = create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app.application, ws="none", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with AsyncClient(trust_env=False) as client:  # not through a proxy
            request = asyncio.create_task(client.get(f"http://127.0.0.1:{port}{url}"))
            await calls.expect("started", count)
            request.cancel()  # httpx closes the connection.
            await calls.expect("cancelled", count)
    finally:
        server.should_exit = True
        await serving


EDIT = """
settings.DEBUG, settings.ALLOWED_HOSTS = False, ["*"]
async def failing_view(request):
    raise RuntimeError("no reply")
urlpatterns += [path("failing/", failing_view)]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="terminate() leaves a process")
def test_reload_serves_an_edit_and_logs_its_failure_once(tmp_path, monkeypatch):
    # The copy finds the modules that app.py imports.
    monkeypatch.setenv("PYTHONPATH", str(Path(app.__file__).parent), prepend=os.pathsep)
    copy = tmp_path / "renamed.py"  # app.py works under any name.
    copy.write_text(inspect.getsource(app))
    command = [sys.executable, "-m", "uvicorn", "renamed:application"]
    command += ["--reload", "--port", "0"]
    process = Popen(command, cwd=tmp_path, stdout=PIPE, stderr=STDOUT, text=True)
    try:
        line = next(line for line in process.stdout if "running on" in line)
        url = re.search(r"http://\S+", line).group()
        with Client(base_url=url, transport=HTTPTransport(retries=6)) as client:
            client.get("/health/")  # It is retried until uvicorn serves the copy.
            for _ in range(PATIENCE):
                # Again and again, as uvicorn may not watch the file yet.
                copy.write_text(inspect.getsource(app) + EDIT)
                time.sleep(1)
                with suppress(TransportError):  # uvicorn was restarting.
                    if client.get("/failing/").status_code == 500:
                        break
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=PATIENCE)
        print(output)  # pytest shows it when the test fails.
    assert output.count("RuntimeError: no reply") == 1


def test_running_the_file_prints_its_docstring_and_ends():
    command = [sys.executable, app.__file__]
    assert check_output(command, text=True, timeout=PATIENCE) == app.__doc__


def test_importing_the_file_prints_nothing():
    command = [sys.executable, "-c", "import app"]
    assert check_output(command, cwd=Path(app.__file__).parent, text=True) == ""
