"""Datasets as they are published, and every way in which a row can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thornback.contracts import DataError
from thornback.data import MathTask, read_prompts
from thornback.data.files import data_files

GSM8K = [
    {"question": "Natalia sold 48 clips in April. How many?", "answer": "She sold <<48/2=24>>24.\n#### 72"},
    {"question": "Weng earns $12 an hour. How much?", "answer": "Working 50 minutes.\n#### 1,000"},
]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": "Solve x+1=34. The last line is Answer: $Answer", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "33", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }
]
CHAT = [{"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]}]  # fmt: skip


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def write_parquet(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    return path


def save_to_disk(path: Path, rows: list) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "directory", "saved", "uri"])
def test_gsm8k_in_every_form(tmp_path, form, distributed, request) -> None:
    if distributed:
        request.getfixturevalue("ray_cluster")
    location = {
        "jsonl": lambda: write_jsonl(tmp_path / "train.jsonl", GSM8K),
        "parquet": lambda: write_parquet(tmp_path / "train.parquet", GSM8K),
        "directory": lambda: write_parquet(tmp_path / "hub/main/train-00000-of-00001.parquet", GSM8K).parents[1],
        "saved": lambda: save_to_disk(tmp_path / "saved", GSM8K),
        "uri": lambda: f"file://{write_jsonl(tmp_path / 'train.jsonl', GSM8K)}",
    }[form]()
    found = read_prompts(str(location), needs_answer=True, distributed=distributed)
    assert found.bad_rows == []
    assert [p.answer for p in found.prompts] == ["72", "1,000"]
    assert found.prompts[0].messages == ({"role": "user", "content": GSM8K[0]["question"]},)
    assert len({p.key for p in found.prompts}) == 2


def test_dapo_math_17k(tmp_path) -> None:
    prompt = read_prompts(str(write_parquet(tmp_path / "dapo-math-17k.parquet", DAPO))).prompts[0]
    assert prompt.answer == "33"
    assert prompt.messages[0]["content"].startswith("Solve x+1=34")
    assert prompt.extra["extra_info"] == {"index": "9a9b6eb4"}


def test_chat_messages_lose_the_answer_that_the_model_is_to_write(tmp_path) -> None:
    prompt = read_prompts(str(write_jsonl(tmp_path / "chat.jsonl", CHAT))).prompts[0]
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert prompt.answer is None


def test_columns_by_name(tmp_path) -> None:
    file = write_jsonl(tmp_path / "own.jsonl", [{"q": "1+1?", "a": 2, "id": "x7", "answer": "no"}])
    prompt = read_prompts(str(file), columns={"prompt": "q", "answer": "a", "key": "id"}).prompts[0]
    assert (prompt.key, prompt.answer, prompt.messages[0]["content"]) == ("x7", "2", "1+1?")


BAD = [
    ('{"question": "fine?", "answer": "1"}', None),
    ('{"question": "fine"', "no JSON"),
    ('["a", "list"]', "a list, not an object"),
    ('{"question": ""}', "it lacks a column|empty"),
    ('{"question": "  ", "answer": "1"}', 'its "question" is empty'),
    ('{"question": 7, "answer": "1"}', "is a int, not text or a list of messages"),
    ('{"text": "x", "answer": "1"}', "it lacks a column of messages, prompt"),
    ('{"question": "no answer"}', "it has no answer"),
    ('{"question": "empty", "answer": "#### "}', "its answer is empty"),
    ('{"question": "odd", "answer": ["1"]}', "its answer is a list"),
    ('{"prompt": [{"role": "king", "content": "x"}], "answer": "1"}', "no chat message"),
    ('{"prompt": [{"role": "user", "content": null}], "answer": "1"}', "content is no text"),
    ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}', "no user message"),
    ('{"question": "this prompt is far too long for the context", "answer": "1"}', "has 43 tokens, more than 20"),
]


@pytest.mark.parametrize("distributed", [False, True])
def test_bad_rows_are_reported_by_file_and_row_and_never_come_through(tmp_path, distributed, request) -> None:
    if distributed:
        request.getfixturevalue("ray_cluster")
    file = write_jsonl(tmp_path / "bad.jsonl", [line for line, _ in BAD])
    found = read_prompts(
        str(file), needs_answer=True, count_tokens=lambda m: len(m[-1]["content"]), max_prompt_tokens=20,
        distributed=distributed,
    )  # fmt: skip
    assert [p.key for p in found.prompts] == ["bad:1"]
    assert [r.row for r in found.bad_rows] == list(range(2, len(BAD) + 1))
    assert {r.file for r in found.bad_rows} == {str(file)}
    import re

    for report, (_, cause) in zip(found.bad_rows, BAD[1:], strict=True):
        assert re.search(cause, report.cause), report
    assert len(found.checked(max_bad_rows=13)) == 1
    with pytest.raises(DataError, match=r"has 13 bad rows of 14 \(.*bad.jsonl:2: no JSON .*; mend them"):
        found.checked()


def test_wrong_types_in_parquet(tmp_path) -> None:
    rows = [{"question": 1.5, "answer": "1"}, {"question": 2.5, "answer": "2"}]
    found = read_prompts(str(write_parquet(tmp_path / "x.parquet", rows)))
    assert [r.row for r in found.bad_rows] == [1, 2]
    with pytest.raises(DataError, match="2 bad rows of 2"):
        found.checked(0)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "absent.jsonl", "does not exist"),
        (b"", "empty.jsonl", "holds no prompts"),
        (b"not parquet at all", "x.parquet", "cannot be read as parquet"),
        (b"\xff\xfe\x00bad", "x.jsonl", "cannot be read as json"),
        (b"hello", "x.txt", "no known format"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, content, name, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(str(tmp_path / name)).checked()


def test_an_empty_directory_and_an_unknown_scheme(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        read_prompts(str(tmp_path))
    with pytest.raises(DataError, match="cannot be opened"):
        read_prompts("gopher://somewhere/x.jsonl")


def test_a_hub_name_goes_to_the_hub(monkeypatch) -> None:
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_prompts("openai/gsm8k", subset="main", split="train")
    assert asked == [("openai/gsm8k", "main", "train")]
    assert len(found.prompts) == 2

    def fails(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="the hub did not give it"):
        read_prompts("openai/gsm8k")


def test_splits_of_a_directory(tmp_path) -> None:
    write_jsonl(tmp_path / "train.jsonl", GSM8K[:1])
    write_jsonl(tmp_path / "test.jsonl", GSM8K[1:])
    (tmp_path / ".hidden.jsonl").write_text("x")
    assert [Path(f).name for f in data_files(str(tmp_path), "test")] == ["test.jsonl"]
    assert len(read_prompts(str(tmp_path), split="train").prompts) == 1
    assert len(read_prompts(str(tmp_path)).prompts) == 2


def test_files_of_one_name_keep_their_keys_apart(tmp_path) -> None:
    for part in "ab":
        (tmp_path / part).mkdir()
        write_jsonl(tmp_path / part / "x.jsonl", [{**row, "question": part + row["question"]} for row in GSM8K])
    prompts = read_prompts(str(tmp_path)).prompts
    assert [p.key for p in prompts] == ["x:1", "x:2", "x:1#2", "x:2#2"]
    assert prompts[3].extra["source"] == f"{tmp_path}/b/x.jsonl:2"


def test_a_problem_that_is_repeated_counts_once(tmp_path) -> None:
    found = read_prompts(str(write_parquet(tmp_path / "dapo.parquet", DAPO * 100)))
    assert (len(found.prompts), found.num_duplicates) == (1, 99)


# The math task


@pytest.fixture(scope="module")
def math(tmp_path_factory) -> MathTask:
    rows = [{"problem": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(200)]
    return MathTask(str(write_jsonl(tmp_path_factory.mktemp("math") / "sums.jsonl", rows)), budget=100, seconds=20)


def test_math_splits_are_disjoint_and_cover_everything(math) -> None:
    train, test = list(math.prompts("train")), list(math.prompts("test"))
    assert not {p.key for p in train} & {p.key for p in test}
    assert len(train) + len(test) == 200
    assert 5 < len(test) < 40
    assert [r.name for r in math.rewards] == ["correct", "format", "brevity"]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so it is \\boxed{72}", "72", True),
        ("so it is \\boxed{73}", "72", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{\\frac{2}{4}}", "1/2", True),
        ("\\boxed{1000}", "1,000", True),
        ("the answer is $x = 3$", "3", True),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("no number here", "4", False),
        ("", "4", False),
        ("\\boxed{", "4", False),
    ],
)
def test_math_verdicts(math, text, answer, right) -> None:
    from thornback.contracts import Completion, Prompt

    assert math.is_correct(Completion(Prompt("k", (), answer), text, 5, "stop")) is right


def test_a_formula_that_takes_for_ever_costs_its_time_limit_only(math) -> None:
    import threading
    import time

    from thornback.data.math_judge import MathJudge

    judge = MathJudge(seconds=1.0)
    assert judge.equal("\\boxed{2}", "2")
    verdicts = []
    started = time.monotonic()
    endless = "\\boxed{" + "9^{" * 8 + "9" + "}" * 8 + "}"

    def in_a_thread() -> None:
        verdicts.append(judge.equal(endless, "9^{9^{9^{9^{8}}}}"))
        verdicts.append(judge.equal("\\boxed{2}", "2"))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join(60)
    assert verdicts[-1] is True  # a fresh child answers
    assert judge.num_timeouts <= 1
    assert time.monotonic() - started < 60
    judge.close()
