"""Writes docs/configuration.md from the pydantic models: `python -m docs.make_configuration`, or `make docs`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from thornback.serve import ServeConfig
from thornback.train.config import RunConfig

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

<!-- Written by docs/make_configuration.py: run `make docs` after changing a setting. -->

A run is a YAML recipe; `key=value` arguments on the command line go over it, with dots between section and key:

```
thornback train recipes/arithmetic.yaml run.steps=50 algorithm.estimator=dvao
```

An unknown key is an error that names the nearest known one. `--dry-run` prints the whole configuration, defaults
included, and what it would start.
"""
SERVING = """\

# Serving

`thornback serve RUN_OR_MODEL key=value ...` takes these:

```
thornback serve runs/arithmetic num_replicas=2 limits.max_queued=64
```
"""


def page() -> str:
    """The whole reference as Markdown."""
    return INTRODUCTION + section_text(RunConfig, "") + SERVING + section_text(ServeConfig, "", level=3)


def section_text(model: type[BaseModel], prefix: str, level: int = 2) -> str:
    """A table of a model's own settings, then the sections below it under headings of this `level`.

    `prefix` is the model's dotted place with a dot at its end, "" at the top.
    """
    settings = {name: field for name, field in model.model_fields.items() if section_of(field) is None}
    text = ""
    if settings:
        text += "\n| setting | type | default | meaning |\n| --- | --- | --- | --- |\n"
        text += "".join(row(prefix + name, field) for name, field in settings.items())
    for name, field in model.model_fields.items():
        if (section := section_of(field)) is None:
            continue
        words = [one_line(field.description), one_line(section.__doc__)]
        place = f"{prefix}{name}" + (".NAME" if get_origin(field.annotation) is dict else "")
        text += f"\n{'#' * level} {place}\n\n{' '.join(filter(None, words))}\n"
        text += section_text(section, place + ".", level + 1)
    return text


def row(key: str, field: FieldInfo) -> str:
    """One setting as a table row."""
    cells = (f"`{key}`", type_text(field), default_text(field), one_line(field.description))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, an optional section, or a mapping of sections."""
    candidates = (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def type_text(field: FieldInfo) -> str:
    """`int >= 1`, `"clip" or "gspo"`, `list of str`."""
    marks = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{marks[name]} {getattr(m, name):g}" for m in field.metadata for name in marks if hasattr(m, name)]
    return " ".join([annotation_text(field.annotation), " and ".join(bounds)]).strip()


def annotation_text(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(annotation_text(a) for a in arguments)
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if hasattr(annotation, "__metadata__"):  # Annotated: the bounds of a part of a union
        bare = FieldInfo.from_annotation(annotation)
        return type_text(bare)
    if origin is list:
        return f"list of {annotation_text(arguments[0])}"
    if origin is tuple:
        return "(" + ", ".join(annotation_text(a) for a in arguments) + ")"
    if origin is dict or annotation is dict:
        return "mapping"
    return "none" if annotation is type(None) else "any" if annotation is Any else annotation.__name__


def default_text(field: FieldInfo) -> str:
    """The default as YAML would say it."""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "*required*"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return "`" + (str(default) if default != "" else '""') + "`"


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
