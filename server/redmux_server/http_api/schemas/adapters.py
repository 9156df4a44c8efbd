"""Bodies of vLLM's and SGLang's ways to load and unload an adapter."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from redmux_server.http_api.schemas.body import Body, Unserved


class LoadBody(Body):
    """An adapter that lies in a folder of the server."""

    no_effect = frozenset(("base_model_name", "pinned", "lora_int_id"))
    unserved: ClassVar[Unserved] = {
        "is_3d_lora_weight": ((False,), "adapters are RED's vectors"),
        "added_tokens_config": ((), "adapters bring no tokens"),
        "load_format": ((), "files are safetensors"),
    }
    lora_name: str
    lora_path: str
    load_inplace: bool = False

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield r"^adapter name\b", "lora_name"
        yield r"\bpass replace\b", "set load_inplace"


class UnloadBody(Body):
    """The name of an adapter."""

    no_effect = frozenset(("lora_int_id",))
    lora_name: str
