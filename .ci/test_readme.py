"""Checks that what README.md shows is true."""

import inspect
import re
import shlex
import shutil
import sys
from asyncio import create_task, to_thread
from http import cookiejar
from subprocess import check_output, run
from threading import Barrier

import httpx2
import pytest
import uvicorn
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path
from httpx import ASGITransport, AsyncClient
from serving import PATIENCE, ROOT, serve

import app

SOURCE = (ROOT / "app.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block(words):
    """Return the one block of code that has these words in it."""
    blocks = [block for block in BLOCKS if words in block]
    assert len(blocks) == 1, f"README.md has {len(blocks)} blocks with {words!r}"
    return blocks[0]


def find(pattern):
    """Return all that matches the pattern, each once. Nothing is an error."""
    matches = re.findall(pattern, README)
    assert matches, f"README.md has nothing that matches {pattern!r}"
    return sorted({*matches})


def replace(text, old, new):
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def serve_by_uvicorn(command, folder=ROOT):
    arguments = shlex.split(command.replace("\\\n", " "))
    return serve("-m", "uvicorn", *arguments, "--port", folder=folder)


def test_each_block_has_a_check():
    assert block("gantt")
    assert block("--workers")  # test_uvicorn_command_serves runs it.
    assert len(BLOCKS) == 17, f"{len(BLOCKS)} blocks, and checks of 17"


def test_view_is_the_one_in_app():
    left_out = r': HttpRequest| -> JsonResponse|\n    """.*?"""'
    view = re.sub(left_out, "", inspect.getsource(app.dashboard_data), flags=re.DOTALL)
    assert view == block("async def dashboard_data")


def test_files_exist():
    for name in find(r"(?:-r|--with-requirements) ([\w.]+\w)"):
        assert (ROOT / name).is_file()


def test_block_that_runs_installs_as_the_one_that_tests():
    # `.ci/run` runs the latter.
    runs = replace(block("bin/uvicorn app:application --reload"), "uvicorn app", "")
    assert replace(runs, ":application --reload", "pytest") == block("bin/pytest")


UVICORN = find(r"uvicorn ([\w.]+:\w+(?:[^`\n\\]|\\\n)*)")


@pytest.mark.parametrize("command", [c for c in UVICORN if c.startswith("app:")])
def test_uvicorn_command_serves(command):
    with serve_by_uvicorn(command) as client:
        assert client.get("/health/").json() == {"status": "healthy", "async": True}


def test_uvicorn_commands_are_all_run():
    modules = {"app", "blocking", "plain", "myproject.asgi"}
    assert {command.split(":")[0] for command in UVICORN} == modules


def test_uvicorn_has_the_options():
    for option in find(r"`(--[^`]+)`"):
        values = shlex.split(option.replace("ADDRESS", "192.0.2.1"))
        if len(values) == 1:
            assert option in {
                name for each in uvicorn.main.params for name in each.opts
            }
        else:
            uvicorn.main.make_context("uvicorn", ["app:application", *values])


def test_urls_and_curl_commands_answer_as_shown(capfd):
    with serve_by_uvicorn("app:application") as client:
        for url in find(r"http://127.0.0.1:8000/([\w/]*)"):
            assert client.get(url).status_code == 200
        asked, load = (
            block(words).replace("http://127.0.0.1:8000", str(client.base_url))
            for words in ["curl --write-out", "--parallel-max"]
        )
        printed = check_output(["bash", "-c", asked], text=True, timeout=PATIENCE)
        assert printed == block('{"status"')
        run(["bash", "-c", load], check=True, timeout=PATIENCE)
    assert capfd.readouterr().out.count("GET /data/?") == 100


def failed_tests(folder):
    """Run pytest in the folder, and return which tests fail."""
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider"]
    result = run(
        command, cwd=folder, capture_output=True, check=False, text=True, timeout=60
    )
    assert " passed" in result.stdout, result.stdout
    return re.findall(r"^FAILED test_app.py::(\S+)", result.stdout, re.MULTILINE)


def test_new_view_passes_its_test(tmp_path):
    [route] = find(r"`(path\(\"greeting/.*\),)`")
    routes = "urlpatterns = [\n"
    view = block("async def greeting")
    source = replace(SOURCE, routes, f"{view}\n\n{routes}    {route}\n")
    tests = (ROOT / "test_app.py").read_text(encoding="utf-8")
    (tmp_path / "app.py").write_text(source)
    (tmp_path / "test_app.py").write_text(f"{tests}\n\n{block('def test_greeting')}")
    assert failed_tests(tmp_path) == []


@pytest.mark.parametrize(("module", "is_async"), [("blocking", True), ("plain", False)])
def test_copy_for_the_table_blocks(tmp_path, module, is_async):
    shutil.copy(ROOT / "app.py", tmp_path)
    for copy in ["blocking", "plain"]:
        command, server = block(f"> {copy}.py").split(" && .venv/bin/uvicorn ")
        run(["bash", "-c", command], cwd=tmp_path, check=True)
        if copy == module:
            break
    source = (tmp_path / f"{module}.py").read_text()
    assert source.count("time.sleep(0.1)") == 1
    assert ("async def fetch_data" in source) == is_async
    with serve_by_uvicorn(server, tmp_path) as client:
        assert client.get("/data/").json() == {"message": "Data fetched asynchronously"}


def test_wsgiref_serves(tmp_path):
    script = re.search(r'python -c "(.*)"', block("wsgiref"), re.DOTALL)[1]
    script = f"import sys{replace(script, '8000', 'int(sys.argv[1])')}"
    with serve("-c", script) as client:
        assert client.get("/data/").json() == {"message": "Data fetched asynchronously"}


def test_real_call_fails_only_the_test_that_names_it(tmp_path):
    with serve_by_uvicorn("app:application") as service:
        url = f"{service.base_url}/data/"
        real = replace(block("httpx2.Async"), "https://users.example/stats/", url)
        simulated = inspect.getsource(app.get_user_stats)
        (tmp_path / "app.py").write_text(replace(SOURCE, simulated, real))
        shutil.copy(ROOT / "test_app.py", tmp_path)
        with serve_by_uvicorn("app:application", tmp_path) as client:
            users = client.get("/dashboard/").json()["users"]
        assert users == {"message": "Data fetched asynchronously"}
        [failed] = failed_tests(tmp_path)
    assert failed.startswith("test_simulated_call[get_user_stats-")
    assert "`test_simulated_call`" in README


def test_client_with_the_options_keeps_no_cookies():
    service = httpx2.MockTransport(
        lambda request: httpx2.Response(200, headers={"Set-Cookie": "id=1"})
    )
    cookies, limits = find(r"`((?:cookies|limits)=[^`]*)`")
    names = {"httpx2": httpx2, **vars(cookiejar)}
    options = eval(f"dict({cookies}, {limits})", names)
    assert options["limits"].keepalive_expiry == 2
    with httpx2.Client(transport=service, **options) as client:
        assert client.get("https://users.example/").headers["Set-Cookie"] == "id=1"
        assert not client.cookies


LOGGING = block("LOGGING = {")
# The README tells a project that has this to skip the block.
ROOT_LOGGING = replace(
    LOGGING,
    '"loggers": {"django": {"handlers": ["console"]}}',
    '"root": {"handlers": ["console"]}',
)


@pytest.mark.parametrize(
    ("logging", "debug"), [(LOGGING, True), (LOGGING, False), (ROOT_LOGGING, False)]
)
def test_project_serves_the_views(tmp_path, capfd, logging, debug):
    startproject = [sys.executable, "-m", "django", "startproject", "myproject", "."]
    run(startproject, cwd=tmp_path, check=True)
    package = tmp_path / "myproject"
    imports = re.findall(
        r"^(?:import asyncio|from django\.\S*http .*)", SOURCE, re.MULTILINE
    )
    views = SOURCE[SOURCE.index("async def get_message") : SOURCE.index("urlpatterns")]
    (package / "views.py").write_text("\n".join([*imports, views]))
    with (package / "urls.py").open("a") as urls:
        urls.write(block("from myproject.views"))
        urls.write('urlpatterns += [path("failing/", lambda request: 1 / 0)]\n')
    with (package / "settings.py").open("a") as settings:
        settings.write(f"{logging}DEBUG = {debug}\nALLOWED_HOSTS = ['127.0.0.1']\n")
    [command] = [command for command in UVICORN if command.startswith("myproject")]
    with serve_by_uvicorn(command, tmp_path) as client:
        for url in ["/health/", "/data/", "/dashboard/"]:
            assert client.get(url).text in block('{"status"').splitlines()
        assert client.get("/admin/").status_code == 302
        assert client.get("/failing/").status_code == 500
    log = capfd.readouterr().err
    assert "Application startup complete" in log  # uvicorn still logs, too.
    assert log.count("ZeroDivisionError: division by zero") == 1


def test_hooks_are_disconnected(tmp_path):
    last_import = "from django.views.decorators.http import require_safe\n"
    source = replace(SOURCE, last_import, f"{last_import}{block('.disconnect(')}")
    (tmp_path / "app.py").write_text(f"{source}\nprint(request_started.receivers)")
    command = [sys.executable, "-c", "import app"]
    assert check_output(command, cwd=tmp_path, text=True) == "[]\n"


blocked = Barrier(2, timeout=PATIENCE)


def blocking_view(request):
    blocked.wait()
    blocked.wait()
    return HttpResponse()


urlpatterns = [*app.urlpatterns, path("blocking/", blocking_view)]


@pytest.mark.anyio
@override_settings(ROOT_URLCONF=__name__)
async def test_plain_view_that_blocks_leaves_the_others_free():
    transport = ASGITransport(app.application)
    async with AsyncClient(transport=transport, base_url="http://testserver") as client:
        request = create_task(client.get("/blocking/"))
        await to_thread(blocked.wait)
        for url in ["/health/", "/data/", "/dashboard/"]:
            assert (await client.get(url)).status_code == 200
        await to_thread(blocked.wait)
        assert (await request).status_code == 200
