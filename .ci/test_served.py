"""Checks of app.py that need a real server, a copy of it or other settings."""

import asyncio
import inspect
import time
from contextlib import suppress
from socket import create_server

import pytest
import serving
import uvicorn
from django.core.asgi import get_asgi_application
from django.test import override_settings
from httpx import ASGITransport, AsyncClient, TransportError

import app


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("/data/", ["get_message"]),
        ("/dashboard/", ["get_user_stats", "get_transaction_stats"]),
    ],
)
async def test_client_that_leaves_cancels_the_calls(monkeypatch, url, names):
    started = asyncio.Barrier(len(names) + 1)  # the calls and this test
    cancelled = asyncio.Barrier(len(names) + 1)

    async def call():
        try:
            await started.wait()
            await asyncio.sleep(serving.PATIENCE)
        except asyncio.CancelledError:
            await cancelled.wait()
            raise

    for name in names:
        monkeypatch.setattr(app, name, call)
    listener = create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app.application, ws="none", log_config=None))
    server_task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with AsyncClient(trust_env=False) as client:  # not through a proxy
            request = asyncio.create_task(client.get(f"http://127.0.0.1:{port}{url}"))
            async with asyncio.timeout(serving.PATIENCE):
                await started.wait()
                request.cancel()  # httpx closes the connection.
                await cancelled.wait()
    finally:
        server.should_exit = True
        await server_task


EDIT = """
async def failing_view(request):
    raise RuntimeError("no reply")
urlpatterns += [path("failing/", failing_view)]
"""


def test_reload_serves_an_edit_and_logs_its_failure_once(tmp_path, capfd):
    source = inspect.getsource(app)
    copy = tmp_path / "renamed.py"
    copy.write_text(source)
    command = ["-m", "uvicorn", "renamed:application", "--reload", "--port"]
    with serving.serve(*command, folder=tmp_path) as client:
        assert client.get("/health/").status_code == 200
        for _ in range(serving.PATIENCE):
            copy.write_text(source + EDIT)  # again, until uvicorn watches the file
            time.sleep(1)
            with suppress(TransportError):  # while uvicorn restarts
                if client.get("/failing/").status_code == 500:
                    break
    assert capfd.readouterr().err.count("RuntimeError: no reply") == 1


@pytest.mark.anyio
@override_settings(MIDDLEWARE=["django.middleware.common.CommonMiddleware"])
async def test_only_local_hosts_are_allowed():
    async with AsyncClient(transport=ASGITransport(get_asgi_application())) as client:
        for host in ["localhost", "127.0.0.1", "[::1]"]:
            assert (await client.get(f"http://{host}/health/")).status_code == 200
        assert (await client.get("http://example.com/health/")).status_code == 400


def test_docstring_is_the_summary():
    assert app.__doc__ == (serving.ROOT / ".ci" / "summary.txt").read_text()
