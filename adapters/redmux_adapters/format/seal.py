"""The seal that a file may have: whose it is, and a checksum over every one of its bytes."""

import hashlib
import re

from redmux.errors import InvalidAdapterError

from .header import Header
from .strictjson import shown

_CHECKSUM = re.compile(r"[0-9a-f]{64}")
# As `write_container` writes it. Nothing else in a header can look like it: inside of texts, quotes
# are escaped.
_FIELD = '"checksum":"%s"'
_OPEN = "0" * 64
# Found in damaged files, too, whose header nothing else can read.
_OWNER = re.compile(rb'"owner":"([A-Za-z0-9-]{0,64})"')


def check_seal(header: Header, data: bytes) -> None:
    """Raises InvalidAdapterError unless a file has the checksum that it carries, if any."""
    said = header.metadata.get("checksum")
    if said is None:
        return
    if not _CHECKSUM.fullmatch(said):
        raise InvalidAdapterError(
            f"__metadata__ checksum is {shown(said)}; it has to be 64 hexadecimal digits"
        )
    if _checksum(data, _FIELD % said) != said:
        raise InvalidAdapterError(
            "the file is damaged: its bytes do not have the checksum in its __metadata__"
        )


def owner_in(data: bytes) -> str | None:
    """Returns the owner in the header of a file, which may be damaged; None where it has none."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = _OWNER.search(data, 0, min(end, len(data)))
    return None if found is None else found[1].decode()


def _checksum(data: bytes, field: str) -> str:
    """Returns the SHA-256 of a file with zeros in place of the digits in `field`, or ""."""
    start = data.find(field.encode())
    if start < 0:
        return ""
    end = start + len(field) - 1
    view = memoryview(data)
    digest = hashlib.sha256(view[: end - len(_OPEN)])
    digest.update(_OPEN.encode())
    digest.update(view[end:])
    return digest.hexdigest()
