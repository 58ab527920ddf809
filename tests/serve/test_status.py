"""What `thornback status` shows."""

from __future__ import annotations

from rich.console import Console

from thornback.cli.main import main
from thornback.contracts import EngineLoad, TransferStats
from thornback.serve.link import ReplicaReport
from thornback.serve.metrics import Metrics
from thornback.serve.status import Sample, render


def shown(before: Sample, now: Sample) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render("http://here", before, now))
    return console.export_text()


def report(name: str, running: int, free: int, transfers: int = 0) -> ReplicaReport:
    load = EngineLoad(running, 2, 1, 0, free, 100, 5)
    moved = {"ipc": TransferStats(transfers, 2 * transfers, transfers * 1_000_000, 0.1)} if transfers else {}
    return ReplicaReport(name, name[0].lower() + "t3t0w47", "n", 1, load, transfers=moved)


def test_rates_are_those_between_two_looks():
    metrics = Metrics("the-model")
    pages = []
    for i in range(2):
        for _ in range(10 * i):
            metrics.generation_tokens.inc(8)
            metrics.time_to_first_token.observe(0.02 if _ else 3.0)
        reports = [report("Prefill", 0, 100), report("Decode", 7, 25, transfers=1 + 9 * i)]
        pages.append(Sample.read(metrics.render(reports, [metrics.own(3)], {"pt3t0w47"} if i else set()), 2.0 * i))
    text = shown(*pages)
    assert "the-model" in text
    assert "40 tokens/s" in text
    assert "3 queued" in text
    assert "first token: half < 0.025 s, nine of ten < 0.025 s" in text
    (prefill,) = [line for line in text.splitlines() if "Prefill#pt3t0w47" in line]
    (decode,) = [line for line in text.splitlines() if "Decode#dt3t0w47" in line]
    assert "decode (lent)" in prefill
    for what in (" 7 ", " 75%", " 4.5 ", " 2.00 "):
        assert what in decode


def test_a_server_that_runs(server, capsys):
    server.client().completions.create(model="tiny", prompt="a", max_tokens=2)
    assert main(["status", server.url, "--once"]) == 0
    text = capsys.readouterr().out
    assert "tiny" in text
    assert "Replica#" in text


def test_nobody_answers(capsys):
    assert main(["status", "http://127.0.0.1:9"]) == 2
    assert "No thornback server answers at http://127.0.0.1:9" in capsys.readouterr().err
