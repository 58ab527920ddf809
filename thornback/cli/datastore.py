"""`thornback datastore build` and `show`."""

from __future__ import annotations

import argparse
import time


def add_commands(commands: argparse._SubParsersAction) -> None:
    parent = commands.add_parser("datastore", help="token sequences from which speculation guesses")
    actions = parent.add_subparsers(title="actions", metavar="ACTION", required=True)
    parser = actions.add_parser("build", help="sort rollouts, JSON lines or text files into one file")
    parser.add_argument("out", metavar="OUT", help="the file to write, such as store.arrow; may be a URI")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="Parquet rollouts, JSON lines, or text files; directories of them"
    )
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="the directory of the model to serve")
    parser.add_argument("--column", default="text", help="where a row's text stands (default: text)")
    parser.add_argument("--max-bad-rows", type=int, default=0, metavar="N", help="go on without so many bad rows")
    parser.set_defaults(run=build)
    parser = actions.add_parser("show", help="what a datastore holds")
    parser.add_argument("datastore", metavar="DATASTORE")
    parser.set_defaults(run=show)


def build(arguments: argparse.Namespace) -> None:
    from thornback.train.datastores import build_datastore

    started = time.perf_counter()
    info = build_datastore(
        arguments.out, arguments.tokenizer, arguments.sources, arguments.column, arguments.max_bad_rows
    )
    seconds = time.perf_counter() - started
    print(f"{arguments.out}: {info.num_tokens:,} tokens of {info.num_documents:,} documents, in {seconds:.1f} s.")


def show(arguments: argparse.Namespace) -> None:
    from thornback.train.datastores import datastore_info

    info = datastore_info(arguments.datastore)
    print(f"{arguments.datastore}: {info.num_tokens:,} tokens of {info.num_documents:,} documents")
    print(f"vocabulary {info.vocab_size:,}, tokenizer {info.tokenizer[:12] or 'unknown'}, format {info.version}")
