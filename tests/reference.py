"""The naive way: plain transformers, one request at a time, h * scale + bias by hand."""

from collections.abc import Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F

LAYER_NORM = ".activation_ln"


@contextmanager
def edited(model, edits: Mapping[str, object], where: range | None = None):
    """Edits the outputs of the named modules inside the block, of a tuple its first.

    With `where`, those at these positions alone.

    What is named like a module, with ".activation_ln" behind, is the LayerNorm after its edit.
    """

    def hook(path):
        def apply(module, args, output):
            if isinstance(output, tuple):
                return apply(module, args, output[0]), *output[1:]
            plain = output
            if path in edits:
                output = output * edits[path].scale + edits[path].bias
            if path + LAYER_NORM in edits:
                norm = edits[path + LAYER_NORM]
                output = F.layer_norm(output, (norm.dim,), norm.scale, norm.bias)
            if where is None:
                return output
            inside = torch.tensor([place in where for place in range(plain.shape[-2])])
            return torch.where(inside[:, None], output, plain)

        return apply

    handles = [
        model.get_submodule(path).register_forward_hook(hook(path))
        for path in {path.removesuffix(LAYER_NORM) for path in edits}
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def generate(model, prompt_ids, num_tokens, edits=None, eos=(), where=None):
    """Greedy (token ids, logprobs): the whole sequence is run anew for each token."""
    ids, out, logprobs = list(prompt_ids), [], []
    with edited(model, edits or {}, where):
        for _ in range(num_tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            token = int(logits.argmax())
            logprobs.append(float(torch.log_softmax(logits.float(), -1)[token]))
            ids.append(token)
            out.append(token)
            if token in eos:
                break
    return out, logprobs
