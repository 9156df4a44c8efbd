"""What plain transformers say of the default model, with an adapter's edits made by hand.

Run by the project's interpreter. Reads {"adapter", "score": [[context ids, ids], ...],
"generate": [[prompt ids, number of tokens], ...], "chat": [[text, number of tokens], ...],
"save_tokenizer": folder} as JSON, all of them optional, and writes
{"score": [[sum of log-probabilities, whether all are the likeliest], ...],
"generate": [text, ...], "chat": [text, ...]}.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference import edited, generate

from redmux_adapters import load_base, read_adapter
from redmux_server.registry.given import zoo_folder


@torch.inference_mode()
def score(model, context, ids):
    """Returns what `ids` come to behind the context."""
    logits = model(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs[torch.arange(len(ids)), torch.tensor(ids)]
    return float(chosen.sum()), bool((logits.argmax(-1) == torch.tensor(ids)).all())


def main():
    asked = json.load(sys.stdin)
    model, tokenizer = load_base("smollm2")
    if folder := asked.get("save_tokenizer"):
        tokenizer.save_pretrained(folder)
    edits = read_adapter(zoo_folder() / asked["adapter"]).edits if asked.get("adapter") else {}

    def said(ids, num_tokens):
        out, _ = generate(model, ids, num_tokens, edits, eos=(tokenizer.eos_token_id,))
        return tokenizer.decode(out, skip_special_tokens=True)

    def chat(text):
        messages = [{"role": "user", "content": text}]
        if edits:  # the bundled adapters' format has no system message
            text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    with edited(model, edits):
        scores = [score(model, context, ids) for context, ids in asked.get("score", ())]
    answer = {
        "score": scores,
        "generate": [said(ids, num) for ids, num in asked.get("generate", ())],
        "chat": [said(chat(text), num) for text, num in asked.get("chat", ())],
    }
    json.dump(answer, sys.stdout)


main()
