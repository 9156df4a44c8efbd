"""Errors speak of what HTTP has, and name what the client sent."""

import ast
import re
from pathlib import Path

from redmux.errors import InvalidArgumentError
from redmux_server.http_api.errors import body_of

ROOT = Path(__file__).parents[2]


def test_no_error_names_a_call_that_is_not_there_over_http():
    """Messages of the services speak of gRPC's methods."""
    calls = set().union(
        *(
            re.findall(r"rpc (\w+)\(", file.read_text())
            for file in (ROOT / "proto").rglob("*.proto")
        )
    )
    assert len(calls) > 10
    raised = {}
    for file in (ROOT / "server" / "redmux_server").rglob("*.py"):
        if file.parent.name == "grpc_api":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")):
                continue
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            message = "".join(text for text in texts if isinstance(text, str))
            if named := calls & set(re.findall(r"\w+", message)):
                raised[message] = named
    assert len(raised) > 4
    for message, named in raised.items():
        told = body_of(InvalidArgumentError(message))["error"]["message"]
        assert not named & set(re.findall(r"\w+", told)), told
        assert not re.search(r"(/[\w/]+) or \1\b", told), told
