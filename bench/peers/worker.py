"""The child process of an engine without a server, see WorkerPeer. Standard library only."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Gets prompts, output tokens and adapters; returns the seconds taken and the tokens.
Answer = Callable[[list[list[int]], int, list[int | None]], tuple[float, list[list[int]]]]


def serve(load: Callable[[dict[str, Any]], Answer]) -> None:
    """Loads the engine, then answers waves until the input ends."""
    # Libraries print to standard output; the protocol keeps a descriptor of its own.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = load(json.loads(sys.argv[1]))
    print("{}", file=output, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        seconds, token_ids = answer(order["prompts"], order["output_tokens"], order["adapters"])
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=output, flush=True)
