"""`vllm serve` in a separate process, as a context manager."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# lets vLLM start on a small machine, on CPUs and without a network
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(base, adapter, port, *more) -> list[str]:
    """The command line of docs/serving.md, bound to the loopback address."""
    return [
        str(Path(sys.executable).parent / "vllm"), "serve", str(base), "--load-format", "lora_moe",
        "--additional-config", json.dumps({"lora_moe": {"adapter": str(adapter)}}),
        "--host", "127.0.0.1", "--port", str(port), *more,
    ]  # fmt: skip


@contextlib.contextmanager
def serving(base, adapter, log: Path, *more, limit: float = 300):
    """Yields the address of a running server and stops it afterwards; RuntimeError if it does not start."""
    port = free_port()
    with open(log, "w") as out:
        server = subprocess.Popen(
            command(base, adapter, port, *more), stdout=out, stderr=out, env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log, limit)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(server)


def _wait(server, health, log, limit):
    end = time.monotonic() + limit
    while True:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(health, timeout=2)
            return
        time.sleep(0.5)


def _stop(server):
    """Stops the server and its child processes, which form one process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
            return
