"""What is told on a terminal: one line, with the names that a shell knows."""

import re

_NAMES = {
    "Generate or Complete": "`redmux generate`",
    "Generate": "`redmux generate`",
    "Complete": "`redmux generate`",
    "Classify": "`redmux classify`",
    "Embed": "`redmux embed`",
    "Score": "`redmux score`",
    "Tokenize": "`redmux tokenize`",
    "Detokenize": "`redmux detokenize`",
    "add_special_tokens": "--no-special-tokens",
    "ListAdapters": "`redmux adapters list`",
    "GetAdapter": "`redmux adapters get`",
    "PutAdapter": "`redmux adapters put`",
    "DeleteAdapter": "`redmux adapters delete`",
    "DownloadAdapter": "`redmux adapters download`",
    "SetAlias": "`redmux adapters alias`",
    "DeleteAlias": "`redmux adapters unalias`",
    "CreateJob": "`redmux jobs create`",
    "ListJobs": "`redmux jobs list`",
    "GetJob": "`redmux jobs get`",
    "WatchJob": "`redmux jobs watch`",
    "CancelJob": "`redmux jobs cancel`",
    "GetServerInfo": "`redmux info`",
    "pass replace": "pass --replace",
    "tls=True": "--tls",
    "root_certificates": "--ca",
    "timeout_s": "--timeout",
    "api_key": "--api-key or REDMUX_API_KEY",
    "max_tokens": "--max-tokens",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "repetition_penalty": "--repetition-penalty",
    "stop_regex": "--stop-regex",
    "stop_token_ids": "--stop-token-id",
    "json_schema": "--schema",
    "json_object": "--json-object",
    "lark": "--grammar",
    "top_logprobs": "--top-logprobs",
    "parse_special_tokens": "--parse-special-tokens",
    "ignore_eos": "--ignore-eos",
    "prompt_logprobs": "--prompt-logprobs",
}
# What is quoted is somebody's own text and stays as it is.
_PARTS = re.compile(
    r"(?<!\w)'[^']*'(?!\w)|\b(" + "|".join(re.escape(name) for name in _NAMES) + r")\b(?!=)"
)


def shell_line(message: str) -> str:
    """Returns a message in one line, with commands and flags instead of calls and arguments."""
    line = " ".join(message.split())
    return _PARTS.sub(lambda part: _NAMES[part[1]] if part[1] else part[0], line)
