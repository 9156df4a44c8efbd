"""The naive way: plain transformers, one request at a time, h * scale + bias by hand."""

from collections.abc import Mapping
from contextlib import contextmanager

import torch


@contextmanager
def edited(model, edits: Mapping[str, object]):
    """Edits the outputs of the named modules inside the block."""

    def hook(edit):
        return lambda module, args, h: h * edit.scale + edit.bias

    handles = [
        model.get_submodule(path).register_forward_hook(hook(edit)) for path, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def generate(model, prompt_ids, num_tokens, edits=None, eos=()):
    """Greedy (token ids, logprobs): the whole sequence is run anew for each token."""
    ids, out, logprobs = list(prompt_ids), [], []
    with edited(model, edits or {}):
        for _ in range(num_tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            token = int(logits.argmax())
            logprobs.append(float(torch.log_softmax(logits.float(), -1)[token]))
            ids.append(token)
            out.append(token)
            if token in eos:
                break
    return out, logprobs
