"""Checks that what README.md shows is true."""

import inspect
import re
import shlex
import sys
from subprocess import check_output, run

import pytest
import uvicorn
from serving import ROOT, get_after_edit, serve

import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "app.py").read_text(encoding="utf-8")
TEST_SOURCE = (ROOT / "test_app.py").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROSE = " ".join(BLOCK.sub("", README).split())
checked = set()


def block(words):
    """Return the one block of code that has these words in it."""
    blocks = [block for block in BLOCK.findall(README) if words in block]
    assert len(blocks) == 1, f"README.md has {len(blocks)} blocks with {words!r}"
    checked.update(blocks)
    return blocks[0]


def find(pattern):
    """Return all that matches the pattern in the prose. Nothing is an error."""
    matches = re.findall(pattern, PROSE)
    assert matches, f"README.md has nothing that matches {pattern!r}"
    return matches


VIEW = block("async def dashboard_data")
CHART = block("gantt")
RUN = block("pip install")
CURL = block("curl")
RESPONSES = block('{"status"')
TEST = block("bin/pytest")  # `.ci/run` runs it.
GREETING = block("async def greeting")
GREETING_TEST = block("async def test_greeting")
MIXED_VIEW = block("sync_to_async")
REAL_CALL = block("httpx2.AsyncClient")
URLS = block("from myproject.views")
LOGGING = block("LOGGING = {")
PRODUCTION = block("--workers")


def test_each_block_has_a_check():
    assert [block for block in BLOCK.findall(README) if block not in checked] == []


def test_view_is_the_one_in_app():
    left_out = r': HttpRequest| -> JsonResponse|\n    """.*?"""'
    source = inspect.getsource(app.dashboard_data)
    assert re.sub(left_out, "", source, flags=re.DOTALL) == VIEW


def test_figures_are_those_of_app_and_workflow():
    message, users, transactions = re.findall(r"asyncio\.sleep\((.+)\)", SOURCE)
    assert find(r"`/data/` waits (\S+) s") == [message]
    assert find(r"two calls of (\S+) s") == [users] == [transactions]
    assert set(re.findall(r"\d+ms", CHART)) == {f"{1000 * float(users):.0f}ms"}
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    versions = re.findall(r'"(3\.\d+)"', workflow)
    assert find(r"with Python (\S+) or newer") == [versions[0]]
    assert find(r"CPython (\S+) to (3\.\d+)") == [(versions[0], versions[-1])]


def serve_by(command, folder=ROOT):
    arguments = shlex.split(command.replace("\\\n", ""))
    return serve("-m", *arguments, "--port", folder=folder)


COMMANDS = [
    RUN.split("bin/")[-1],
    PRODUCTION.split("bin/")[-1],
    *find(r"`(uv run .+?)`"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_serves(command):
    with serve_by(command) as client:
        assert client.get("/health/").json() == {"status": "healthy", "async": True}


def test_windows_commands_are_those_of_the_block():
    [line] = find(r"On Windows: (`.+?`)(?: [^`]|$)")
    windows = line.strip("`").replace("`, `", " && ").replace("\\Scripts\\", "/bin/")
    assert windows == RUN.replace("\\\n  ", "").replace("python3", "python").strip()


def test_names_exist():
    for options in find(r"`(--[\w-]+ [^`]+)`"):
        options = shlex.split(options.replace("ADDRESS", "192.0.2.1"))
        uvicorn.main.make_context("uvicorn", ["app:application", *options])
    for option in find(r"`(--[\w-]+)`"):
        assert option in (RUN + PRODUCTION).split()
    for name in find(r"`\.venv/bin/python (.+?)`"):
        assert (ROOT / name).is_file()
    for package in find(r'pip install "(.+?)"'):
        assert package in (ROOT / "requirements.txt").read_text()
    for anchor in find(r"\]\(#(.+?)\)"):
        assert f"\n##-{anchor}\n" in README.lower().replace(" ", "-")


def test_urls_and_curl_answer_as_shown():
    with serve_by("uvicorn app:application") as client:
        for url in find(r"(?:`|8000)(/[\w/]*)[`,]"):  # `/health`, too
            assert client.get(f"{url.rstrip('/')}/").status_code == 200
        assert find(r"GET and HEAD get a (\d+)") == [str(client.post("/").status_code)]
        command = CURL.replace("http://127.0.0.1:8000", str(client.base_url))
        assert check_output(["bash", "-c", command], text=True) == RESPONSES


def failed_tests(folder):
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider"]
    result = run(command, cwd=folder, capture_output=True, check=False, text=True)
    assert " passed" in result.stdout, result.stdout
    return re.findall(r"FAILED test_app.py::(\S+)", result.stdout)


def test_new_view_passes_its_test(tmp_path):
    [route] = find(r"`(path\(\"greeting/.*?\),)`")
    start = "urlpatterns = [\n"
    source = SOURCE.replace(start, f"{GREETING}\n\n{start}{route}\n")
    (tmp_path / "app.py").write_text(source)
    (tmp_path / "test_app.py").write_text(f"{TEST_SOURCE}\n\n{GREETING_TEST}")
    assert failed_tests(tmp_path) == []


def test_table_is_what_is_measured():
    table = README[README.index("One worker, ") :].split("\n\n")[0] + "\n"
    output = check_output([sys.executable, ".ci/measure.py"], cwd=ROOT, text=True)
    shown, measured = (re.findall(r"([\d.]+) s\n", text) for text in (table, output))
    assert re.sub(r"[\d.]+ s\n", "", output) == re.sub(r"[\d.]+ s\n", "", table)
    for before, now in zip(shown, measured, strict=True):
        assert float(before) / 3 < float(now) < float(before) * 3


SERVICE = """
async def cookies(request):
    response = JsonResponse(request.COOKIES)
    response.set_cookie("id", "1")
    return response
urlpatterns += [path("cookies/", cookies)]
"""


def test_real_call_fails_only_the_test_that_names_it(tmp_path):
    (tmp_path / "service.py").write_text(SOURCE + SERVICE)
    with serve_by("uvicorn service:application", tmp_path) as client:
        url = f"{client.base_url}/cookies/"
        real_call = REAL_CALL.replace("https://users.example/stats/", url)
        simulated_call = inspect.getsource(app.get_user_stats)
        (tmp_path / "app.py").write_text(SOURCE.replace(simulated_call, real_call))
        with serve_by("uvicorn app:application", tmp_path) as client:
            for _ in range(2):
                assert client.get("/dashboard/").json()["users"] == {}
        (tmp_path / "test_app.py").write_text(TEST_SOURCE)
        [failed] = failed_tests(tmp_path)
    [(name, test)] = find(r"delete the `(\w+)` case of `(\w+)`")
    assert failed.startswith(f"{test}[{name}-")
    [(places, seconds)] = find(r"all (\d+) connections .*`PoolTimeout` after (\d+) s")
    assert f"max_connections={places}," in REAL_CALL
    assert f"timeout={seconds}," in REAL_CALL


@pytest.fixture
def project(tmp_path):
    command = [sys.executable, "-m", "django", "startproject", "myproject", "."]
    run(command, cwd=tmp_path, check=True)
    return tmp_path


def append(file, text):
    file.write_text(f"{file.read_text()}\n{text}")


SETTINGS = """
ALLOWED_HOSTS = ["127.0.0.1"]
ADMINS = [("Ada", "ada@example.com")]
TEMPLATES[0]["DIRS"] = [BASE_DIR]
LOGGING["handlers"]["own"] = {"class": "logging.StreamHandler"}
LOGGING["loggers"]["myproject"] = {"handlers": ["own"]}
if "MAILERS" not in globals():  # new in Django 6.1
    EMAIL_BACKEND = "django.core.mail.backends.console.EmailBackend"
"""
MORE_URLS = """
from django.shortcuts import render
urlpatterns += [path("failing/", lambda request: 1 / 0)]
urlpatterns += [path("page/", lambda request: render(request, "page.html"))]
"""


@pytest.mark.parametrize("debug", [True, False])
def test_project_serves_the_views(project, capfd, debug):
    [names] = find(r"imports of `(\w+)`, `(\w+)`, `(\w+)` and `(\w+)`")
    imports = re.findall(rf".*import .*(?:{'|'.join(names)}).*\n", SOURCE)
    [(first, last)] = find(r"functions from `(\w+)` to `(\w+)`")
    views = re.findall(rf"(?ms)^async def {first}.*def {last}.*?\n\n\n", SOURCE)
    package, page = project / "myproject", project / "page.html"
    (package / "views.py").write_text("".join([*imports, *views]))
    append(package / "urls.py", URLS + MORE_URLS)
    append(package / "settings.py", f"{LOGGING}DEBUG = {debug}{SETTINGS}")
    page.write_text("before")
    [command] = find(r"`(uvicorn .+?)`")
    with serve_by(command, project) as client:
        for url in ["/health/", "/data/", "/dashboard/"]:
            assert client.get(url).text in RESPONSES.splitlines()
        assert client.get("/admin/").status_code == 302
        assert client.get("/failing/").status_code == 500
        assert get_after_edit(client, "/page/", page, "after").text == "after"
    output, log = capfd.readouterr()
    assert "Application startup complete" in log
    assert log.count("ZeroDivisionError: division by zero") == 1
    assert output.count("To: ada@example.com") == (0 if debug else 1)


TESTS = """
from django.contrib.auth.models import Group, User
from django.test import TestCase
class Tests(TestCase):
    async def test_view(self):
        await Group.objects.acreate(name="readers")
        await self.async_client.aforce_login(await User.objects.acreate(username="ada"))
        response = await self.async_client.get("/overview/")
        self.assertContains(response, "ada, [&#x27;readers&#x27;], All is well")
"""


@pytest.mark.parametrize(("atomic", "decorated"), [(0, 0), (1, 1), (1, 0)])
def test_mixed_view_in_a_project(project, atomic, decorated):
    [decorator] = find(r"`@(transaction\..+?)`")
    [error] = find(r'"(You cannot use ATOMIC_REQUESTS)"')
    view = f"{decorator}(overview)" if decorated else "overview"
    package = project / "myproject"
    setting = f"DATABASES['default']['ATOMIC_REQUESTS'] = {atomic}"
    append(package / "settings.py", setting)
    append(package / "urls.py", f"{MIXED_VIEW}from django.db import transaction")
    append(package / "urls.py", f"urlpatterns += [path('overview/', {view})]")
    (package / "tests.py").write_text(TESTS)
    command = [sys.executable, "manage.py", "test"]
    result = run(command, cwd=project, capture_output=True, check=False, text=True)
    assert ("\nOK" if atomic == decorated else error) in result.stderr
