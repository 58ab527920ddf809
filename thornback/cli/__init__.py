"""The command line. Knows the other rooms only inside its commands, so that an error of a recipe is seen at once."""

from thornback.cli.main import main

__all__ = ["main"]
