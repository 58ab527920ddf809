"""A thousand random calls, and nothing is leaked, lost or said twice."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from thornback.contracts import EngineConfig, Request, SamplingParams
from thornback.engine import TorchEngine, copy_parameters

CONFIG = EngineConfig(block_size=4, num_blocks=24, max_num_seqs=6, max_num_batched_tokens=16, max_model_len=64)


def test_nothing_is_leaked_by_any_sequence_of_calls(tiny_model) -> None:
    engine = TorchEngine(tiny_model("qwen3", hidden_size=32, num_hidden_layers=1, intermediate_size=32), CONFIG)
    weights = copy_parameters(engine.model)

    class Calls(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.open: dict[str, dict[int, int]] = {}  # request -> sample -> tokens so far
            self.limits: dict[str, int] = {}
            self.leases: list = []

        @rule(
            length=st.integers(1, 40),
            stem=st.integers(4, 9),
            n=st.integers(1, 4),
            max_tokens=st.integers(1, 20),
            export=st.booleans(),
        )
        def add(self, length: int, stem: int, n: int, max_tokens: int, export: bool) -> None:
            name = str(self.count)
            self.count += 1
            prompt = tuple(stem + i % 7 for i in range(length))
            params = SamplingParams(n=n, max_tokens=max_tokens, seed=self.count, ignore_eos=True)
            engine.add_request(Request(name, prompt, params, export_kv=export))
            self.open[name] = dict.fromkeys(range(n), 0)
            self.limits[name] = 1 if export else min(max_tokens, CONFIG.max_model_len - length)

        @rule(steps=st.integers(1, 6))
        def step(self, steps: int) -> None:
            for _ in range(steps):
                for out in engine.step():
                    samples = self.open[out.request_id]
                    samples[out.index] += len(out.token_ids)
                    if out.kv is not None:
                        self.leases.append(out.kv.lease)
                    if out.finish_reason or out.kv:
                        assert samples.pop(out.index) == self.limits[out.request_id]
                    if not samples:
                        del self.open[out.request_id]

        @rule(pick=st.integers(0, 99))
        def abort(self, pick: int) -> None:
            if self.open:
                name = sorted(self.open)[pick % len(self.open)]
                engine.abort_request(name)
                del self.open[name]

        @rule()
        def release(self) -> None:
            if self.leases:
                engine.release(self.leases.pop())

        @rule(mode=st.sampled_from(["recompute", "keep"]))
        def load_weights(self, mode) -> None:
            engine.load_weights(weights, engine.weight_version + 1, mode)

        @rule()
        def flush(self) -> None:
            engine.flush_prefix_cache()

        @invariant()
        def books_agree(self) -> None:
            blocks = engine.blocks
            held = sum(1 for count in blocks.ref_count if count)
            assert held + blocks.num_free == blocks.num_blocks
            assert engine.has_unfinished_requests() == bool(self.open)

        def teardown(self) -> None:
            for name in list(self.open):
                engine.abort_request(name)
            for lease in self.leases:
                engine.release(lease)
            assert engine.load().num_free_blocks == CONFIG.num_blocks
            assert engine.blocks.ref_count == [0] * CONFIG.num_blocks
            engine.flush_prefix_cache()
            assert engine.blocks.allocator.num_free == CONFIG.num_blocks

    checks = list(HealthCheck)
    run_state_machine_as_test(
        Calls,
        settings=settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=checks),
    )
