"""schemathesis over /openapi.json: no 5xx, and every answer is one that the document has."""

import os
import subprocess
import sys

import pytest

# What it makes up of names and lengths would mostly name nothing, or fit nothing: it is told
# models that there are, and kept from asking for the whole context.
HOOKS = """
import schemathesis

NAMES = ["smollm2", "pirate", "smollm2:sentiment"]
CHAT = [{"role": "user", "content": "hi"}]
LENGTHS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}


@schemathesis.hook
def map_body(context, body):
    # What fits the document is replaced by what fits it, too: the rest has to be refused.
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str) and len(body["model"]) % 8:
        body["model"] = NAMES[len(body["model"]) % 3]
    length = LENGTHS.get(context.operation.path)
    if length and (body.get(length) is None or type(body[length]) is int):
        body[length] = min(body.get(length) or 4, 4)
    if type(body.get("n")) is int:
        body["n"] = min(body["n"], 3)
    messages = body.get("messages")
    if isinstance(messages, list) and messages and {*map(type, messages)} == {dict}:
        body["messages"] = CHAT
    return body
"""
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method"
)


@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_no_answer_is_a_fault_or_unlike_the_document(url, tmp_path, phase):
    (tmp_path / "hooks.py").write_text(HOOKS)
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json",
            "--phases", phase, "--checks", CHECKS, "--max-examples", "30", "--workers", "2",
            "--generation-deterministic", "--continue-on-failure", "--request-timeout", "60",
            "--suppress-health-check", "all", "--no-color",
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
