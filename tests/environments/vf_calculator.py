"""An environment of the `verifiers` library with a tool, which a server of the library's runs for all episodes."""

import verifiers.v1 as vf


class Calculator(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class Data(vf.TaskData):
    answer: str


class Sum(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def has_answer(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Calculator(vf.SharedToolsetConfig())]

    def load(self):
        for i in range(4):
            yield Sum(Data(prompt=f"2+{i}", answer=str(2 + i)), self.config.task)


__all__ = ["Sums"]

if __name__ == "__main__":
    Calculator.run()
