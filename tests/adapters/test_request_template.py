"""Templates of requests: foreign code within bounds."""

import sys

import pytest

from redmux.errors import InvalidArgumentError
from redmux_adapters.text import request_template
from redmux_adapters.text.request_template import MAX_TEMPLATE_BYTES, RequestTemplate

MANY = "range(99999)"
FOREVER = {
    "loops": f"{{% for i in {MANY} %}}{{% for j in {MANY} %}}{{% endfor %}}{{% endfor %}}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}"
    "{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "a filter": f"{{% for i in {MANY} %}}{{% set a = {MANY} | map('string') | list %}}"
    "{% endfor %}",
}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(request_template, "MAX_RENDER_S", 0.1)


@pytest.mark.parametrize("template", FOREVER.values(), ids=FOREVER)
def test_a_template_that_never_ends_is_ended(template):
    with pytest.raises(InvalidArgumentError, match=r"took more than 0\.1 s"):
        RequestTemplate(template).render({})
    assert sys.gettrace() is None or "Deadline" not in repr(sys.gettrace())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 1000 }}", r"uses \* on more than small numbers"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", r"uses \*\* on more"),
        ("{{ '%9999999d' % 1 }}", "uses % on more"),
        ("{{ 'a'.ljust(99999999) }}", "not safely callable"),
        ("{{ '{:99999999}'.format(1) }}", "not safely callable"),
        ("{{ 'a' | center(99999999) }}", "No filter named 'center'"),
        ("{{ range(9999999) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('No!') }}", "No!"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_what_takes_much_or_is_not_allowed_is_refused(template, message):
    with pytest.raises(Exception, match=message):
        RequestTemplate(template).render({})


def test_a_template_writes_and_is_only_so_much(monkeypatch):
    monkeypatch.setattr(request_template, "MAX_OUTPUT_CHARS", 1000)
    with pytest.raises(InvalidArgumentError, match="more than 1000 characters"):
        RequestTemplate("{% for i in range(1001) %}a{% endfor %}").render({})
    with pytest.raises(InvalidArgumentError, match=f"65537 bytes; limit {MAX_TEMPLATE_BYTES}"):
        RequestTemplate("a" * (MAX_TEMPLATE_BYTES + 1))


def test_a_template_that_no_compiler_takes_is_refused():
    for template in ("{{ " + "(" * 5000 + ")" * 5000 + " }}",
                     "{% for i in [1] %}" * 30 + "{% endfor %}" * 30):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=r"template (is none|took more)"):
            RequestTemplate(template)


def test_small_numbers_are_calculated_with():
    text = "{{ 7 % 4 }} {{ 3 * 4 }} {{ 1.5 * 2 }} {{ 2 ** 3 }}"
    assert RequestTemplate(text).render({}) == "3 12 3.0 8.0"
