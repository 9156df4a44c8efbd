"""/tokenize and /detokenize, in vLLM's shapes."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux_server.http_api.answers import json_response
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer, adapter_header
from redmux_server.http_api.schemas.other_answers import Text, Tokens
from redmux_server.http_api.schemas.tokens import DetokenizeBody, TokenizeBody
from redmux_server.http_api.validated import JsonRoute


def router(offer: Offer) -> APIRouter:
    """Returns the routes of tokens."""
    router = APIRouter(route_class=JsonRoute, tags=["tokens"])
    service = offer.services.tokens

    @router.post("/tokenize", response_model=Tokens)
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """Returns the tokens that a prompt becomes, as a completion of it begins with."""
        tenant = caller_of(request).tenant
        adapter = await offer.names.wanted(body.model, None, tenant)
        found = await service.tokenize(body.spec(adapter), tenant)
        answer = {
            "count": len(found.ids),
            "max_model_len": service.max_context,
            "tokens": found.ids,
        }
        texts = service.texts(found.ids) if body.return_token_strs else None
        return json_response({**answer, "token_strs": texts}, adapter_header(found.published))

    @router.post("/detokenize", response_model=Text)
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        """Returns the text of tokens, special ones among them."""
        published = await offer.names.resolve(body.model, caller_of(request).tenant)
        text = service.detokenize(body.tokens, name="tokens")
        return json_response({"prompt": text}, adapter_header(published))

    return router
