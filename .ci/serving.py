"""What the checks in this folder share."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server
from subprocess import Popen

from httpx import Client, HTTPTransport

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 10  # seconds until a wait gives up


@contextmanager
def serve(*command: str, folder: Path = ROOT) -> Iterator[Client]:
    """Run Python with a free port as its last argument; yield a client of the server.

    The client retries until the server listens. `capfd` reads what the server prints.
    """
    with create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    # uvicorn would take options from the environment.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UVICORN_")}
    process = Popen([sys.executable, *command, port], cwd=folder, env=environment)
    url, transport = f"http://127.0.0.1:{port}", HTTPTransport(retries=6)
    try:
        with Client(base_url=url, transport=transport, timeout=PATIENCE) as client:
            client.get("/")
            yield client
    finally:
        process.terminate()
        process.wait(PATIENCE)
