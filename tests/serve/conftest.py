"""One server for all tests of serving, started as a user starts it; a tiny model whose tokens are bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

MODEL, KEY = "tiny", "secret-key"
START_TIMEOUT_S = 330  # longer than the server's own patience, after which it says why
CACHE = ("engine.kv_cache_memory_bytes=200000000",)  # enough, and quickly there

# ChatML with tools, as Qwen's models use it.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("served") / "byte-model")


def make_byte_model(directory: Path, **sizes: int) -> Path:
    """A random model over a byte-level tokenizer: characters beyond ASCII take several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from thornback.train.build import build_model

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TOOL_TEMPLATE
    )
    return build_model(
        directory,
        fast,
        vocab_size=len(fast),  # every id is a token: what is drawn can be shown
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=8192,
        **sizes,
    )


@dataclass
class Running:
    """A server in a process of its own. `log` grows."""

    url: str
    process: subprocess.Popen
    log: list[str]

    def client(self, **options) -> openai.OpenAI:
        http = httpx.Client(trust_env=False, timeout=60)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, **{"http_client": http, **options})

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=60)

    def page(self) -> str:
        """What Prometheus would read."""
        return httpx.get(f"{self.url}/metrics", trust_env=False, timeout=30).text

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.page(), re.MULTILINE))

    def engines(self) -> set[str]:
        """The replicas that the gateway which answers knows: Deployment#id."""
        return set(re.findall(r'^vllm:num_requests_running{engine="([^"]+)"', self.page(), re.MULTILINE))

    def replica_pids(self, deployment: str = "Replica") -> list[int]:
        """Processes of a deployment's replicas, among the server's own."""
        import psutil

        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                if any(f"Replica:thornback:{deployment}" in part for part in process.cmdline()):
                    found.append(process.pid)
        return found


def _start(model: Path | str, *overrides: str) -> Running:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "thornback", "serve", str(model), *CACHE, *overrides, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    log: list[str] = []
    threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"answers at (http://\S+)/v1", "".join(log))
        if match:
            return Running(match[1], process, log)
        time.sleep(0.1)
    _stop([Running("", process, log)])  # with its Ray, which would be in the way of all that follow
    raise AssertionError(f"the server did not start:\n{''.join(log)}")


def _stop(servers: list[Running]) -> None:
    for server in servers:
        server.process.send_signal(signal.SIGINT)
    for server in servers:
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Running]]:
    """`serve(model, "key=value", ...)`: a server. All end with the module: a Ray that idles takes a fifth of a core."""
    running: list[Running] = []

    def start(model: Path | str, *overrides: str) -> Running:
        running.append(_start(model, *overrides))
        return running[-1]

    yield start
    _stop(running)


@pytest.fixture(scope="session")
def _shared() -> list[Running]:
    return []


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, _shared: list[Running], byte_model: Path) -> Running:
    """The server that the modules of this folder share; it wants a key, and takes little at a time."""
    if not _shared:
        settings = {
            "served_model_name": MODEL,
            "api_keys": f"[{KEY}, another-key]",
            "threads_per_replica": 1,
            "limits.max_in_flight": 64,
            "limits.max_queued": 8,
            "limits.max_sequences": 64,
            "limits.queue_timeout_s": 20,
            "limits.max_body_bytes": 1000000,
        }
        _shared.append(_start(byte_model, *(f"{key}={value}" for key, value in settings.items())))
        request.node.getparent(pytest.Directory).addfinalizer(lambda: _stop(_shared))
    return _shared[0]


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def http(server: Running) -> httpx.Client:
    return server.http()
