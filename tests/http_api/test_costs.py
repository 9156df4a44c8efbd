"""What a body costs that cannot be served: faults are not collected without end."""

import importlib
import pkgutil

import pytest
from pydantic import ValidationError

from redmux.errors import InvalidArgumentError
from redmux_server.http_api import schemas, side_by_side
from redmux_server.http_api.schemas.body import Body

NUM = 5000
MOST_FAULTS = 12  # of a field: some are told for each of its alternatives
LONG = {
    "numbers": [0] * NUM, "lists": [[]] * NUM, "objects": [{}] * NUM, "mixed": ["a", 0] * NUM,
    "an object of lists": {str(i): [] for i in range(NUM)},
}  # fmt: skip


def bodies():
    """The classes of all that is sent in bodies, and of their parts."""
    for module in pkgutil.iter_modules(schemas.__path__):
        importlib.import_module(f"{schemas.__name__}.{module.name}")
    assert issubclass(side_by_side.SideBySideBody, Body)
    found, left = set(), [Body]
    while left:
        below = left.pop().__subclasses__()
        found.update(below)
        left += below
    return sorted(found, key=lambda body: body.__name__)


def faults(body, given):
    try:
        body.model_validate(given)
    except ValidationError as err:
        return err.errors()
    except InvalidArgumentError:  # one, told at once
        pass
    return []


@pytest.mark.parametrize("body", bodies(), ids=lambda body: body.__name__)
def test_the_faults_of_a_field_are_few_however_much_it_holds(body):
    for name, field in body.model_fields.items():
        name = field.alias or name
        for what, value in LONG.items():
            found = [f for f in faults(body, {name: value}) if f["loc"][0] == name]
            assert len(found) <= MOST_FAULTS, (name, what)


@pytest.mark.parametrize("body", bodies(), ids=lambda body: body.__name__)
def test_no_more_fields_are_looked_at_than_a_request_can_have(body):
    with pytest.raises(InvalidArgumentError, match=f"the request has {NUM} fields; limit 256"):
        body.model_validate({f"x{i}": 0 for i in range(NUM)})
