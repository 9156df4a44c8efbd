"""Who may see and change whose adapters.

A tenant is "" where the server asks for no keys, `ADMIN` for the admin key, else a name of its key.
An owner is a tenant's name, or "" for the operator: of what was there at start, was put without
keys or was put by the admin key.
"""

from redmux_server.keys import ADMIN

OPERATOR = ""


def sees_all(tenant: str) -> bool:
    """Whether no adapter is hidden from this tenant; it may change all of them, too."""
    return tenant in ("", ADMIN)


def may_see(tenant: str, owner: str | None) -> bool:
    """Whether a tenant may list and use what this owner has; None is an owner nobody knows."""
    return sees_all(tenant) or owner in (OPERATOR, tenant)


def may_change(tenant: str, owner: str | None) -> bool:
    """Whether a tenant may replace and delete what this owner has."""
    return sees_all(tenant) or owner == tenant


def owner_of_new(tenant: str) -> str:
    """Returns who owns what a tenant puts under a free name."""
    return OPERATOR if sees_all(tenant) else tenant
