"""The body of /v1/fine_tuning/jobs."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Unserved
from redmux_server.http_api.schemas.metadata import Metadata
from redmux_server.tuning.job import Hyperparameters

_METHODS = "train on examples of the right answer, as supervised"


def _chosen(value: Any) -> Any:
    return None if value == "auto" else value


def _auto(kind: type[int] | type[float]) -> BeforeValidator:
    return BeforeValidator(_chosen, json_schema_input_type=Literal["auto"] | kind | None)


class HyperparametersBody(Body):
    """How long and how fast an adapter learns; "auto" leaves it to the data."""

    n_epochs: Annotated[int | None, Field(ge=1, le=50), _auto(int)] = None
    batch_size: Annotated[int | None, Field(ge=1, le=256), _auto(int)] = None
    learning_rate_multiplier: Annotated[
        float | None,
        Field(
            gt=0,
            le=100,
            allow_inf_nan=False,
            description="Of the rate that this base model is trained at by default.",
        ),
        _auto(float),
    ] = None


class Supervised(Body):
    """What may be chosen for learning from examples."""

    hyperparameters: HyperparametersBody | None = None


class Method(Body):
    """How it is learned."""

    unserved: ClassVar[Unserved] = {"dpo": ((), _METHODS), "reinforcement": ((), _METHODS)}
    type: str
    supervised: Supervised | None = None


class JobBody(Body):
    """A file to learn from, and how."""

    unserved: ClassVar[Unserved] = {"integrations": (([],), "metrics are events of the job")}
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(None, description="The name of the adapter.")
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    method: Method | None = None
    hyperparameters: HyperparametersBody | None = None
    metadata: Metadata | None = None

    def chosen(self) -> Hyperparameters:
        """Returns what is chosen, where it may be written in two places."""
        if self.method is not None and self.method.type != "supervised":
            raise Refusal(
                f"method.type is {self.method.type[:80]!r}, which is not served: {_METHODS}",
                param="method.type", code="unsupported_parameter",
            )  # fmt: skip
        supervised = None if self.method is None else self.method.supervised
        inner = None if supervised is None else supervised.hyperparameters
        if inner is not None and self.hyperparameters is not None:
            raise Refusal(
                "hyperparameters are given twice; give those of method.supervised alone",
                param="hyperparameters",
            )
        given = inner or self.hyperparameters or HyperparametersBody()
        return Hyperparameters(given.n_epochs, given.batch_size, given.learning_rate_multiplier)
