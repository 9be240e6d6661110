"""What the checks in this folder share."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import create_server
from subprocess import Popen

from httpx import Client, HTTPTransport, Response, TransportError

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 10  # seconds until a wait gives up


@contextmanager
def serve(*command: str, folder: Path = ROOT) -> Iterator[Client]:
    """Run Python with a free port as its last argument, and yield a client of it."""
    with create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    # uvicorn would take options from the environment, and httpx2 a proxy.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UVICORN_")}
    environment["NO_PROXY"] = "127.0.0.1"
    process = Popen([sys.executable, *command, port], cwd=folder, env=environment)
    url, transport = f"http://127.0.0.1:{port}", HTTPTransport(retries=6)
    try:
        with Client(base_url=url, transport=transport, timeout=PATIENCE) as client:
            client.get("/")
            yield client
    finally:
        process.terminate()
        process.wait(PATIENCE)


def get_after_edit(client: Client, url: str, file: Path, text: str) -> Response:
    """Edit a file, and return the response once `uvicorn --reload` changes it."""
    before = client.get(url).text
    for _ in range(PATIENCE):
        file.write_text(text)  # again, until uvicorn watches the file
        time.sleep(1)
        with suppress(TransportError):  # while uvicorn restarts
            response = client.get(url)
            if response.text != before:
                break
    return response
