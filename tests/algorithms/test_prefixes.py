"""What is known of replicas' prefix caches."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import PrefixIndex


def index(**nodes: int) -> PrefixIndex:
    made = PrefixIndex(4)
    for node_id, num_tokens in nodes.items():
        made.add_node(node_id, num_tokens)
    return made


def test_the_longest_beginning_of_whole_blocks_counts() -> None:
    made = index(a=100, b=100)
    made.computed("a", made.keys([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    made.computed("b", made.keys([1, 2, 3, 4, 0, 0, 0, 0, 0]))
    assert made.hits(made.keys([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])) == {"a": 8, "b": 4}
    assert made.hits(made.keys([1, 2, 3, 4, 5, 6, 7, 8])) == {"a": 4, "b": 4}  # a last token is computed anyway
    assert made.hits(made.keys([9, 2, 3, 4, 5, 6, 7, 8, 9])) == {}
    assert made.hits(made.keys([1, 2, 3])) == {}
    assert made.hits(made.keys([1, 2, 3, 4, 5], of="other weights")) == {}


def test_a_cache_holds_so_much() -> None:
    made = index(a=8)
    first, second = made.keys([1] * 9), made.keys([2] * 5)
    made.computed("a", first)
    made.computed("a", second)
    assert made.hits(first) == {"a": 4}  # its end was forgotten first
    assert made.hits(second) == {"a": 4}
    made.remove_node("a")
    assert made.hits(second) == {}
    assert not made._holders
    made.computed("a", first)  # it is gone
    assert made.hits(first) == {}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 1), max_size=20)), max_size=40))
def test_against_plain_lists(steps) -> None:
    made = index(a=10_000, b=10_000)
    seen: dict[str, list[list[int]]] = {"a": [], "b": []}
    for node_id, tokens in steps:
        expected = {}
        for name, prompts in seen.items():
            longest = max((_common(tokens, p) for p in prompts), default=0)
            if longest:
                expected[name] = longest
        assert made.hits(made.keys(tokens)) == expected
        made.computed(node_id, made.keys(tokens))
        if node_id in seen:
            seen[node_id].append(tokens)


def _common(tokens: list[int], other: list[int]) -> int:
    """Tokens of whole blocks, each before the last token of its prompt, that two prompts begin with."""
    blocks = 0
    while (end := 4 * (blocks + 1)) < min(len(tokens), len(other)) and tokens[:end] == other[:end]:
        blocks += 1
    return 4 * blocks


def test_a_long_prompt_is_looked_up_in_little_time() -> None:
    made = PrefixIndex(32)
    for n in range(100):
        made.add_node(str(n), 10_000)
    tokens = list(range(8000))
    keys = made.keys(tokens)
    for n in range(100):
        made.computed(str(n), keys)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        assert len(made.hits(made.keys(tokens))) == 100
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.05
