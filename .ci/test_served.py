"""Checks of app.py that need a real server, a copy of it or other settings."""

import asyncio
import inspect
from socket import create_server

import pytest
import uvicorn
from django.core.asgi import get_asgi_application
from django.test import override_settings
from django.urls import resolve
from httpx import ASGITransport, AsyncClient
from serving import PATIENCE, ROOT, get_after_edit, serve

import app

pytestmark = pytest.mark.anyio
CALLS = ["get_message", "get_user_stats", "get_transaction_stats"]


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.parametrize(("url", "count"), [("/data/", 1), ("/dashboard/", 2)])
async def test_client_that_leaves_cancels_the_calls(monkeypatch, url, count):
    started = asyncio.Barrier(count + 1)  # the calls and this test
    cancelled = asyncio.Barrier(count + 1)

    async def call():
        try:
            await started.wait()
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            await cancelled.wait()
            raise

    for name in CALLS:
        monkeypatch.setattr(app, name, call)
    listener = create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app.application, ws="none", log_config=None))
    server_task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with AsyncClient(trust_env=False) as client:  # not through a proxy
            request = asyncio.create_task(client.get(f"http://127.0.0.1:{port}{url}"))
            async with asyncio.timeout(PATIENCE):
                await started.wait()
                request.cancel()  # httpx closes the connection.
                await cancelled.wait()
    finally:
        server.should_exit = True
        await server_task


@pytest.mark.parametrize("name", CALLS)
async def test_simulated_call_does_not_block(name):
    calls = asyncio.gather(*[getattr(app, name)() for _ in range(100)])
    await asyncio.wait_for(calls, 3)


EDIT = """
async def failing_view(request):
    raise RuntimeError("no reply")
urlpatterns += [path("failing/", failing_view)]
"""


def test_reload_serves_an_edit_and_logs_its_failure_once(tmp_path, capfd):
    copy, source = tmp_path / "renamed.py", inspect.getsource(app)
    copy.write_text(source)
    command = ["-m", "uvicorn", "renamed:application", "--reload", "--port"]
    with serve(*command, folder=tmp_path) as client:
        assert client.get("/health/").status_code == 200
        response = get_after_edit(client, "/failing/", copy, source + EDIT)
        assert response.status_code == 500
    assert capfd.readouterr().err.count("RuntimeError: no reply") == 1


@override_settings(MIDDLEWARE=["django.middleware.common.CommonMiddleware"])
async def test_only_local_hosts_are_allowed():
    async with AsyncClient(transport=ASGITransport(get_asgi_application())) as client:
        for host in ["localhost", "127.0.0.1", "[::1]"]:
            assert (await client.get(f"http://{host}/health/")).status_code == 200
        assert (await client.get("http://example.com/health/")).status_code == 400


def test_summary_and_root_are_as_agreed():
    assert app.__doc__ == (ROOT / ".ci" / "summary.txt").read_text()
    assert resolve("/").func is resolve("/dashboard/").func
