"""CallKeys: whose a call of gRPC is."""

from typing import Any

from redmux_server.keys import ApiKeys


class CallKeys:
    """The keys that are let in, as methods ask for them: with the context of a call."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def tenant(self, context: Any) -> str:
        """Returns the tenant of the call's key as `ApiKeys.tenant` does, and raises as it does."""
        metadata = dict(context.invocation_metadata() or ())
        return self._keys.tenant(str(metadata.get("authorization", "")))
