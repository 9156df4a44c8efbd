"""transformers' generate with PEFT's mixed batch: adapter_names gives each row its LoRA."""

import time
from pathlib import Path
from typing import Any

from worker import Answer, serve


def load(settings: dict[str, Any]) -> Answer:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    model = base
    for folder in settings["adapters"]:
        name = Path(folder).name
        if model is base:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    model.eval()
    base.generation_config.eos_token_id = None  # every request runs to its full length

    def answer(
        prompts: list[list[int]], output_tokens: int, adapters: list[int | None]
    ) -> tuple[float, list[list[int]]]:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {}
        if model is not base:  # without names, the adapter that was loaded first would act
            options["adapter_names"] = [
                "__base__" if adapter is None else f"{adapter:03}" for adapter in adapters
            ]
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=output_tokens, pad_token_id=2, **options,
            )  # fmt: skip
        seconds = time.perf_counter() - started
        return seconds, output[:, ids.shape[1] :].tolist()

    return answer


if __name__ == "__main__":
    serve(load)
