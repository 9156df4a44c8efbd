"""Which running requests lose their places to others, and who pays for that."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from redmux_server.engine.request import Request
from redmux_server.engine.room import Room


def for_turn(
    request: Request, running: Sequence[Request], served: Mapping[str, int], room: Room,
    *, num_rows: int, num_blocks: int, level: int,
) -> list[Request]:  # fmt: skip
    """Returns the running requests that have to give way to one whose turn it is, all or none.

    It lacks so many rows and blocks. Only tenants that have been served as much as `level` give
    something, and each keeps at least as much as the one that comes has then.

    A reading or a score is no victim: once its prompt is computed it ends by itself. Nor is a
    prompt that is scored on the way, so that no score comes twice.
    """
    lacks_blocks = num_blocks > 0

    def size(running: Request) -> int:
        return room.expected(running) if lacks_blocks else 1

    held = _held(running, size)
    wanted = size(request) + held[request.tenant]
    able = [r for r in reversed(running) if served[r.tenant] >= level]
    victims: list[Request] = []
    while num_rows > 0 or num_blocks > 0:
        able = [r for r in able if r.gives_way and held[r.tenant] - size(r) >= wanted]
        if not able:
            return []
        victim = max(able, key=lambda r: (held[r.tenant], -r.num_computed))
        able.remove(victim)
        held[victim.tenant] -= size(victim)
        num_rows -= 1
        num_blocks -= room.gained(victim)
        victims.append(victim)
    return victims


def for_growth(
    request: Request, running: Sequence[Request], served: Mapping[str, int]
) -> tuple[Request, str] | None:
    """Returns who gives way to a running request that needs one more block, and who pays.

    That is the youngest of the tenant that holds most blocks, of equal ones of the one most served.
    It can be the request itself. The oldest of all stays, so that it ends; and so does what has
    drawn no token since it was admitted, so that it gets further each time. None is left only if
    all others are such. Of the two tenants the one that holds more pays.
    """
    held = _held(running, lambda r: len(r.blocks))
    able = [r for r in reversed(running[1:]) if r.is_decoding]
    if not able:
        return None
    victim = max(able, key=lambda r: (held[r.tenant], served[r.tenant]))
    return victim, max(victim.tenant, request.tenant, key=held.__getitem__)


def _held(running: Sequence[Request], size: Callable[[Request], int]) -> Counter[str]:
    held: Counter[str] = Counter()
    for request in running:
        held[request.tenant] += size(request)
    return held
