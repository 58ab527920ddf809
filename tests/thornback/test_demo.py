"""The demo: what counts as improved, and the whole of it."""

import re

import pytest
from rich.console import Console

from thornback.contracts import NotImproved
from thornback.demo import check_improved, demo_config, table_of
from thornback.demo_tasks import DEMOS
from thornback.train.report import Change, read_run

SUMS, AGENT = DEMOS["arithmetic"], DEMOS["multihop"]


def changes(accuracy=(0.3, 0.8), greedy=(0.9, 0.9), brevity=(0.85, 0.9)):
    return [
        Change("accuracy", "sampled", *accuracy, is_share=True),
        Change("brevity", "sampled", *brevity, is_share=True),
        Change("response length", "sampled", 30.0, 20.0, is_share=False),
        Change("accuracy", "greedy", *greedy, is_share=True),
    ]


def test_an_improved_model_passes_and_small_losses_are_allowed():
    check_improved(changes(), SUMS)
    check_improved(changes(accuracy=(0.3, 0.501), greedy=(0.9, 0.881), brevity=(0.85, 0.831)), SUMS)


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ({"accuracy": (0.3, 0.49)}, r"went from 30.0% to 49.0%"),
        ({"greedy": (0.9, 0.87)}, r"accuracy \(greedy\) fell from 90.0% to 87.0%"),
        ({"brevity": (0.85, 0.8)}, r"brevity \(sampled\) fell"),
    ],
)
def test_says_so_if_the_model_did_not_improve(worse, said):
    with pytest.raises(NotImproved, match=said):
        check_improved(changes(**worse), SUMS)


def test_an_agent_must_double_what_it_had():
    check_improved(changes(accuracy=(0.3, 0.6)), AGENT)
    with pytest.raises(NotImproved, match=r"went from 45.0% to 89.0%, and not to 90.0%"):
        check_improved(changes(accuracy=(0.45, 0.89)), AGENT)
    with pytest.raises(NotImproved, match=r"warm start was too weak: sampled accuracy was 15.0%"):
        check_improved(changes(accuracy=(0.15, 0.6)), AGENT)


def test_a_run_without_evaluations_is_no_success():
    with pytest.raises(NotImproved, match="no evaluation before and after"):
        check_improved([], SUMS)


def test_the_table_has_every_figure(capsys):
    Console(width=80).print(table_of(changes()))
    rows = [line.split() for line in re.sub("[│┃]", " ", capsys.readouterr().out).splitlines()]
    assert ["accuracy", "30.0", "80.0", "+50.0", "90.0", "90.0", "+0.0"] in rows
    assert ["response", "length", "30.0", "20.0", "-10.0"] in rows


@pytest.mark.parametrize(("task", "directory"), [("arithmetic", "runs/demo-3"), ("multihop", "runs/demo-multihop-3")])
def test_the_demo_trains_with_anchored_dvao_from_nothing(task, directory):
    config = demo_config(seed=3, directory="", task=task)
    assert config.algorithm.estimator == "anchored_dvao"
    assert config.model.build is not None
    assert config.warm_start is not None
    assert config.anchors is not None
    assert config.evaluation.num_prompts >= 500
    assert config.directory == directory


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_whole_demo(run_cli, tmp_path):
    done = run_cli("demo", "--seed", "0", "--out", str(tmp_path / "demo"), timeout=1440)
    assert done.code == 0, done.out[-3000:] + done.err
    assert "report.html" in done.out
    sampled = [row for row in read_run(tmp_path / "demo").evaluations if row["mode"] == "sampled"]
    before, after = sampled[0], sampled[-1]
    assert 0.2 <= before["accuracy"] <= 0.6
    assert after["accuracy"] >= before["accuracy"] + 0.2
    assert before["num_prompts"] >= 500
