"""`/tags`: names of one's own for policies."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.access import caller_of, needs
from service.errors import TagNotFound
from service.json_body import read_model
from service.preconditions import Precondition, etag
from service.routes.admin import control_of, cut, page_of, snapshot_of
from service.routes.policies import own_policy
from service.tags import TagRequest, checked_tag, tag_object

router = APIRouter(prefix="/tags")


@router.get("", dependencies=[needs("read")])
async def tags(request: Request) -> JSONResponse:
    limit, after = page_of(request)
    return cut([tag_object(tag, policy) for tag, policy in sorted(snapshot_of(request).tags.items())], limit, after)


@router.get("/{tag}", dependencies=[needs("read")])
async def tag(request: Request, tag: str) -> JSONResponse:
    policy = snapshot_of(request).tags.get(tag)
    if policy is None:
        raise TagNotFound("no such tag")
    return JSONResponse(tag_object(tag, policy), headers={"ETag": etag(policy)})


@router.put("/{tag}", dependencies=[needs("move_traffic")])
async def put(request: Request, tag: str) -> JSONResponse:
    control, caller = control_of(request), caller_of(request)
    asked = await read_model(request, TagRequest, control.max_body_bytes)
    checked_tag(tag)
    policy = (await own_policy(request, asked.policy)).id
    await _require_own(request, tag)
    is_new = await control.tags.put(tag, policy, caller, precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return JSONResponse(tag_object(tag, policy), 201 if is_new else 200, headers={"ETag": etag(policy)})


@router.delete("/{tag}", dependencies=[needs("move_traffic")])
async def remove(request: Request, tag: str) -> Response:
    control = control_of(request)
    await _require_own(request, tag)
    await control.tags.remove(tag, caller_of(request), precondition=Precondition.of(request))
    await control.catalogue.refresh()
    return Response(status_code=204)


async def _require_own(request: Request, tag: str) -> None:
    """A tag is moved away from a policy by who may do anything with that policy. Raises Forbidden."""
    if tag in snapshot_of(request).tags:
        await own_policy(request, tag)
