"""What a user can get wrong: each is one clear sentence and exit code 2, in under 10 seconds."""

import json
import socket

import pytest

RECIPE = """
run: {name: wrong, steps: 2}
model: {build: {hidden_size: 32, num_hidden_layers: 1, intermediate_size: 64}}
data: {prompts_per_step: 2}
algorithm: {estimator: dvao}
rollout: {samples_per_prompt: 2, max_tokens: 8}
evaluation: {every: 0}
"""


@pytest.fixture
def expect_error(run_cli):
    """Runs a command that must fail as a user's mistake does; returns its sentence."""

    def run(*arguments):
        done = run_cli(*arguments)
        assert done.code == 2, done.err or done.out
        assert done.err.startswith("thornback: ")
        assert len(done.err.strip().splitlines()) == 1, f"more than one sentence:\n{done.err}"
        assert done.seconds < 10, f"told after {done.seconds:.1f} s"
        return done.err.removeprefix("thornback: ").strip()

    return run


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def test_an_unknown_key(expect_error, recipe):
    said = expect_error("train", recipe, "learner.learning_rat=1e-4")
    assert "learner.learning_rat" in said
    assert 'did you mean "learner.learning_rate"?' in said


def test_a_missing_recipe(expect_error):
    assert "nowhere.yaml" in expect_error("train", "nowhere.yaml")


def test_a_missing_data_file(expect_error, recipe):
    assert "missing.jsonl" in expect_error("train", recipe, "task.name=math", "task.options={path: missing.jsonl}")


def test_a_malformed_row(expect_error, recipe, tmp_path):
    rows = [{"question": "What is 1 + 1?", "answer": "#### 2"}, {"question": 7, "answer": "#### 3"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = expect_error("train", recipe, "task.name=math", "task.options={path: rows.jsonl}")
    assert "rows.jsonl" in said
    assert "2" in said, "the row is named"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('answer')", ("mine", "KeyError")),
        ("return 'good'", ("mine", "'good'")),
    ],
)
def test_a_reward_that_raises_or_returns_a_string(expect_error, recipe, tmp_path, body, words):
    (tmp_path / "mine.py").write_text(f"def judge(completion):\n    {body}\n")
    said = expect_error("train", recipe, "rewards.mine.function=mine:judge")
    for word in words:
        assert word in said


def test_a_reward_that_does_not_exist(expect_error, recipe, tmp_path):
    (tmp_path / "mine.py").write_text("")
    assert "mine:judge" in expect_error("train", recipe, "rewards.mine.function=mine:judge")


def test_a_model_directory_without_a_tokenizer(expect_error, recipe, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_model() / name)
    for command in (("train", recipe, "model.build=null", f"model.path={bare}"), ("serve", str(bare))):
        said = expect_error(*command)
        assert str(bare) in said
        assert "tokenizer" in said


def test_a_port_in_use(expect_error, tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = expect_error("serve", str(tiny_model()), "--port", str(port))
    assert str(port) in said
    assert "use" in said


def test_a_report_of_what_is_no_run(expect_error):
    assert "nowhere is no run directory" in expect_error("report", "nowhere")


def test_a_cluster_that_does_not_answer(expect_error, recipe):
    said = expect_error("submit", recipe, "--address", "http://127.0.0.1:9")
    assert "No Ray cluster answers at http://127.0.0.1:9" in said
