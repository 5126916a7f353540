"""`/v1/files`: upload, list, retrieve, content, delete; as OpenAI's clients have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from service.access import caller_of, needs
from service.errors import InvalidField
from service.file_form import FileForm
from service.files import PURPOSE, Files, file_object
from service.json_body import query_parameters
from service.routes.admin import control_of, count_of, cut

MAX_LISTED: Final = 1000
PIECE_BYTES: Final = 2**16
router = APIRouter(prefix="/v1/files")


@router.post("", dependencies=[needs("train")])
async def upload(request: Request) -> JSONResponse:
    query_parameters(request, ())
    record = await _files(request).upload(request, FileForm, caller_of(request).tenant)
    return JSONResponse(file_object(record))


@router.get("", dependencies=[needs("read")])
async def files(request: Request) -> JSONResponse:
    query = query_parameters(request, ("purpose", "limit", "after", "order"))
    limit = count_of(query, "limit", MAX_LISTED, at_most=10_000)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidField("order must be asc or desc", param="order")
    found = await _files(request).all(caller_of(request).tenant) if query.get("purpose", PURPOSE) == PURPOSE else []
    rows = [file_object(record) for record in (found if order == "desc" else reversed(found))]
    return cut(rows, limit, query.get("after"))


@router.get("/{file_id}", dependencies=[needs("read")])
async def file(request: Request, file_id: str) -> JSONResponse:
    return JSONResponse(file_object(await _files(request).get(file_id, caller_of(request).tenant)))


@router.get("/{file_id}/content", dependencies=[needs("read_content")])
async def content(request: Request, file_id: str) -> StreamingResponse:
    record, path = await _files(request).path(file_id, caller_of(request).tenant)
    headers = {
        "Content-Length": str(record.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}",
    }
    return StreamingResponse(_pieces(path), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}", dependencies=[needs("train")])
async def delete(request: Request, file_id: str) -> JSONResponse:
    await _files(request).delete(file_id, caller_of(request).tenant)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece


def _files(request: Request) -> Files:
    return control_of(request).training.files
