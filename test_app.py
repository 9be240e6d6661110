"""Tests of app.py, and of the views that you add. Run them with `pytest`.

`client` sends requests to the application without a server. `calls` replaces each call
to a service with a mock, in every test. AnyIO's pytest plugin comes with httpx.
"""

import asyncio
import re
import sys
from functools import partial
from pathlib import Path
from subprocess import check_output
from unittest.mock import AsyncMock

import pytest
from asgiref.sync import iscoroutinefunction
from django.test import AsyncRequestFactory, override_settings
from django.urls import resolve
from httpx import ASGITransport, AsyncClient

import app

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"  # the event loop that Django needs


@pytest.fixture
async def client():
    transport = ASGITransport(app.application)
    with override_settings(ALLOWED_HOSTS=["test"], DEBUG=False):
        async with AsyncClient(transport=transport, base_url="https://test") as client:
            yield client


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    calls = {
        "get_message": AsyncMock(return_value={"message": "hello"}),
        "get_user_stats": AsyncMock(return_value={"users": 2}),
        "get_transaction_stats": AsyncMock(return_value={"total": 3}),
    }
    for name, call in calls.items():
        monkeypatch.setattr(app, name, call)
    return calls


def make_calls_wait(calls, barrier):
    """Make each call wait at the barrier, and add a number of its own to its result."""

    async def wait(result, *args, **kwargs):
        async with asyncio.timeout(3):
            number = await barrier.wait()
            for _ in range(number):
                await asyncio.sleep(0)  # The calls return one after another.
        return {**result, "number": number}

    for call in calls.values():
        call.side_effect = partial(wait, call.return_value)


DASHBOARD = {"users": {"users": 2}, "transactions": {"total": 3}}
RESPONSES = {
    "/": DASHBOARD,
    "/health/": {"status": "healthy", "async": True},
    "/data/": {"message": "hello"},
    "/dashboard/": DASHBOARD,
}
NUMBER_OF_CALLS = {"/health/": 0, "/data/": 1, "/dashboard/": 2}  # by async views


@pytest.mark.parametrize("url", RESPONSES)
async def test_get_returns_json(client, url):
    async with asyncio.timeout(1):
        response = await client.get(url)
        head = await client.head(url)
    assert response.status_code == head.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == RESPONSES[url]


@pytest.mark.parametrize("url", RESPONSES)
async def test_other_methods_are_not_allowed(client, url):
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"]:
        async with asyncio.timeout(1):
            response = await client.request(method, url)
        assert response.status_code == 405
        assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("url", NUMBER_OF_CALLS)
def test_view_is_async(url):
    assert iscoroutinefunction(resolve(url).func)


@pytest.mark.parametrize(
    ("call", "seconds", "result"),
    [  # the functions of app.py, as `calls` has not replaced them yet
        (app.get_message, 0.1, {"message": "Data fetched asynchronously"}),
        (app.get_user_stats, 0.05, {"users": 1000, "active": 250}),
        (app.get_transaction_stats, 0.05, {"total": 5000, "today": 42}),
    ],
)
async def test_simulated_call(monkeypatch, call, seconds, result):
    sleep = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert await call() == result
    sleep.assert_awaited_once_with(seconds)


@pytest.mark.parametrize("url", NUMBER_OF_CALLS)
async def test_100_requests_wait_at_once(client, calls, url):
    total = 100 * NUMBER_OF_CALLS[url]
    make_calls_wait(calls, asyncio.Barrier(total or 1))  # opens when all calls wait
    requests = []
    async with asyncio.timeout(3):
        for _ in range(100):
            requests.append(asyncio.create_task(client.get(url)))
            await asyncio.sleep(0)  # lets the timeout end a test whose view blocks
        responses = await asyncio.gather(*requests)
    assert {response.status_code for response in responses} == {200}
    assert sum(call.await_count for call in calls.values()) == total
    text = " ".join(response.text for response in responses)
    numbers = re.findall(r'"number": \d+', text)
    assert len(set(numbers)) == len(numbers)  # No two requests share a result.


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/data/", "get_message"),
        ("/dashboard/", "get_user_stats"),
        ("/dashboard/", "get_transaction_stats"),
    ],
)
async def test_failing_call_is_a_500_at_once(client, calls, caplog, url, name):
    make_calls_wait(calls, asyncio.Barrier(len(calls)))  # never opens, as one fails
    calls[name].side_effect = RuntimeError("no reply")
    async with asyncio.timeout(1):
        response = await client.get(url)
    assert response.status_code == 500
    assert "no reply" not in response.text
    assert "RuntimeError: no reply" in caplog.text


@pytest.mark.parametrize("url", ["/data/", "/dashboard/"])
async def test_cancelled_view_cancels_its_calls(calls, url):
    started = asyncio.Barrier(NUMBER_OF_CALLS[url] + 1)  # the calls and this test
    cancelled = []

    async def wait(*args, **kwargs):
        try:
            await started.wait()
            await asyncio.Event().wait()  # for ever
        except asyncio.CancelledError as error:
            cancelled.append(error)
            raise

    for call in calls.values():
        call.side_effect = wait
    view, args, kwargs = resolve(url)
    async with asyncio.timeout(1), asyncio.TaskGroup() as group:
        task = group.create_task(view(AsyncRequestFactory().get(url), *args, **kwargs))
        await started.wait()
        task.cancel()
    assert task.cancelled()
    assert len(cancelled) == NUMBER_OF_CALLS[url]


def test_running_the_file_prints_its_docstring():
    command = [sys.executable, app.__file__]
    assert check_output(command, text=True, timeout=5) == app.__doc__


def test_importing_the_file_prints_nothing():
    command = [sys.executable, "-c", "import app"]
    assert not check_output(command, cwd=Path(app.__file__).parent, timeout=5)
