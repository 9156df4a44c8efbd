"""/v1/files: files to be learned from or answered, and what came out."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from redmux.errors import PermissionDeniedError
from redmux_server.files.store import StoredFile
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.multipart import read_form
from redmux_server.http_api.offer import Offer
from redmux_server.http_api.paging import page_of
from redmux_server.http_api.schemas.kept_answers import CONTENT, FileDeleted, Files, FileTold
from redmux_server.http_api.validated import KnownRoute

_PURPOSES = ("fine-tune", "batch")
_FORM = {
    "type": "object", "required": ["file", "purpose"], "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON objects, one a line."},
        "purpose": {"type": "string", "enum": list(_PURPOSES)},
    },
}  # fmt: skip


def router(offer: Offer) -> APIRouter:
    """Returns the routes of files."""
    router = APIRouter(route_class=KnownRoute, tags=["files"])
    store = offer.desk.files

    @router.post(
        "/v1/files",
        response_model=FileTold,
        openapi_extra={"requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": _FORM},
        }}},
    )  # fmt: skip
    async def create_file(request: Request) -> Response:
        """Takes a file of JSON objects, one a line."""
        _check_origin(request, offer.config.http_cors_origin)
        form = await read_form(request)
        file, purpose = form.pop("file", None), form.pop("purpose", None)
        for name in form:
            raise Refusal(
                f"{name[:80]} is not served: files stay until they are deleted", param=name[:80],
                code="unsupported_parameter",
            )  # fmt: skip
        if file is None or file.filename is None:
            raise Refusal("file is missing; send it as a part with a filename", param="file")
        if purpose is None:
            raise Refusal("purpose is missing", param="purpose")
        meant = purpose.data.decode(errors="replace")
        if meant not in _PURPOSES:
            raise Refusal(
                f"purpose is {meant[:80]!r}, must be one of {', '.join(_PURPOSES)}", param="purpose"
            )
        stored = await store.put(file.filename, meant, file.data, caller_of(request).tenant)
        return json_response(_told(stored))

    @router.get("/v1/files", response_model=Files)
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Lists files, the newest first unless `order` is asc."""
        found = [
            file for file in store.all_of(caller_of(request).tenant)
            if purpose in (None, file.purpose)
        ]  # fmt: skip
        return json_response(
            page_of(found if order == "desc" else found[::-1], after, limit, _told)
        )

    @router.get("/v1/files/{file_id}", response_model=FileTold)
    async def retrieve_file(request: Request, file_id: str) -> Response:
        """Returns what is known of a file."""
        return json_response(_told(store.get(file_id, caller_of(request).tenant)))

    @router.get("/v1/files/{file_id}/content", response_class=Response, responses=CONTENT)
    async def retrieve_file_content(request: Request, file_id: str) -> Response:
        """Returns the bytes of a file."""
        file = store.get(file_id, caller_of(request).tenant)
        pieces = store.pieces(file)
        first = await anext(pieces, b"")  # what is wrong with it is told before it begins

        async def all_pieces() -> Any:
            yield first
            async for piece in pieces:
                yield piece

        headers = {"content-length": str(file.num_bytes)}
        return StreamingResponse(all_pieces(), 200, headers, "application/octet-stream")

    @router.delete("/v1/files/{file_id}", response_model=FileDeleted)
    async def delete_file(request: Request, file_id: str) -> Response:
        """Removes a file."""
        file = await store.delete(file_id, caller_of(request).tenant)
        return json_response({"id": file.id, "object": "file", "deleted": True})

    return router


def _check_origin(request: Request, allowed: Sequence[str]) -> None:
    """Raises for a page of another origin: browsers send its forms without asking."""
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if urlsplit(origin).netloc != request.headers.get("host"):
        raise PermissionDeniedError(
            f"pages of {origin[:80]!r} may not send files; see --http-cors-origin"
        )


def _told(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
