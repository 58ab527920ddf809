"""An environment of the `verifiers` library that answers the model in code of its own, turn by turn."""

import asyncio

import verifiers.v1 as vf

SAID: list[list[str]] = []  # the model's turns of each episode that was judged, in this process


class Guess(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def patience(self, task, trace) -> float:
        SAID.append([message.content or "" for message in trace.assistant_messages])
        if task.prompt == "guess 3":
            raise ArithmeticError("no such judgement")
        return trace.num_turns / 4

    @vf.metric
    async def truncated(self, trace) -> float:
        return float(trace.is_truncated)


class Guesses(vf.Taskset[Guess, vf.TasksetConfig]):
    def load(self):
        for i in range(8):
            yield Guess(vf.TaskData(prompt=f"guess {i}"), self.config.task)


class TalkConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class Talk(vf.Env[TalkConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            for i in range(2):
                if said.terminated:
                    break
                if task.data.prompt == "guess 1":
                    raise KeyError("no such guess")
                if task.data.prompt == "guess 2":
                    await asyncio.sleep(60)
                said = await talk.turn(f"no {i}: {said.last_reply[:3]}")


__all__ = ["Guesses", "Talk"]
