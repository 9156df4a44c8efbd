"""/tokenize and /detokenize, in vLLM's shapes."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from redmux.errors import FailedPreconditionError
from redmux_adapters.format.window import ALL
from redmux_server.http_api.answers import json_response
from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.generating import caller_of
from redmux_server.http_api.offer import Offer, adapter_header
from redmux_server.http_api.schemas.other_answers import Text, Tokens
from redmux_server.http_api.schemas.tokens import DetokenizeBody, TokenizeBody
from redmux_server.http_api.validated import JsonRoute
from redmux_server.services.spec import GenerationSpec


def router(offer: Offer) -> APIRouter:
    """Returns the routes of tokens."""
    router = APIRouter(route_class=JsonRoute, tags=["tokens"])
    decode = offer.codec.decoder(skip_special_tokens=False)

    @router.post("/tokenize", response_model=Tokens)
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """Returns the tokens that a prompt becomes, as a completion of it begins with."""
        tenant = caller_of(request).tenant
        published = await offer.names.resolve(body.model, tenant)
        service = offer.services.generation
        if service is None:
            raise FailedPreconditionError(
                "the model is an encoder, which goes on from no prompt; usage.prompt_tokens of "
                "/v1/embeddings tells how many tokens an input has"
            )
        adapter = offer.names.adapter(body.model)
        # What the adapter edits moves no token, so its marker need not be there.
        spec = GenerationSpec(body.what(), adapter, apply=ALL if adapter else None)
        prepared = await service.prepare(spec, tenant)
        ids = prepared.ids
        if body.prompt is not None and body.add_special_tokens is False:
            if service.decoder_start is not None:
                raise Refusal(
                    "add_special_tokens is false; this model reads a prompt as a whole, with what "
                    "ends it", param="add_special_tokens",
                )  # fmt: skip
            ids = ids[prepared.num_added :]
        answer = {
            "count": len(ids),
            "max_model_len": offer.services.validator.max_context,
            "tokens": ids,
        }
        names = [offer.codec.tokens.of(i)[0] for i in ids] if body.return_token_strs else None
        return json_response({**answer, "token_strs": names}, adapter_header(published))

    @router.post("/detokenize", response_model=Text)
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        """Returns the text of tokens, special ones among them."""
        published = await offer.names.resolve(body.model, caller_of(request).tenant)
        offer.services.validator.prompt(body.tokens, name="tokens")
        return json_response({"prompt": decode(body.tokens)}, adapter_header(published))

    return router
