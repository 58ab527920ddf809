"""`thornback draft`."""

from __future__ import annotations

import argparse

FLAGS = ("prompt_tokens", "max_tokens", "temperature", "steps", "batch_size", "learning_rate", "seed")


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("draft", help="train a draft head, with which a model's answers take fewer passes")
    parser.add_argument("model", metavar="MODEL", help="the directory of the model to serve")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="Parquet rollouts, JSON lines, or text files; directories of them"
    )
    parser.add_argument("--column", default="text", help="where a row's text stands (default: text)")
    parser.add_argument("--max-bad-rows", type=int, default=0, metavar="N", help="go on without so many bad rows")
    parser.add_argument("--threads", type=int, help="torch threads (default: every core)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU")
    for name in FLAGS:
        kind = float if name in ("temperature", "learning_rate") else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X" if kind is float else "N")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from thornback.contracts import ConfigError
    from thornback.train.cluster import cluster
    from thornback.train.drafts import DraftConfig, train_draft

    given = {name: value for name in FLAGS if (value := getattr(arguments, name)) is not None}
    try:
        config = DraftConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{flag} is {first['input']!r}: {first['msg']}.") from error
    with cluster(None):
        metrics = train_draft(
            arguments.model, arguments.out, arguments.sources, config,
            column=arguments.column, max_bad_rows=arguments.max_bad_rows, num_threads=arguments.threads,
            use_gpu=arguments.gpu, say=print,
        )  # fmt: skip
    agreement = ", ".join(f"{share:.0%}" for share in metrics["agreement"])
    print(f"{arguments.out}: its first choice for the next tokens, one after the other, is the model's in {agreement}.")
