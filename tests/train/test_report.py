"""The report of runs that these tests write by hand."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thornback.contracts import DataError
from thornback.train.report import write_report
from thornback.train.report.plots import thin

REWARDS = ("correct", "format", "brevity")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics_row(step, total, rng):
    share = step / total
    means = {"correct": 0.3 + 0.5 * share, "format": 0.8 + 0.17 * share, "brevity": 0.85 + 0.1 * share}
    stds = {name: math.sqrt(mean * (1 - mean)) for name, mean in means.items()}
    noise = {name: float(np.clip(mean + rng.normal(0, 0.05), 0, 1)) for name, mean in means.items()}
    return {
        **{"step": step, "time": 1.79e9 + step, "version": step, "accuracy": noise["correct"], "loss": 0.01},
        **{f"reward/{name}/mean": noise[name] for name in REWARDS},
        **{f"reward/{name}/std": stds[name] for name in REWARDS},
        **{f"weight/{name}": stds[name] / sum(stds.values()) for name in REWARDS},
        **{"advantage/abs_mean": 0.5 + rng.normal(0, 0.03), "advantage/abs_max": 2 + rng.normal(0, 0.2)},
        **{"advantage/mean_square": 0.6 + rng.normal(0, 0.04), "advantage/nonzero_groups": 14},
        **{"kl": 0.02 * share + abs(rng.normal(0, 0.002)), "entropy": 0.4 - 0.3 * share + rng.normal(0, 0.01)},
        **{"grad_norm": 1.0, "clip_fraction": 0.0},
        **{"mismatch/mean_abs": 3e-7 * (1 + rng.random()), "mismatch/max_abs": 4e-6 * (1 + rng.random())},
        **{
            "mismatch/weight_mean": 1.0,
            "response_length": 36 - 12 * share + rng.normal(0, 0.7),
            "truncated_fraction": 0.0,
        },
        **{"tokens": 3600, "tokens_per_second": 4000 + rng.normal(0, 200), "step_seconds": 0.9, "num_rollouts": 128},
        **{"rollout/accepted_share": 0.6 * share},
        **{"phase/rollout": 0.45 + rng.normal(0, 0.02), "phase/reward": 0.02, "phase/advantage": 0.004},
        **{"phase/update": 0.33, "phase/sync": 0.03, "phase/evaluate": 2.0 if step % 50 == 0 else 0.0},
    }


def samples(correct):
    keys = [f"arithmetic/{i}" for i in range(24)]
    thought = "7+8=15,3+4+1=8" if correct[0] else "7+8=15,3+4=7"
    return pa.table(
        {
            "prompt_key": keys,
            "prompt": [f"What is {i + 30} + {i + 55}?" for i in range(24)],
            "completion": [
                f"<think>{thought}</think><answer>{2 * i + 85 - (not c)}</answer>" for i, c in enumerate(correct)
            ],
            "answer": [str(2 * i + 85) for i in range(24)],
            "correct": pa.array([float(c) for c in correct], pa.float32()),
            **{f"reward.{name}": pa.array([float(c) for c in correct], pa.float32()) for name in REWARDS},
            "num_tokens": pa.array([24] * 24, pa.int32()),
        }
    )


@pytest.fixture
def run_directory(tmp_path):
    return write_run(tmp_path / "demo-0")


def write_run(directory, steps=200):
    """A run directory as a finished run leaves it."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    (directory / "config.yaml").write_text("task: arithmetic\nestimator: anchored_dvao\nseed: 0\n")
    write_lines(directory / "metrics.jsonl", [metrics_row(step, steps, rng) for step in range(1, steps + 1)])
    write_lines(
        directory / "evaluation.jsonl",
        [
            {
                **{"step": step, "mode": mode, "num_prompts": 512, "response_length": 36 - 12 * step / steps},
                "accuracy": (0.31 if mode == "sampled" else 0.9) + (0.5 if mode == "sampled" else 0.05) * step / steps,
                **{f"reward/{name}": 0.8 + 0.15 * step / steps for name in REWARDS},
            }
            for step in range(0, steps + 1, 50)
            for mode in ("sampled", "greedy")
        ],
    )
    write_lines(
        directory / "events.jsonl",
        [
            {"time": 1.79e9 + 3, "kind": "checkpoint", "message": "step 50 saved"},
            {
                "time": 1.79e9 + 9,
                "kind": "restart",
                "message": "rollout worker 1 died in step 61 and was started again; its 64 rollouts were issued again",
            },
        ],
    )
    pq.write_table(samples([i % 5 == 0 for i in range(24)]), directory / "samples_before.parquet")
    pq.write_table(samples([i % 7 != 0 for i in range(24)]), directory / "samples_after.parquet")
    return directory


class Page(HTMLParser):
    """What a reader of the page gets: its text, and every address that it would load."""

    def __init__(self, html):
        super().__init__()
        self.text, self.loads, self.figures = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "svg":
            self.figures.append(attributes["aria-label"])
        self.loads += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_draws_everything_that_the_run_recorded_on_one_page_that_loads_nothing(run_directory):
    path = write_report(run_directory)
    assert path == run_directory / "report.html"
    html = path.read_text()
    page = Page(html)
    assert page.loads == []
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{i}" for i in re.findall(r'id="([^"]*)"', html)}
    assert page.figures == [
        *("Accuracy", "Rewards", "Effective weights", "Advantages", "Response length"),
        *("Entropy", "Distance from the reference", "Sampler against trainer", "Time", "Throughput", "Guessed tokens"),
    ]
    for words in (
        "31.0\u202f%",
        "81.0\u202f%",
        "+50.0",
        "90.0\u202f%",
        "\u221212.0",
        "512 held-out",
        "rollout worker 1 died",
    ):
        assert words in page.text
    assert "estimator: anchored_dvao" in page.text
    assert write_report(run_directory).read_text() == html, "the same run gives the same page"


def test_shows_answers_that_were_learned_and_lost_as_the_model_wrote_them(run_directory):
    page = Page(write_report(run_directory).read_text())
    answers = page.text[page.text.index("Answers to the same problems") :]
    assert "<think>7+8=15,3+4+1=8</think><answer>" in answers, "tags are text, not markup"
    verdicts = re.findall(r"before\s*(right|wrong).*?after\s*(right|wrong)", answers, re.DOTALL)
    assert verdicts[0] == ("wrong", "right")
    assert ("right", "wrong") in verdicts
    assert len(verdicts) == 12


def test_a_run_in_its_first_minutes_has_a_report_too(tmp_path):
    (tmp_path / "config.yaml").write_text("task: arithmetic\n")
    page = Page(write_report(tmp_path).read_text())
    assert "No step has been finished yet." in page.text
    assert page.figures == []


def test_one_step_without_optional_figures(tmp_path):
    (tmp_path / "config.yaml").write_text("task: arithmetic\n")
    row = {"step": 1, "accuracy": 0.5, "reward/correct/mean": 0.5, "kl": None, "entropy": float("nan")}
    write_lines(tmp_path / "metrics.jsonl", [row])
    page = Page(write_report(tmp_path).read_text())
    assert page.figures == ["Accuracy", "Rewards"]
    assert "not two evaluations" in page.text


def test_a_step_taken_again_counts_once_and_a_torn_last_line_not_at_all(run_directory):
    metrics = run_directory / "metrics.jsonl"
    again = json.dumps({"step": 200, "num_rollouts": 1128, "tokens": 3600, "step_seconds": 0.9})
    metrics.write_text(f'{metrics.read_text()}{again}\n{{"step": 201, "num_rol')
    assert re.search(r"rollouts\s*26,600", Page(write_report(run_directory).read_text()).text)


def test_says_what_is_wrong_with_a_directory(run_directory, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no run directory"):
        write_report(tmp_path / "nowhere")
    metrics = run_directory / "metrics.jsonl"
    metrics.write_text("not json\n" + metrics.read_text())
    with pytest.raises(DataError, match=r"metrics.jsonl, line 1 is not JSON"):
        write_report(run_directory)


def test_a_long_run_is_drawn_by_the_means_of_neighbouring_steps(tmp_path):
    rows = [{"step": step, "kl": 1.0 + step % 2, "odd": None} for step in range(1, 1001)]
    thinned = thin(rows, limit=100)
    assert [row["step"] for row in thinned] == [10 * i + 5.5 for i in range(100)]
    assert {row["kl"] for row in thinned} == {1.5}
    assert thinned[0]["odd"] is None
    assert thin(rows, limit=1000) == rows
    small, large = (len(write_report(write_run(tmp_path / str(n), n)).read_text()) for n in (600, 6000))
    assert large < 1.5 * small
