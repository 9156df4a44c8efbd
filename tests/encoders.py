"""Tiny encoders of real architectures, adapters with heads for them, and plain transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import edited

from redmux_adapters import Adapter, Edit, Head, HeadConfig, fingerprint
from redmux_adapters.bases.load import load_encoder
from redmux_adapters.format.head import KINDS

_SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 130,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model type, options
    "bert": ("bert", _SMALL),
    # MiniLM is a BERT of another shape: more layers, more and smaller heads.
    "minilm": (
        "bert",
        _SMALL | {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 12},
    ),
    "roberta": ("roberta", _SMALL | {"type_vocab_size": 1, "pad_token_id": 1}),
    "mpnet": ("mpnet", _SMALL | {"pad_token_id": 1}),
    "electra": ("electra", _SMALL | {"embedding_size": 32}),
    "distilbert": ("distilbert", {
        "vocab_size": 300, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": 130,
    }),
}  # fmt: skip
HEAD_OF = {
    "bert": "bert", "roberta": "roberta", "mpnet": "roberta", "electra": "electra",
    "distilbert": "distilbert",
}  # fmt: skip
CLS, PAD, SEP = 0, 1, 2


def save_tiny_encoder(folder: Path, name: str) -> Path:
    """A random encoder with a byte-level tokenizer that frames a text as <s> text </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": CLS, "<pad>": PAD, "</s>": SEP} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", CLS), ("</s>", SEP)],
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip

    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **options))
    if kind in ("bert", "roberta", "mpnet"):  # a checkpoint with a pooler
        from transformers import AutoModel

        model = AutoModel.from_config(model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


@dataclass
class Encoder:
    """The plain model, for reference, and what adapters for it need."""

    folder: Path
    model: Any
    tokenizer: Any
    fingerprint: str
    ffn: dict[str, int]

    def adapter(self, seed: int, head: str | None = None, **config: Any) -> Adapter:
        """A random adapter of the magnitude of trained ones, with a head of that kind."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        edits = {s: Edit(1 + 0.4 * randn(n), 0.3 * randn(n)) for s, n in self.ffn.items()}
        if head is None:
            return Adapter(self.fingerprint, edits)
        values = {"problem_type": "single_label_classification", "labels": ["no", "yes"]} | config
        sizes = {"h": self.model.config.hidden_size, "l": len(values["labels"])}
        tensors = {
            name: randn(*(sizes[letter] for letter in letters)) / 4
            for name, letters in KINDS[head].items()
        }
        return Adapter(self.fingerprint, edits, head=Head(HeadConfig(head, **values), tensors))

    @torch.inference_mode()
    def states(self, ids, adapter=None, type_ids=None) -> torch.Tensor:
        """The last hidden states [tokens, hidden] of one input alone."""
        options = {} if type_ids is None else {"token_type_ids": torch.tensor([type_ids])}
        with edited(self.model, adapter.edits if adapter else {}):
            out = self.model(input_ids=torch.tensor([list(ids)]), **options)
        return out.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, ids, adapter, type_ids=None) -> list[float]:
        """What transformers' own classification model gives, with the head's weights put in.

        For a head on the mean, which transformers has not, the formula.
        """
        head = adapter.head
        if head.config.kind == "mean":
            weight, bias = (head.tensors[f"classifier.{part}"] for part in ("weight", "bias"))
            return (self.states(ids, adapter, type_ids).mean(0) @ weight.T + bias).tolist()
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(self.folder, num_labels=len(head.config.labels))
        classifier = AutoModelForSequenceClassification.from_config(config).eval()
        classifier.base_model.load_state_dict(self.model.state_dict(), strict=False)
        prefix = "classifier." if head.config.kind in ("roberta", "electra") else ""
        found = classifier.load_state_dict(
            {prefix + name: tensor for name, tensor in head.tensors.items()}, strict=False
        )
        assert not found.unexpected_keys
        options = {} if type_ids is None else {"token_type_ids": torch.tensor([type_ids])}
        with edited(classifier.base_model, adapter.edits):
            return classifier(input_ids=torch.tensor([list(ids)]), **options).logits[0].tolist()


def load_tiny_encoder(folder: Path) -> Encoder:
    """The reference of a folder that `save_tiny_encoder` wrote."""
    model, tokenizer = load_encoder(str(folder))
    output = "ffn.lin2" if model.config.model_type == "distilbert" else "output.dense"
    ffn = {
        path: module.out_features
        for path, module in model.named_modules()
        if path.endswith(output) and "attention" not in path
    }
    assert len(ffn) == model.config.num_hidden_layers
    return Encoder(folder, model, tokenizer, fingerprint(model), ffn)
