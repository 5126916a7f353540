"""`/policies/{id}/report`: what the policy was worth on held-out prompts, as JSON, as a model card or as a picture."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.access import caller_of, needs
from service.errors import InvalidField
from service.json_body import query_parameters
from service.report_files import FORMATS, entity_tag, is_known, read_report, wanted_format, with_report
from service.routes.admin import control_of, snapshot_of
from service.tags import named_policy

router = APIRouter(prefix="/policies")


@router.get("/{policy_id}/report", dependencies=[needs("read")])
async def report(request: Request, policy_id: str) -> Response:
    control = control_of(request)
    form = query_parameters(request, ("format",)).get("format")
    if form is not None and form not in FORMATS:
        raise InvalidField(f"format must be one of {', '.join(FORMATS)}", param="format")
    named = named_policy(policy_id, snapshot_of(request))
    found = await control.catalogue.policy(named, caller_of(request).tenant)
    manifest = with_report(found.manifest)
    form = form or wanted_format(", ".join(request.headers.getlist("accept")))
    tag = entity_tag(manifest, form)
    headers = {"ETag": tag, "Vary": "Accept", "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    if is_known(tag, request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    content = await asyncio.to_thread(read_report, control.artefacts, manifest, form)
    return Response(content, headers=headers, media_type=FORMATS[form])
