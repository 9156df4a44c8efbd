"""FileStore: files of tenants, and how much of them there may be."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RedmuxError,
    ResourceExhaustedError,
)
from redmux_server.durable import refusals, sync_folder, write_whole
from redmux_server.files.records import Records

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 16 << 20  # of one that a caller sends
_MAX_NAME_CHARS = 256
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """How much there may be: of one tenant, and of all together."""

    num_files: int = 1000
    tenant_bytes: int = 1 << 30
    total_bytes: int = 1 << 40


IN_MEMORY = Room(tenant_bytes=256 << 20, total_bytes=1 << 30)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file beside its content; `created_at` is in seconds since the epoch."""

    id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: float


class FileStore:
    """Files of tenants, each of which sees its own only. Belongs to the event loop.

    With a folder they are there again after a restart; without one they are kept in memory.
    """

    def __init__(self, folder: Path | None, room: Room | None = None) -> None:
        """Reads what the folder has; `room` is by default what fits it, or memory."""
        self._folder = folder
        self._room = room or (IN_MEMORY if folder is None else Room())
        self._records = Records(folder, "file")
        self._files: dict[str, StoredFile] = {}  # in the order of their creation
        self._contents: dict[str, bytes] = {}  # where there is no folder
        self._num_coming: dict[str, int] = {}  # tenant -> files that are being written
        self._bytes_coming: dict[str, int] = {}
        self._readers: dict[str, list[str]] = {}  # file -> who reads it
        self._load()

    def check_room(self, tenant: str, num_bytes: int = 0) -> None:
        """Raises ResourceExhaustedError unless the tenant may have another file of this size."""
        own = [file for file in self._files.values() if file.tenant == tenant]
        num_files = len(own) + self._num_coming.get(tenant, 0)
        if num_files >= self._room.num_files:
            raise ResourceExhaustedError(
                f"you have {num_files} files, which is the limit; delete some"
            )
        own_bytes = sum(file.num_bytes for file in own) + self._bytes_coming.get(tenant, 0)
        if own_bytes + num_bytes > self._room.tenant_bytes:
            raise ResourceExhaustedError(
                f"your files have {own_bytes} bytes, and this needs {num_bytes} more; limit "
                f"{self._room.tenant_bytes}. Delete some"
            )
        total = sum(f.num_bytes for f in self._files.values()) + sum(self._bytes_coming.values())
        if total + num_bytes > self._room.total_bytes:
            raise ResourceExhaustedError(
                f"the files of all callers have {total} bytes, and this needs {num_bytes} more; "
                f"limit {self._room.total_bytes}"
            )

    async def put(self, filename: str, purpose: str, data: bytes, tenant: str) -> StoredFile:
        """Keeps a file that a tenant has sent, and returns it.

        Raises InvalidArgumentError for one that is empty or too large, and ResourceExhaustedError
        or FailedPreconditionError where there is no room for it.
        """
        if not data:
            raise InvalidArgumentError("the file is empty")
        if len(data) > MAX_FILE_BYTES:
            raise InvalidArgumentError(
                f"the file has {len(data)} bytes, the limit is {MAX_FILE_BYTES}; divide it"
            )
        if len(filename) > _MAX_NAME_CHARS or not filename.isprintable():
            raise InvalidArgumentError(
                f"the filename {filename[:80]!r} has more than {_MAX_NAME_CHARS} characters, or "
                "some that cannot be printed"
            )
        self.check_room(tenant, len(data))
        return await self.keep(new_id(), filename, purpose, data, tenant)

    async def keep(
        self, file_id: str, filename: str, purpose: str, data: bytes, tenant: str
    ) -> StoredFile:
        """Keeps a file of the server's own making under an id of its own, in place of itself.

        There is room for it: whoever makes such files asks `check_room` before it begins.
        """
        file = StoredFile(file_id, tenant, filename, purpose, len(data), time.time())
        with self._coming(file):
            # A caller who goes away must not leave a file half known.
            await asyncio.shield(self._keep(file, data))
        return file

    def get(self, file_id: str, tenant: str, field: str = "") -> StoredFile:
        """Returns a file of the tenant; raises NotFoundError if there is none of that id.

        `field` is what the caller has named it in, for the error.
        """
        file = self._files.get(file_id)
        if file is None or file.tenant != tenant:
            named = f"{field} is {file_id[:80]!r}, which is" if field else f"{file_id[:80]!r} is"
            raise NotFoundError(f"{named} no file of yours; see GET /v1/files")
        return file

    def all_of(self, tenant: str) -> list[StoredFile]:
        """Returns the files of a tenant, the newest first."""
        return [file for file in reversed(self._files.values()) if file.tenant == tenant]

    async def read(self, file: StoredFile) -> bytes:
        """Returns the content of a file; raises DataLossError where it is gone."""
        if self._folder is None:
            return self._content(file)
        return await asyncio.to_thread(self._read, file)

    async def pieces(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yields the content of a file in pieces; raises as `read` does, before the first one."""
        if self._folder is None:
            data = self._content(file)
            for start in range(0, len(data), _PIECE_BYTES):
                yield data[start : start + _PIECE_BYTES]
            return
        try:
            opened = await asyncio.to_thread(self._path(file.id).open, "rb")
        except OSError:
            raise _lost(file) from None
        with opened:
            while piece := await asyncio.to_thread(opened.read, _PIECE_BYTES):
                yield piece

    async def delete(self, file_id: str, tenant: str) -> StoredFile:
        """Removes a file; raises NotFoundError, or FailedPreconditionError while it is read."""
        file = self.get(file_id, tenant)
        if file_id in self._readers:
            raise FailedPreconditionError(
                f"{file_id} is read by {self._readers[file_id][0]}; cancel that first"
            )
        del self._files[file_id]  # from here on nobody begins to read it
        # A caller who goes away must not leave its content.
        await asyncio.shield(self._remove(file))
        return file

    def hold(self, file_id: str, by: str) -> None:
        """Keeps a file from being deleted until its release; `by` is who reads it, for people."""
        self._readers.setdefault(file_id, []).append(by)

    def release(self, file_id: str, by: str) -> None:
        """Takes a hold back."""
        self._readers[file_id].remove(by)
        if not self._readers[file_id]:
            del self._readers[file_id]

    @contextlib.contextmanager
    def _coming(self, file: StoredFile) -> Iterator[None]:
        tenant = file.tenant
        self._num_coming[tenant] = self._num_coming.get(tenant, 0) + 1
        self._bytes_coming[tenant] = self._bytes_coming.get(tenant, 0) + file.num_bytes
        try:
            yield
        finally:
            self._num_coming[tenant] -= 1
            self._bytes_coming[tenant] -= file.num_bytes
            if not self._num_coming[tenant]:
                del self._num_coming[tenant], self._bytes_coming[tenant]

    async def _keep(self, file: StoredFile, data: bytes) -> None:
        if self._folder is None:
            self._contents[file.id] = data
        else:
            await asyncio.to_thread(self._write, file, data)
            try:
                await self._records.write(file.id, asdict(file))
            except RedmuxError:
                if file.id not in self._files:  # else it is the content of the one that was there
                    await asyncio.to_thread(self._path(file.id).unlink, missing_ok=True)
                raise
        self._files[file.id] = file

    async def _remove(self, file: StoredFile) -> None:
        try:
            await self._records.remove(file.id)
        except RedmuxError:
            self._files[file.id] = file
            raise
        self._contents.pop(file.id, None)
        if self._folder is not None:
            await asyncio.to_thread(self._path(file.id).unlink, missing_ok=True)

    def _content(self, file: StoredFile) -> bytes:
        if file.id not in self._contents:  # deleted meanwhile
            raise _lost(file)
        return self._contents[file.id]

    def _read(self, file: StoredFile) -> bytes:
        try:
            return self._path(file.id).read_bytes()
        except OSError:
            raise _lost(file) from None

    def _write(self, file: StoredFile, data: bytes) -> None:
        assert self._folder is not None
        with refusals(self._folder, f"{file.filename!r} is not kept", "data", "files"):
            write_whole(self._path(file.id), data)

    def _path(self, file_id: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{file_id}.content"

    def _load(self) -> None:
        """Takes what earlier runs kept; contents that no record tells of are removed."""
        if self._folder is None or not self._folder.is_dir():
            return
        for record in self._records.load():
            try:
                file = StoredFile(**record)
                if self._path(file.id).stat().st_size != file.num_bytes:
                    raise ValueError("its content has another size")
            except (OSError, TypeError, ValueError) as err:
                logger.error("file %s in %s cannot be used: %s", record["id"], self._folder, err)
                continue
            self._files[file.id] = file
        for path in self._folder.glob("*.content"):
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)
        sync_folder(self._folder)


def new_id() -> str:
    """Returns an id of a file that nobody guesses."""
    return f"file-{secrets.token_hex(12)}"


def _lost(file: StoredFile) -> DataLossError:
    return DataLossError(f"the content of {file.id} is gone")
