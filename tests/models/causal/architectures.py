"""Small configurations of real decoder families, and where a layer of each can be edited."""

import dataclasses
from collections.abc import Mapping

SMALL = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
NEOX = SMALL | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
GROUPED = NEOX | {"num_key_value_heads": 2}
LLAMA = GROUPED | {"head_dim": 16}
GPT = SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
WINDOW = {"sliding_window": 9}  # shorter than the prompts of the tests
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = LLAMA | {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """Options of its configuration and the ends of the paths of its projections.

    `ffn` is None where the output of the FFN is no linear module, as with mixtures of experts.
    """

    options: Mapping[str, object]
    ffn: str | None = "mlp.down_proj"
    attn: str = "self_attn.o_proj"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def site_set(self, name: str) -> tuple[str, ...]:
        """The paper's choices of sites: its RED is ffn, its RED++ more."""
        ffn = () if self.ffn is None else (self.ffn,)
        return {
            "ffn": ffn or (self.attn,),
            "attn": (self.attn,),
            "ffn_attn": (self.attn, *ffn),
            "more": (*self.qkv, self.attn, *ffn),
            "res": (self.attn,),  # where the sums of the architecture are not known
            "ln": ffn or (self.attn,),
        }[name]


_QKV = ("self_attn.query_key_value",)
_GPT2 = {"ffn": "mlp.c_proj", "attn": "attn.c_proj", "qkv": ("attn.c_attn",)}
_GPTJ_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")

# In the default suite, each with every set of sites, every order and every cutting of prompts.
FAMILIES = {
    "llama": Family(LLAMA),
    "mistral": Family(LLAMA | WINDOW),
    "qwen2": Family(GROUPED),
    "qwen3": Family(LLAMA),
    "gemma": Family(LLAMA),
    "gemma2": Family(LLAMA | WINDOW | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "gemma3_text": Family(LLAMA | WINDOW | {"query_pre_attn_scalar": 16}),
    "phi": Family(NEOX, "mlp.fc2", "self_attn.dense"),
    "phi3": Family(GROUPED | WINDOW, qkv=("self_attn.qkv_proj",)),
    "gpt2": Family(GPT, **_GPT2),
    "gpt_neox": Family(
        NEOX, "mlp.dense_4h_to_h", "attention.dense", ("attention.query_key_value",)
    ),
    "opt": Family(NEOX | {"ffn_dim": 96, "word_embed_proj_dim": 64}, "fc2", "self_attn.out_proj"),
    "gptj": Family(GPT | {"rotary_dim": 8}, "mlp.fc_out", "attn.out_proj", _GPTJ_QKV),
    "gpt_bigcode": Family(GPT, **_GPT2),
    "starcoder2": Family(GROUPED | WINDOW, "mlp.c_proj"),
    "stablelm": Family(GROUPED),
    "granite": Family(GROUPED),
    "olmo2": Family(GROUPED),
    "smollm3": Family(GROUPED),
    "cohere2": Family(LLAMA | MIXED),
    "glm4": Family(LLAMA),
    "nemotron": Family(LLAMA),
    "mixtral": Family(EXPERTS, ffn=None),
    "qwen3_moe": Family(EXPERTS, ffn=None),
}
# Only in the slow suite.
MORE_FAMILIES = {
    "apertus": Family(GROUPED),
    "arcee": Family(LLAMA),
    "biogpt": Family(NEOX, "fc2", "self_attn.out_proj"),
    "codegen": Family(GPT | {"rotary_dim": 8}, "mlp.fc_out", "attn.out_proj", ("attn.qkv_proj",)),
    "cohere": Family(GROUPED),
    "cwm": Family(LLAMA | WINDOW),
    "ernie4_5": Family(LLAMA),
    "exaone4": Family(LLAMA | MIXED),
    "gemma3n_text": Family(LLAMA | WINDOW | {"num_kv_shared_layers": 1}),
    "gemma4_text": Family(LLAMA | WINDOW),
    "glm": Family(LLAMA),
    "granitemoe": Family(EXPERTS, ffn=None),
    "helium": Family(LLAMA),
    "hunyuan_v1_dense": Family(LLAMA),
    "jais2": Family(LLAMA),
    "ministral": Family(LLAMA | WINDOW),
    "ministral3": Family(LLAMA),
    "olmo": Family(GROUPED),
    "olmo3": Family(GROUPED | MIXED),
    "olmoe": Family(EXPERTS, ffn=None),
    "persimmon": Family(NEOX, "mlp.dense_4h_to_h", "self_attn.dense", _QKV),
    "phimoe": Family(EXPERTS, ffn=None),
    "qwen2_moe": Family(EXPERTS | {"shared_expert_intermediate_size": 32}, ffn=None),
    "seed_oss": Family(LLAMA),
    "vaultgemma": Family(LLAMA | WINDOW | {"query_pre_attn_scalar": 16}),
}
_LATENT = NEOX | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
# Families that cannot be served, and what the refusal says.
REFUSED = {
    "bloom": (
        SMALL | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
        "0 of its 2 layers ran their attention through transformers' attention interface",
    ),
    "falcon": (
        SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "0 of its 2 layers ran their attention",
    ),
    "mpt": (
        SMALL | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        "0 of its 2 layers ran their attention",
    ),
    "gpt_neo": (
        SMALL | {"hidden_size": 64, "num_layers": 2, "num_heads": 4,
                 "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
        "0 of its 2 layers ran their attention",
    ),
    "mamba": (
        SMALL | {"hidden_size": 64, "num_hidden_layers": 2},
        "0 of its 2 layers ran their attention",
    ),
    "lfm2": (
        LLAMA | {"layer_types": ["conv", "full_attention"]},
        "1 of its 2 layers ran their attention",
    ),
    "doge": (LLAMA, "does not run its attention through transformers' attention interface"),
    "gpt_oss": (EXPERTS, "uses attention sinks"),
    "youtu": (_LATENT, "a head of its keys has 24 dimensions, one of its values 16"),
}  # fmt: skip
