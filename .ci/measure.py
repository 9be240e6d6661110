"""Measures the table in README.md. With a port, serves its last row by wsgiref."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import ProxyHandler, build_opener
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path
from serving import ROOT, serve

sys.path.insert(0, str(ROOT))
import app


async def blocking_view(request):
    time.sleep(0.1)  # noqa: ASYNC251 - the mistake that the table shows
    return JsonResponse({})


def sync_view(request):
    time.sleep(0.1)
    return JsonResponse({})


app.urlpatterns += [path("blocking/", blocking_view), path("sync/", sync_view)]
application = app.application

UVICORN = ["-m", "uvicorn", "--app-dir", ".ci", "--log-level", "warning"]
UVICORN += ["measure:application", "--port"]
WSGIREF = [".ci/measure.py"]
REQUESTS = 100
ROWS = [
    ("uvicorn, `async def`, `await asyncio.sleep(0.1)`", UVICORN, "/data/"),
    ("uvicorn, `async def`, `time.sleep(0.1)`", UVICORN, "/blocking/"),
    ("uvicorn, `def`, `time.sleep(0.1)`", UVICORN, "/sync/"),
    ("WSGI, one thread, `async def`, `await asyncio.sleep(0.1)`", WSGIREF, "/data/"),
]


def measure(command: list[str], url: str) -> float:
    open_directly = build_opener(ProxyHandler({})).open
    with serve(*command) as client, ThreadPoolExecutor(REQUESTS) as pool:
        url = f"{client.base_url}{url}"
        start = time.perf_counter()
        list(pool.map(lambda _: open_directly(url).close(), range(REQUESTS)))
        return time.perf_counter() - start


if __name__ == "__main__":
    if len(sys.argv) > 1:
        WSGIServer.request_queue_size = REQUESTS
        WSGIRequestHandler.log_request = lambda *args: None
        port = int(sys.argv[1])
        make_server("localhost", port, get_wsgi_application()).serve_forever()
    print(f"One worker, {REQUESTS} concurrent requests that wait 0.1 s each | Time")
    print("--- | ---")
    for row, command, url in ROWS:
        print(row, end=" | ", flush=True)
        print(f"{measure(command, url):.1f} s")
