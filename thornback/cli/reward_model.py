"""`thornback reward-model`."""

from __future__ import annotations

import argparse

FLAGS = {"steps": int, "batch_size": int, "learning_rate": float, "max_length": int, "num_workers": int, "seed": int}


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("reward-model", help="train a model to tell good answers from bad ones, as a reward")
    parser.add_argument("model", metavar="MODEL", help="the model to start from: a directory or a hub name")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="preference pairs: JSON lines or Parquet files")
    parser.add_argument("--max-bad-rows", type=int, default=0, metavar="N", help="go on without so many bad rows")
    parser.add_argument("--threads", type=int, help="torch threads (default: every core)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU")
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X" if kind is float else "N")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from thornback.contracts import ConfigError
    from thornback.train.cluster import cluster
    from thornback.train.reward_models import RewardModelConfig, train_reward_model

    given = {name: value for name in FLAGS if (value := getattr(arguments, name)) is not None}
    try:
        config = RewardModelConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{flag} is {first['input']!r}: {first['msg']}.") from error
    with cluster(None):
        metrics = train_reward_model(
            arguments.model, arguments.out, arguments.sources, config,
            max_bad_rows=arguments.max_bad_rows, num_threads=arguments.threads, use_gpu=arguments.gpu, say=print,
        )  # fmt: skip
    print(
        f"{arguments.out}: of pairs that it has not seen, {metrics['accuracy']:.0%} are told apart as they should be."
    )
