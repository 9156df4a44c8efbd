"""A short run of guidellm, over each path that it knows."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_run_has_no_errors_and_counts_its_tokens(url, tokenizer, tmp_path, path):
    report = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url},model=pirate,request_format={path}",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12",
        "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(report.read_text())["benchmarks"]
    totals = run["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (12, 0)
    assert run["metrics"]["output_token_count"]["successful"]["mean"] == 8
