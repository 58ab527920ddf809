"""Calls are found in text however it is cut, and what is no call stays text."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thornback.data.tool_calls import CallArguments, CallStart, Content, ToolCallParser
from thornback.serve.protocol import ToolDefinition
from thornback.serve.tool_schemas import call_schema

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, {"b": "}<\\"{"}], "c": 2}}\n</tool_call>'
ARGUMENTS = '{"a": [1, {"b": "}<\\"{"}], "c": 2}'


def parse(pieces, **options):
    """(content, [(name, arguments)])"""
    parser = ToolCallParser(**options)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    content = "".join(event.text for event in events if isinstance(event, Content))
    calls = []
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[event.index][1] += event.text
    return content, [tuple(call) for call in calls]


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), max_size=8))
def test_however_the_text_is_cut(cuts):
    text = f"Let me see.\n{CALL}\n{CALL}\n"
    borders = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert parse(pieces) == ("Let me see.", [("add", ARGUMENTS), ("add", ARGUMENTS)])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        ("  spaces \n", "  spaces \n", []),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>not json</tool_call> so", "<tool_call>not json</tool_call> so", []),
        ('<tool_call>["list"]</tool_call>', '<tool_call>["list"]</tool_call>', []),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ],
)
def test_texts(text, content, calls):
    assert parse([text]) == (content, calls)
    assert parse(list(text)) == (content, calls)


def test_a_prompt_that_opened_the_call():
    text = '{"name": "f", "arguments": {}}'
    assert parse(list(text), inside=True) == ("", [("f", "{}")])


def test_no_more_calls_than_asked_for():
    assert parse([CALL + CALL], max_calls=1) == ("", [("add", ARGUMENTS)])


def test_arguments_go_out_while_they_are_written():
    parser = ToolCallParser()
    parser.push('<tool_call>{"name": "f", "arguments": {"long": "te')
    assert parser.push("xt") == [CallArguments(0, "xt")]


def test_references_within_a_tools_parameters_still_point_there():
    parameters = {
        "type": "object",
        "properties": {"point": {"$ref": "#/$defs/point"}},
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    tools = [ToolDefinition(function={"name": name, "parameters": parameters}) for name in ("f", "g")]
    schema = json.loads(call_schema(tools))
    for i, one in enumerate(schema["anyOf"]):
        place = one["properties"]["arguments"]["properties"]["point"]["$ref"]
        assert place == f"#/anyOf/{i}/properties/arguments/$defs/point"
        found = schema
        for part in place.removeprefix("#/").split("/"):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert found == parameters["$defs"]["point"]
