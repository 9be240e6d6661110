"""Tests of app.py, and a pattern for testing async Django with pytest and httpx alone.

Async tests run on anyio's pytest plugin, which httpx brings: the `anyio` mark selects
them, and `anyio_backend` names asyncio, the event loop that Django needs. `client`
calls the application in this process; `serve` runs uvicorn in a process of its own.

No test asserts how long something took: a busy machine would break it. `calls` holds
the simulated calls until the test has seen all of them in flight at once. Calls made
one after the other never get there, and the test fails when its `PATIENCE` is over.
"""

import asyncio
import faulthandler
import inspect
import os
import re
import shlex
import signal
import socket
import sys
import threading
from asyncio import create_task, gather
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import uvicorn
from anyio import fail_after
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.management import call_command
from django.http import HttpResponse
from django.urls import path
from httpx import ASGITransport, AsyncClient, TransportError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # pytest does so too, but not in every import mode.

with patch("time.sleep", None):  # A `from time import sleep` in app gets None.
    import app

# Python drops a Ctrl+C inside a finalizer, with a warning: here, that is an error.
DROPPED = "error::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings(DROPPED)]

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
GET = SimpleNamespace(method="GET")  # all that the views read of a request
CODE = inspect.getsource(app)
# Read before a plugin of pytest can change them.
SETTINGS = {n for n in dir(settings) if n.isupper() and settings.is_overridden(n)}


@pytest.fixture(autouse=True)
def hang_ends_the_run(capfd):
    """When a test hangs for 25 s, show what each thread does, and end the run."""
    with capfd.disabled():
        stderr = os.dup(2)
    faulthandler.register(signal.SIGALRM, stderr, chain=True)  # It ends the run then.
    signal.alarm(25)
    yield
    signal.alarm(0)
    faulthandler.unregister(signal.SIGALRM)
    os.close(stderr)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def client():
    transport = ASGITransport(app.application)
    async with AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


class Calls:
    """Hold each simulated call until `released`, and tell what becomes of it."""

    def __init__(self):
        self.released = asyncio.Event()
        self.events = asyncio.Queue()
        self.seconds = []
        # For app.py alone: the event loop and uvicorn keep the real one.
        self.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": self.sleep})

    async def sleep(self, seconds):
        self.seconds.append(seconds)
        self.events.put_nowait("started")
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.events.put_nowait("cancelled")
            raise
        self.events.put_nowait("ended")

    async def see(self, *events):
        with fail_after(PATIENCE):
            assert [await self.events.get() for _ in events] == [*events]


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(app, "asyncio", calls.asyncio)
    monkeypatch.setattr("time.sleep", None)  # It would block the event loop.
    return calls


def test_app_needs_only_django_with_two_settings_changed():
    imports = re.findall(r"^\s*(?:from|import) ([^.\s]+)", CODE, re.MULTILINE)
    assert {*imports} - sys.stdlib_module_names == {"django"}
    assert {"LOGGING_CONFIG", "ROOT_URLCONF"} == SETTINGS
    assert type(app.application) is ASGIHandler


@pytest.mark.parametrize("url", [*ANSWERS, "/unknown/"])
async def test_answer_depends_on_path_and_method_alone(client, calls, caplog, url):
    calls.released.set()
    caplog.set_level("DEBUG")
    read = (200, JSON, ANSWERS[url]) if url in ANSWERS else (404, JSON, NOT_FOUND)
    other = (405, {**HTML, "allow": "GET, HEAD"}, "") if url in ANSWERS else read
    wanted = {"GET": read, "HEAD": (*read[:2], "")}
    methods = ["GET"] * 100 + ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    for number, method in enumerate(methods):
        headers = dict.fromkeys(["Accept", "Cookie", "Host"], f"{number}={number}")
        answer = await client.request(method, f"{url}?{number}", headers=headers)
        seen = (answer.status_code, answer.headers, answer.text)
        assert seen == wanted.get(method, other), (method, number)
    assert app.__file__ not in {record.pathname for record in caplog.records}


@pytest.mark.parametrize("route", app.urlpatterns, ids=str)
async def test_view_reads_method_alone_and_awaits_its_calls_alone(calls, capfd, route):
    calls.released.set()
    waits = {"health/": [], "data/": [0.1], "dashboard/": [0.05, 0.05]}
    await route.callback(GET)
    assert calls.seconds == waits[str(route.pattern)]
    assert capfd.readouterr() == ("", "")


def test_health_check_waits_for_nothing():
    with pytest.raises(StopIteration):  # The coroutine ends in its first step.
        app.health_check(GET).send(None)


async def test_not_found_is_any_other_path_and_reads_nothing(client, capfd):
    for url in ANSWERS:
        for unknown in (f"/a{url}", f"{url}a", url[:-1], url.upper()):
            assert (await client.get(unknown)).text == NOT_FOUND
    assert app.not_found(object(), object()).content.decode() == NOT_FOUND
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "call", ["fetch_data", "dashboard_data", "get_user_stats", "get_transaction_stats"]
)
async def test_view_or_source_heeds_its_cancellation(calls, call):
    arguments = [GET] if call.endswith("_data") else []
    task = create_task(getattr(app, call)(*arguments))
    await calls.see("started")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# 90: Django holds a thread for each, and faulthandler shows 100 after a hang.
@pytest.mark.parametrize(("url", "count"), [("/data/", 1), ("/dashboard/", 2)])
async def test_one_event_loop_serves_90_requests_at_once(client, calls, url, count):
    requests = [create_task(client.get(url)) for _ in range(90)]
    await calls.see(*["started"] * 90 * count)
    assert (await client.get("/health/")).text == ANSWERS["/health/"]
    assert not any(request.done() for request in requests)
    calls.released.set()
    assert {answer.text for answer in await gather(*requests)} == {ANSWERS[url]}


class ServiceError(ConnectionError, TimeoutError, ValueError, KeyError, RuntimeError):
    """All that a real call may raise, as app.py is to catch none of it."""


@pytest.mark.parametrize("source", ["get_user_stats", "get_transaction_stats"])
async def test_call_that_raises_is_a_500_at_once_and_the_other_runs_on(
    client, calls, caplog, source
):
    caplog.set_level("ERROR")
    with patch.object(app, source, side_effect=ServiceError("service is down")) as call:
        with fail_after(PATIENCE):
            answer = await client.get("/dashboard/")
    assert (answer.status_code, answer.headers) == (500, HTML)
    assert "Server Error (500)" in answer.text
    assert "service is down" not in answer.text
    failures = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert failures == [call.side_effect]
    call.assert_awaited_once()
    calls.released.set()
    await calls.see("started", "ended")


async def test_sync_view_that_blocks_leaves_async_view_free(client, monkeypatch):
    blocking = threading.Barrier(2, timeout=PATIENCE)

    def blocking_view(request):
        blocking.wait()
        blocking.wait()
        return HttpResponse()

    monkeypatch.setattr(app.urlpatterns[1], "callback", blocking_view)
    request = create_task(client.get("/data/"))
    await asyncio.to_thread(blocking.wait)
    assert (await client.get("/health/")).text == ANSWERS["/health/"]
    await asyncio.to_thread(blocking.wait)
    assert (await request).status_code == 200


# Left out: what changes how Python, Django or uvicorn runs.
CHANGING = "DJANGO_|PYTHON(?!PATH)|UVICORN_|WEB_CONCURRENCY"
ENVIRONMENT = {n: v for n, v in os.environ.items() if not re.match(CHANGING, n)}
# The shell prints the command's exit status, then kills its own process group. It also
# kills the group once stdin closes: when the test is done, or this process is gone.
LEASH = '("$@"; echo "exit status $?"; kill -KILL 0) & read -r line; kill -KILL 0'


def python(*arguments, cwd=HERE, **options):
    """Run Python on a leash, in its own process group. Leaving the `with` ends it."""
    command = ["/bin/sh", "-c", LEASH, "sh", sys.executable, "-u", *arguments]
    return Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdin=PIPE, start_new_session=True, **options
    )


@asynccontextmanager
async def serve(*arguments, cwd=HERE):
    """Run uvicorn, and yield a client of it; `capfd` reads its log."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # uvicorn mistakes an --fd for a Unix socket, and its answers would take 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd, url = listener.fileno(), f"http://127.0.0.1:{listener.getsockname()[1]}"
        options = ("--fd", str(fd), "--no-access-log", "--no-use-colors", *arguments)
        with python("-m", "uvicorn", *options, cwd=cwd, pass_fds=[fd]):
            listener.close()  # uvicorn's copy queues clients until it is up.
            client = AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False)
            async with client:
                yield client


def failing_application():
    """Give the app a source that cannot be called; uvicorn's own process calls this."""
    app.get_user_stats = None
    return app.application


async def test_uvicorn_logs_failures_alone_with_one_traceback_each(capfd):
    async with serve("test_app:failing_application", "--factory") as client:
        for url, status in zip(ANSWERS, [200, 200, 500], strict=True):
            assert (await client.get(url)).status_code == status
        assert (await client.get("/health")).text == NOT_FOUND
        assert (await client.post("/health/")).status_code == 405
    printed, log = capfd.readouterr()
    start, failures = log.split("(Press CTRL+C to quit)\n")
    assert printed == ""
    assert {line.split(":")[0] for line in start.splitlines()} == {"INFO"}
    failed, *traceback, error, missing, refused = failures.splitlines()
    assert failed == "Internal Server Error: /dashboard/"
    assert "".join(traceback).count("Traceback") == 1
    assert error == "TypeError: 'NoneType' object is not callable"
    assert missing == "Not Found: /health"
    assert refused == "Method Not Allowed (POST): /health/"


def held_application():
    """Hold each simulated call; serve its events. uvicorn's own process calls this."""
    calls = Calls()
    app.asyncio = calls.asyncio

    async def event(request):
        return HttpResponse(await calls.events.get())

    async def release(request):
        calls.released.set()
        return HttpResponse()

    app.urlpatterns += [path("event/", event), path("release/", release)]
    return app.application


async def see(client, *events):
    assert [(await client.get("/event/")).text for _ in events] == [*events]


async def test_client_that_leaves_cancels_the_calls():
    async with serve("test_app:held_application", "--factory") as client:
        for url, count in (("/data/", 1), ("/dashboard/", 2)):
            request = create_task(client.get(url))
            await see(client, *["started"] * count)
            request.cancel()  # httpx closes the connection.
            await see(client, *["cancelled"] * count)
        assert (await client.get("/health/")).text == ANSWERS["/health/"]


async def test_reload_serves_an_edited_copy_under_another_name():
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "renamed.py"
        copy.write_text(CODE)
        async with serve("renamed:application", "--reload", cwd=folder) as client:
            assert (await client.get("/health/")).text == ANSWERS["/health/"]
            answer = ""
            with fail_after(PATIENCE):
                while "edited" not in answer:
                    # Again and again: the watcher starts later than the worker.
                    copy.write_text(CODE.replace("healthy", "edited"))
                    await asyncio.sleep(0.5)
                    with suppress(TransportError):  # The worker was on its way down.
                        answer = (await client.get("/health/")).text
            assert (await client.get("/")).text == NOT_FOUND


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


def test_running_the_file_prints_the_summary_and_ends(capfd):
    with python("app.py") as process:
        process.wait()
    assert capfd.readouterr() == (SUMMARY + "exit status 0\n", "")


README = (HERE / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"[`/]uvicorn ((?:[^`\n\\]|\\\n)+)", README)))


def readme(word):
    """Return the README's first block of Python that has the word in it."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if word in block)


async def test_readme_answers_urls_options_and_view_are_true(client, calls):
    calls.released.set()
    examples = r"```sh\n(curl [^`]*)```\n\n```json\n([^`]*)```"
    asked, shown = re.search(examples, README).groups()
    answers = [(await client.get(url)).text for url in re.findall(r"http\S+", asked)]
    assert answers == shown.splitlines() == [*ANSWERS.values()]
    for url in re.findall(r"https?://(?!users\.example)[\w:/.]*", README):
        assert url.startswith("http://127.0.0.1:8000/")
        assert (await client.get(url)).status_code == 200
    assert {*re.findall(r"-r ([\w.]+\w)", README)} == {"requirements.txt"}
    options = {option for each in uvicorn.main.params for option in each.opts}
    spans = " ".join(re.findall(r"`(--[^`]+)`", README))
    assert {*re.findall(r"--[\w-]+", spans)} <= options
    left_out = r': HttpRequest| -> JsonResponse|\n    """.*?"""'
    view = re.sub(left_out, "", inspect.getsource(app.dashboard_data), flags=re.DOTALL)
    assert view == readme("dashboard_data")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "myproject" not in c])
async def test_readme_command_serves(command):
    async with serve(*shlex.split(command.replace("\\\n", ""))) as client:
        assert (await client.get("/health/")).text == ANSWERS["/health/"]


@pytest.mark.skipif(getrlimit(RLIMIT_NOFILE)[0] < 128, reason="too few open files")
async def test_readme_real_calls_are_not_capped_at_100(client):
    async with serve("test_app:held_application", "--factory") as service:
        code = readme("httpx").replace("https://users.example/stats/", "/data/")
        options = f"base_url='{service.base_url}', trust_env=False, timeout={PATIENCE},"
        exec(code.replace("timeout=2,", options), real := {})
        stats = real["get_user_stats"]
        with patch.multiple(app, get_user_stats=stats, get_transaction_stats=stats):
            requests = [create_task(client.get("/dashboard/")) for _ in range(51)]
            await see(service, *["started"] * 102)  # httpx's own bound would be 100.
            await service.get("/release/")
            answers = await gather(*requests)
        assert {answer.text.count(ANSWERS["/data/"]) for answer in answers} == {2}
        await real["client"].aclose()


def test_readme_disconnects_what_holds_a_thread(capfd):
    code = f"import app\n{readme('disconnect')}print(len(request_started.receivers))"
    with python("-c", code) as process:
        process.wait()
    assert capfd.readouterr() == ("0\nexit status 0\n", "")


@pytest.mark.parametrize("debug", [True, False])
async def test_readme_leads_into_a_project(debug, capfd):
    with TemporaryDirectory() as folder:
        call_command("startproject", "myproject", folder)
        package = Path(folder, "myproject")
        imports = re.findall(r"import asyncio|from django\.\S*http .*", CODE)
        views = CODE[CODE.index("async def get_") : CODE.index("# Not async")]
        package.joinpath("views.py").write_text("\n".join([*imports, views]))
        with package.joinpath("urls.py").open("a") as urls:
            urls.write(readme("urlpatterns"))
            urls.write('urlpatterns.append(path("failing/", lambda request: 1 / 0))')
        with package.joinpath("settings.py").open("a") as file:
            file.write(readme("LOGGING"))
            file.write(f'DEBUG = {debug}\nALLOWED_HOSTS = ["127.0.0.1"]\n')
        [command] = [shlex.split(c) for c in COMMANDS if "myproject" in c]
        async with serve(*command, cwd=folder) as client:
            for url, answer in ANSWERS.items():
                assert (await client.get(url)).text == answer
            assert (await client.get("/admin/")).status_code == 302
            assert (await client.get("/failing/")).status_code == 500
    log = capfd.readouterr().err
    assert "Application startup complete" in log  # uvicorn's own logger is still on.
    assert log.count("ZeroDivisionError: division by zero") == 1
