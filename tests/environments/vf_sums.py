"""An environment of the `verifiers` library: one turn, judged by two rewards."""

import verifiers.v1 as vf

SAID: list[str] = []  # what the library has judged, in this process


class Data(vf.TaskData):
    answer: str


class Sum(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.75)
    async def has_answer(self, task, trace) -> float:
        SAID.append(trace.assistant_messages[-1].content or "")
        return float(task.answer in trace.last_reply)

    @vf.reward(weight=0.25)
    async def brevity(self, trace) -> float:
        return 1.0 / (1.0 + len(trace.last_reply))

    @vf.metric
    async def truncated(self, trace) -> float:
        return float(trace.is_truncated)


class SumsConfig(vf.TasksetConfig):
    count: int = 12
    plus: int = 1


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self):
        for i in range(self.config.count):
            answer = str((i + self.config.plus) % 10)
            yield Sum(Data(prompt=f"{i}+{self.config.plus}", system_prompt="Add.", answer=answer), self.config.task)


__all__ = ["Sums"]
