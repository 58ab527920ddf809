"""Environments of the `verifiers` library, as they are, played by a real model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import verifiers.v1 as vf

from thornback.actors import EpisodeSpec, PromptShard, RolloutSpec
from thornback.actors.reward_model import RewardModelCore
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import FINISH_REASONS, ConfigError, Prompt, RolloutBatch, SamplingParams
from thornback.data import RuleScorer, VerifiersTask, load_task, load_tokenizer, render_prompt, render_reply
from thornback.data.tokenizer import CHAT_TEMPLATE
from thornback.engine import load_model, sequence_logprobs

ENVIRONMENTS = Path(__file__).parents[1] / "environments"
# A random model ends its turn at one of these, after about eight tokens.
SAMPLING = SamplingParams(n=2, max_tokens=160, stop_token_ids=tuple(range(20, 140, 9)))
CALL = '<tool_call>{"name": "calculator_add", "arguments": {"a": 2, "b": 3}}</tool_call>'
RESULT = {"role": "tool", "content": "5", "name": "calculator_add"}


@pytest.fixture(scope="module", autouse=True)
def environments():
    """Installed, as far as this process and the servers that it starts are concerned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ENVIRONMENTS))
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ENVIRONMENTS), os.environ.get("PYTHONPATH", ""))))
        patch.setattr("thornback.data.tasks.verifiers_episode._LINGER_SECONDS", 0.5)
        yield


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


def worker(model, task, prompts: list[Prompt], **limits) -> tuple[RolloutWorkerCore, PromptShard]:
    tokenizer = load_tokenizer(model)
    ids = tuple(tuple(render_prompt(tokenizer, p.messages, tools=p.tools)) for p in prompts)
    shard = PromptShard(tuple(p.key for p in prompts), ids, tuple(1000 * i for i in range(len(prompts))))
    spec = EpisodeSpec(lambda: task, **{"timeout": 20.0, **limits})
    core = RolloutWorkerCore(RolloutSpec(str(model), num_threads=1, episodes=spec))
    core.setup()
    return core, shard


def left_over(core: RolloutWorkerCore) -> set[asyncio.Task]:
    """What still runs where the worker's environments did, once they have had the time to end."""
    deadline = time.monotonic() + 15
    while (left := asyncio.all_tasks(core.player._waiting._loop)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def play(model, task, prompts: list[Prompt], sampling=SAMPLING, **limits) -> tuple[RolloutBatch, dict[str, int]]:
    """Episodes, which leave nothing behind, and their failures by cause."""
    core, shard = worker(model, task, prompts, **limits)
    batch, report = core.generate(shard, sampling, 0, tuple(prompts))
    assert not left_over(core)
    return batch, dict(report.failures)


def reasons(batch: RolloutBatch) -> list[str]:
    return [FINISH_REASONS[i] for i in batch.finish_reason]


def turns_of(batch: RolloutBatch, i: int) -> list[np.ndarray]:
    starts = batch.turn_starts[batch.turn_offsets[i] : batch.turn_offsets[i + 1]]
    return np.split(batch.response(i), starts[1:])


def first(task: VerifiersTask, count: int, split: str = "train") -> list[Prompt]:
    return list(task.prompts(split))[:count]


def test_one_turn_is_judged_by_the_library(model):
    import vf_sums

    task = load_task("verifiers", {"env": "vf_sums"})
    prompts = first(task, 4)
    vf_sums.SAID.clear()
    batch, failures = play(model, task, prompts)
    assert not failures
    tokenizer = load_tokenizer(model)
    said = [tokenizer.decode(batch.response(i).tolist(), skip_special_tokens=True) for i in range(len(batch))]
    assert sorted(said) == sorted(vf_sums.SAID)
    assert (batch.loss_mask == 1).all()
    judge = RewardModelCore(lambda: RuleScorer(task, (*task.rewards, *task.more_rewards)), str(model))
    judge.setup()
    rewards = judge.score(batch, tuple(prompts)).rewards
    assert rewards.keys() == {"reward", "has_answer", "brevity", "truncated"}
    for i, text in enumerate(said):
        has_answer, brevity = float(prompts[i // 2].answer in text), 1 / (1 + len(text.strip()))
        assert rewards["has_answer"][i] == has_answer
        assert rewards["brevity"][i] == pytest.approx(brevity)
        assert rewards["reward"][i] == pytest.approx(0.75 * has_answer + 0.25 * brevity)
        assert rewards["truncated"][i] == float(reasons(batch)[i] == "length")


def test_what_the_library_says_between_turns_is_masked_and_what_it_hears_is_what_was_sampled(model):
    import vf_guess

    task = VerifiersTask("vf_guess")
    prompts = [p for p in first(task, 8) if p.messages[-1]["content"] not in ("guess 1", "guess 2", "guess 3")][:3]
    vf_guess.SAID.clear()
    batch, failures = play(model, task, prompts)
    assert not failures
    tokenizer = load_tokenizer(model)
    heard = []
    for i in range(len(batch)):
        turns, mask = turns_of(batch, i), batch.response(i, "loss_mask")
        texts = [tokenizer.decode(turn.tolist(), skip_special_tokens=True) for turn in turns]
        heard.append(texts[::2])
        assert (np.diff(mask) != 0).sum() == len(turns) - 1
        for number, reply in enumerate(turns[1::2]):
            message = {"role": "user", "content": f"no {number}: {texts[2 * number].strip()[:3]}"}
            assert reply.tolist() == render_reply(tokenizer, [message])
        whole = reasons(batch)[i] == "stop"
        assert not whole or len(turns) == 5
        assert batch.judged["truncated"][i] == float(not whole)
        assert batch.judged["reward"][i] == len(texts[::2]) / 4
    assert sorted(heard) == sorted(vf_guess.SAID)
    assert reasons(batch).count("stop") >= 4


@pytest.mark.parametrize("limits", [{"max_turns": 1}, {"max_tokens": 9}, {"max_tokens": 30}])
def test_an_episode_that_runs_out_is_judged_as_a_truncated_one(model, limits):
    task = VerifiersTask("vf_guess")
    prompts = [p for p in first(task, 8) if p.messages[-1]["content"] in ("guess 0", "guess 4")]
    sampling = replace(SAMPLING, max_tokens=limits.pop("max_tokens", 160))
    batch, failures = play(model, task, prompts, sampling, **limits)
    assert not failures
    assert "length" in reasons(batch)
    for i, reason in enumerate(reasons(batch)):
        num_turns = batch.turn_offsets[i + 1] - batch.turn_offsets[i]
        assert batch.judged["truncated"][i] == float(reason == "length")
        assert batch.judged["patience"][i] == (num_turns + 1) // 2 / 4


def test_what_fails_in_the_library_costs_its_own_episodes(model):
    task = VerifiersTask("vf_guess", held_out_share=1e-9)
    prompts = first(task, 5)
    batch, failures = play(model, task, prompts, timeout=3.0)
    ends = [reasons(batch)[2 * i : 2 * i + 2] for i in range(5)]
    assert "abort" not in ends[0] + ends[4]
    counts = [end.count("abort") for end in ends]
    assert failures == {
        cause: count
        for cause, count in (
            ("EnvironmentFailed: EnvError: Talk.run(): KeyError: 'no such guess'", counts[1]),
            ("TimeoutError: no answer within 3 s", counts[2]),
            (
                "EnvironmentFailed: TaskError: task Guess scoring: ArithmeticError: no such judgement",
                counts[3],
            ),
        )
        if count
    }
    assert len(failures) == 3
    assert np.isnan(batch.judged["reward"][[r == "abort" for r in reasons(batch)]]).all()


@pytest.fixture(scope="module")
def calling_model(model, tmp_path_factory):
    """A model that has learned one thing: to ask the calculator for 2+3, and to repeat what it says."""
    tokenizer = load_tokenizer(model)
    names = "{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}"
    tokenizer.chat_template = "{% if tools %}" + names + "{% endif %}" + CHAT_TEMPLATE
    (prompt,) = (p for p in VerifiersTask("vf_calculator", held_out_share=1e-9).prompts("train") if p.answer == "5")
    begin = render_prompt(tokenizer, prompt.messages, tools=prompt.tools)
    end = [tokenizer.eos_token_id]
    call, answer = (tokenizer(text, add_special_tokens=False).input_ids + end for text in (CALL, "5"))
    found = render_reply(tokenizer, [RESULT])
    mask = torch.tensor([1.0] * len(call) + [0.0] * len(found) + [1.0] * len(answer))
    torch.manual_seed(0)
    network = load_model(model, dtype="float32").train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(80):
        logprobs, _ = sequence_logprobs(network, [[*begin, *call, *found, *answer]], [len(begin)])
        loss = -(logprobs * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    directory = tmp_path_factory.mktemp("calling")
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_tools_of_the_library_are_offered_called_and_counted(calling_model):
    task = VerifiersTask("vf_calculator", held_out_share=1e-9)
    prompts = [p for p in task.prompts("train") if p.answer == "5"]
    assert [tool["function"]["name"] for tool in prompts[0].tools] == ["calculator_add"]
    assert prompts[0].tools[0]["function"]["parameters"]["required"] == ["a", "b"]
    sampling = SamplingParams(n=4, max_tokens=200, temperature=0.2)
    batch, failures = play(calling_model, task, prompts, sampling)
    assert not failures
    tokenizer = load_tokenizer(calling_model)
    called = [i for i in range(4) if len(turns_of(batch, i)) == 3]
    assert len(called) >= 3
    for i in called:
        said, found, answer = (tokenizer.decode(turn.tolist(), skip_special_tokens=True) for turn in turns_of(batch, i))
        assert said == CALL
        assert found == tokenizer.decode(render_reply(tokenizer, [RESULT]), skip_special_tokens=True)
        assert batch.num_calls[i] == 1
        assert batch.judged["reward"][i] == float(answer == "5")
    assert not running("vf_calculator")


def running(module: str) -> list[str]:
    """Processes that serve a module's tools."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        lines += [line] if f"-m {module}" in line else []
    return lines


@pytest.mark.full
def test_a_killed_process_takes_its_servers_along():
    program = (
        "import asyncio, os, signal\n"
        "from thornback.data import VerifiersTask\n"
        "task = VerifiersTask('vf_calculator')\n"
        "async def play():\n"
        f"    await task.environment(next(task.prompts('train')), 0).step({CALL!r})\n"
        "    print('ready', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(play())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "ready\n", done.stderr
    deadline = time.monotonic() + 10
    while running("vf_calculator") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running("vf_calculator")


# What is refused before a run starts


class Quiet(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def nothing(self) -> float:
        return 0.0


class Boxed(Quiet):
    NEEDS_CONTAINER = True


def taskset(task: type[vf.Task], infinite: bool = False, **data) -> type[vf.Taskset]:
    class Some(vf.Taskset[task, vf.TasksetConfig]):  # type: ignore[valid-type]
        INFINITE = infinite

        def load(self):
            yield task(vf.TaskData(**data), self.config.task)

    return Some


class PairConfig(vf.EnvConfig):
    solver: vf.AgentConfig = vf.AgentConfig()
    critic: vf.AgentConfig = vf.AgentConfig()


class Pair(vf.Env[PairConfig]):
    async def run(self, task, agents):
        await agents.solver.run(task)


class OwnLoop(vf.Harness[vf.HarnessConfig]):
    async def launch(self, *arguments):
        raise NotImplementedError


def install(monkeypatch, **classes: type) -> None:
    module = ModuleType("vf_refused")
    module.__all__ = list(classes)  # type: ignore[attr-defined]
    vars(module).update(classes)
    monkeypatch.setitem(sys.modules, "vf_refused", module)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"Some": taskset(Quiet, prompt="a"), "Pair": Pair}, "has the roles solver, critic, but"),
        ({"Some": taskset(Quiet, prompt="a"), "OwnLoop": OwnLoop}, "brings the harness vf_refused, but"),
        ({"Some": taskset(Boxed, prompt="a")}, "needs a container"),
        ({"Some": taskset(Quiet, prompt="a", image="alpine")}, "Task 0 of the environment needs a container"),
        ({"Some": taskset(Quiet)}, "Task 0 of the environment has no prompt"),
        ({"Some": taskset(Quiet, infinite=True, prompt="a")}, "has no end; give select.limit"),
        ({"Quiet": Quiet}, "cannot be made: TypeError"),
    ],
)
def test_what_cannot_be_played_is_refused_in_a_sentence(monkeypatch, classes, said):
    install(monkeypatch, **classes)
    with pytest.raises(ConfigError) as refused:
        list(load_task("verifiers", {"env": "vf_refused", "held_out_share": 1e-9}).prompts("train"))
    assert said in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": "vf_missing"}, "vf_missing cannot be made: ModuleNotFoundError"),
        ({"env": {"taskset": {"id": "vf_sums", "colour": 1}}}, "vf_sums cannot be made: "),
        ({"env": {"taskset": {"id": "vf_sums"}, "agent": {"runtime": {"type": "docker"}}}}, "needs a container"),
        ({"env": {"taskset": {"id": "vf_sums"}, "agent": {"harness": {"id": "bash"}}}}, "brings the harness bash"),
        ({"env": {"taskset": {"id": "vf_sums"}, "agent": {"max_total_tokens": 9}}}, "set rollout.max_tokens"),
        ({"env": "vf_sums", "max_turns": 0}, "max_turns of 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError) as refused:
        load_task("verifiers", options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_held_out_tasks_are_a_share_or_of_other_settings():
    share = VerifiersTask({"taskset": {"id": "vf_sums", "count": 200}}, held_out_share=0.3)
    train, test = ({p.messages[-1]["content"] for p in first(share, 200, split)} for split in ("train", "test"))
    assert len(train) + len(test) == 200
    assert 30 < len(test) < 90
    other = VerifiersTask("vf_sums", test_taskset={"plus": 2}, select={"limit": 5})
    assert [p.messages[-1]["content"] for p in other.prompts("train")] == [f"{i}+1" for i in range(5)]
    assert [p.messages[-1]["content"] for p in other.prompts("test")] == [f"{i}+2" for i in range(5)]


def test_an_environment_that_begins_otherwise_fails_and_says_so():
    task = VerifiersTask("vf_sums")
    prompt = replace(first(task, 1)[0], messages=({"role": "user", "content": "What?"},))

    async def play_it():
        await task.environment(prompt, 0).step("5")

    with pytest.raises(Exception, match="begins with other messages or tools than its task has"):
        asyncio.run(play_it())


class Stops(Exception):
    pass


def test_nothing_is_left_where_the_engine_fails(model):
    task = VerifiersTask("vf_guess", held_out_share=1e-9)
    prompts = [p for p in task.prompts("train") if p.messages[-1]["content"] == "guess 2"]  # which never answers
    core, shard = worker(model, task, prompts)
    step = core.engine.step

    def fails():
        if len(core.player._waiting):
            time.sleep(1.0)  # by then the library is under way
            raise Stops
        return step()

    core.engine.step = fails
    with pytest.raises(Stops):
        core.generate(shard, replace(SAMPLING, n=4), 0, tuple(prompts))
    assert not left_over(core)


@pytest.mark.full
def test_the_documented_run_works_as_it_is_written(model, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in ("my_sums.py", "my_sums.yaml"):
        (tmp_path / name).write_text(re.search(rf"```\w+\n(# {name}\n.*?)```", page, re.DOTALL)[1])
    command = [sys.executable, "-m", "thornback", "train", str(tmp_path / "my_sums.yaml")]
    # As small as the machine that tests run on.
    command += [f"model.path={model}", f"run.dir={tmp_path}/run", "run.steps=2", "run.timeout_seconds=120"]
    command += [
        "data.prompts_per_step=4",
        "rollout.samples_per_prompt=4",
        "rollout.max_tokens=24",
        "evaluation.every=0",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), os.getcwd()))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["reward/brevity/mean"] < 1
        assert row["reward/has_answer/mean"] >= 0
        assert row.get("rollout/failed_environments", 0) == 0
