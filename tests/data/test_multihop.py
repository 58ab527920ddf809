"""The search agent's task: a world whose facts hold, searches that find them, rewards as in PVPO, published files."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thornback.contracts import Completion, ConfigError, DataError, Prompt, Turn
from thornback.data import load_task
from thornback.data.search_index import SearchIndex
from thornback.data.tasks.multihop import HINT, answer_score, f1
from thornback.data.tasks.multihop_files import read_multihop
from thornback.data.tasks.multihop_world import document


@pytest.fixture(scope="module")
def task():
    return load_task("multihop", {"num_people": 40, "num_train": 200, "num_test": 100, "max_hops": 4})


def episode(*turns: str, hops: int = 2, answer: str = "Batan", num_calls: int | None = None) -> Completion:
    """The model's turns with a tool's between them."""
    said = [turn for text in turns for turn in (Turn(text, True), Turn("The mayor of Rokos is Batan.", False))][:-1]
    prompt = Prompt("p", ({"role": "user", "content": "?"},), answer, {"hops": hops})
    calls = len(turns) - 1 if num_calls is None else num_calls
    return Completion(prompt, "".join(turn.text for turn in said), 9, "stop", tuple(said), calls)


def play(task, prompt: Prompt, turns: list[str]) -> list[str]:
    """What the environment shows after each turn."""
    environment = task.environment(prompt, 0)
    shown = []
    for turn in turns:
        messages = environment.step(turn).messages
        shown.append(messages[0]["content"] if messages else "")
    return shown


@pytest.mark.parametrize("split", ["train", "test"])
def test_who_searches_along_the_path_finds_the_answer(task, split):
    for prompt, (_, question) in zip(task.prompts(split), task.questions(split), strict=True):
        shown = play(task, prompt, [f"<search>{query}</search>" for query in question.queries()])
        at = question.start
        for relation, entity, found in zip(question.path, question.entities, shown, strict=True):
            assert found.split("\n")[0] == document(relation, at, entity)
            assert len(found.split("\n")) <= task.top_k
            at = entity
        assert at == question.answer == prompt.answer
        assert len({question.start, *question.entities}) == len(question.path) + 1


def test_worlds_know_nothing_of_each_other(task):
    first, *others = task.worlds.values()
    assert len(others) == 16
    for other in others:
        assert other.facts.keys() == first.facts.keys()
        agree = sum(other.facts[key] == first.facts[key] for key in first.facts)
        assert agree < 0.25 * len(first.facts)  # by chance: of the ten cities a tenth


def test_training_questions_come_from_all_training_worlds(task):
    train, test = (list(task.prompts(split)) for split in ("train", "test"))
    assert len({p.key for p in (*train, *test)}) == 300
    assert {p.extra["world"] for p in test} == {"test"}
    assert [p.extra["world"] for p in train] == [f"train-{i % 16}" for i in range(200)]
    options = {"num_people": 40, "num_train": 200, "num_test": 100, "max_hops": 4}
    assert list(load_task("multihop", options).prompts("train")) == train
    other = load_task("multihop", {**options, "seed": 1})
    assert [p.key for p in other.prompts("train")] != [p.key for p in train]
    one = list(load_task("multihop", {**options, "num_worlds": 1}).prompts("train"))
    assert {p.extra["world"] for p in one} == {"train-0"}
    assert len({p.key for p in one}) == 200


def test_the_vocabulary_spells_everything_but_tags(task):
    from thornback.data import character_tokenizer, render_prompt

    tokenizer = character_tokenizer(task.words)
    for prompt, _ in zip(task.prompts("test"), range(20), strict=False):
        ids = render_prompt(tokenizer, prompt.messages)
        assert len(ids) < 10 + 5 * prompt.extra["hops"]
        assert prompt.messages[0]["content"] in tokenizer.decode(ids, skip_special_tokens=True)


def test_turns_that_are_no_action_are_told_so(task):
    prompt = next(task.prompts("train"))
    assert play(task, prompt, ["hello", "<search>mayor", "<search>nothing like it</search>"]) == [
        HINT,
        HINT,
        "Nothing.",
    ]
    assert task.environment(prompt, 0).step("<answer>x</answer>").messages == ()
    assert task.environment(prompt, 0).step("<search>mayor of x</search>").num_calls == 1


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Batan", 1.0), ("the Batan!", 1.0), ("it is Batan", 0.5), ("Batanis", 0.0), ("", 0.0), ("so Batan", 1.0)],
)
def test_short_answers_must_cover_the_truth_and_long_ones_are_weighed_by_words(answer, score):
    assert answer_score(answer, ("Batan",)) == score


def test_the_best_of_several_truths_counts():
    assert answer_score("New York City", ("NYC", "New York City")) == 1.0
    assert f1("New York", "New York City") == pytest.approx(0.8)


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_stay_in_range(answer, truth):
    assert 0.0 <= answer_score(answer, (truth,)) <= 1.0
    assert f1(answer, truth) == pytest.approx(f1(truth, answer))


def test_rewards(task):
    answer, form, steps = task.rewards
    good = episode("<search> mayor of Rokos</search>", "<think>so</think><answer> Batan</answer>")
    assert [answer(good), form(good), steps(good)] == [1.0, 1.0, 1.0]
    assert task.is_correct(good)
    silent = episode("<search> mayor of Rokos</search>", "Batan")
    assert [answer(silent), form(silent)] == [0.0, 0.0]
    chatty = episode("<search> mayor of Rokos</search> please", "<answer> Batan</answer>")
    assert [answer(chatty), form(chatty)] == [1.0, 0.0]
    early = episode("<answer> Batan</answer>", "<search> mayor of Rokos</search>")
    assert [answer(early), form(early)] == [0.0, 0.0]
    assert [steps(episode("<answer> Batan</answer>", num_calls=n)) for n in (0, 2, 3, 4, 9)] == [1, 1, 0.5, 0, 0]


def test_demonstrations_are_episodes_and_flaws_are_as_many_as_asked_for(task):
    whole = task.demonstrations(50, early=0, wrong_relation=0, wrong_name=0, repeated=0, broken_tags=0)
    for shown in whole:
        own = [turn for turn in shown.turns if isinstance(turn, str)]
        assert len(own) == shown.prompt.extra["hops"] + 1
        assert own[-1] == f"<answer> {shown.prompt.answer}</answer>"
        assert [m["role"] for turn in shown.turns if not isinstance(turn, str) for m in turn] == ["tool"] * (
            len(own) - 1
        )
    spoiled = task.demonstrations(200, early=1.0)
    assert all(sum(isinstance(t, str) for t in d.turns) <= 2 * d.prompt.extra["hops"] for d in spoiled)
    right = sum(d.turns[-1] == f"<answer> {d.prompt.answer}</answer>" for d in task.demonstrations(400))
    assert 100 < right < 300
    with pytest.raises(ConfigError, match="earlier"):
        task.demonstrations(1, earlier=1.0)


def test_a_search_is_the_same_wherever_it_runs():
    documents = [f"The {w} of {n} is {m}." for n, m in zip("abcdefgh", "hgfedcba", strict=True) for w in ("ant", "bee")]
    index = SearchIndex(documents * 400)
    found = index.search("ant of a", 3)
    assert found[0] == "The ant of a is h."
    assert pickle.loads(pickle.dumps(index)).search("ant of a", 3) == found
    assert SearchIndex(documents).search("ant of a", 2)[0] == "The ant of a is h."
    assert index.search("", 3) == index.search("xyz", 3) == ()


MUSIQUE = {
    "id": "2hop__1_2", "question": "Who is the mayor of the seat of Rakal?", "answer": "Batan", "answerable": True,
    "answer_aliases": ["Mayor Batan"], "question_decomposition": [{"id": 1}, {"id": 2}],
    "paragraphs": [
        {"idx": 0, "title": "Rakal", "paragraph_text": "Rakal has its seat in Rokos.", "is_supporting": True},
        {"idx": 1, "title": "Rokos", "paragraph_text": "Its mayor is Batan.", "is_supporting": True},
    ],
}  # fmt: skip
HOTPOT = {
    "_id": "5a", "question": "Who is the mayor of the seat of Rakal?", "answer": "Batan", "level": "hard",
    "supporting_facts": [["Rakal", 0], ["Rokos", 0]],
    "context": [["Rakal", ["Rakal has its seat in Rokos.", " It is large."]], ["Rokos", ["Its mayor is Batan."]]],
}  # fmt: skip
HUB = {
    **HOTPOT, "_id": None, "id": "5a",
    "supporting_facts": {"title": ["Rakal", "Rokos"], "sent_id": [0, 0]},
    "context": {"title": ["Rakal", "Rokos"], "sentences": [["Rakal has its seat in Rokos."], ["Its mayor is Batan."]]},
}  # fmt: skip
WIKI = {**HOTPOT, "context": json.dumps(HOTPOT["context"]), "supporting_facts": json.dumps(HOTPOT["supporting_facts"])}


@pytest.mark.parametrize("row", [MUSIQUE, HOTPOT, HUB, WIKI])
@pytest.mark.parametrize("as_list", [False, True])
def test_published_files(tmp_path, row, as_list):
    file = tmp_path / ("data.json" if as_list else "data.jsonl")
    file.write_text(json.dumps([row]) if as_list else json.dumps(row) + "\n")
    task = load_task("multihop", {"path": str(file), "test_path": str(file)})
    (prompt,) = task.prompts("train")
    assert prompt.answer == "Batan"
    assert prompt.extra["hops"] == 2
    assert task.system_prompt
    (found,) = play(task, prompt, ["<search>seat of Rakal</search>"])
    assert found.startswith("Rakal: Rakal has its seat in Rokos.")
    assert answer_score("Mayor Batan", (prompt.answer, *prompt.extra["aliases"])) == 1.0
    with pytest.raises(ConfigError, match="made-up world"):
        task.demonstrations(1)


def test_bad_rows_are_named(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [MUSIQUE, {**MUSIQUE, "answer": ""}, {"question": "?", "answer": "!"}, {**MUSIQUE, "answerable": False}]
    file.write_text("\n".join([*map(json.dumps, rows), "{"]))
    with pytest.raises(DataError, match=r"3 bad rows of 4 .*data.jsonl:2: no answer.*:3: no paragraphs.*:5: no JSON"):
        read_multihop(str(file))
    assert len(read_multihop(str(file), max_bad_rows=3)) == 1
    file.write_text("\n".join(map(json.dumps, [MUSIQUE, MUSIQUE, {**MUSIQUE, "answer": "Somebody"}])))
    keys = [p.key for p in load_task("multihop", {"path": str(file), "test_path": str(file)}).prompts("train")]
    assert keys == ["2hop__1_2", "2hop__1_2#2"]  # the same once, and another one under a name of its own
    file.write_text(json.dumps({**MUSIQUE, "answerable": False}))
    with pytest.raises(DataError, match="no multi-hop questions"):
        read_multihop(str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_hops": 3, "max_hops": 2}, "min_hops <= max_hops"),
        ({"num_worlds": 0}, "num_worlds of 1 or more"),
        ({"num_people": 1000}, "not 1000"),
        ({"num_people": 4, "num_worlds": 2, "num_train": 5000}, "raise num_people"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        list(load_task("multihop", options).prompts("train"))
