"""OpenVINO GenAI: its continuous batching pipeline on the CPU, base model only.

Its scheduler has no adapter per request, so there is nothing to measure with many adapters.
"""

import time
from typing import Any

from worker import Answer, serve


def load(settings: dict[str, Any]) -> Answer:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB; the largest wave needs a fifth of it
    scheduler.max_num_seqs = settings["max_num_seqs"]
    scheduler.max_num_batched_tokens = settings["max_num_batched_tokens"]
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(
        settings["model"], scheduler, "CPU", settings["properties"]
    )

    def answer(
        prompts: list[list[int]], output_tokens: int, adapters: list[int | None]
    ) -> tuple[float, list[list[int]]]:
        if any(adapter is not None for adapter in adapters):
            raise ValueError("OpenVINO GenAI has no adapter per request")
        config = genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        started = time.perf_counter()
        handles = [pipeline.add_request(i, ids, config) for i, ids in enumerate(inputs)]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        seconds = time.perf_counter() - started
        return seconds, [list(handle.read_all()[0].generated_ids) for handle in handles]

    return answer


if __name__ == "__main__":
    serve(load)
