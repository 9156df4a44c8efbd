"""JSON schemas of every kind: those that are served, and those that are refused, with the words."""


def _object(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


def _closed(**properties):
    return _object(properties, **properties) | {"additionalProperties": False}


_TEXT, _WHOLE, _TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_FORMATS = (
    "date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip
SERVED = {
    # Types.
    **{f"type {name}": {"type": name} for name in ("string", "integer", "number", "boolean",
                                                  "null", "object", "array")},
    "anything": {},
    "several types": {"type": ["string", "null", "integer"]},
    # Objects.
    "required properties": _object("ab", a=_WHOLE, b=_TRUTH),
    "optional properties": _object(a=_WHOLE, b=_TRUTH, c=_TEXT, d={"type": "null"}, e=_WHOLE),
    "nested objects": _closed(a=_closed(b=_closed(c=_TRUTH))),
    "no additional properties": _closed(a=_TEXT, b=_WHOLE),
    "typed additional properties": {"type": "object", "additionalProperties": _WHOLE},
    "a required name without a property": {"type": "object", "required": ["b"]},
    "pattern properties": {
        "type": "object", "patternProperties": {"^x[0-9]": _WHOLE}, "additionalProperties": False,
    },
    "max properties": {"type": "object", "maxProperties": 2, "additionalProperties": _TRUTH},
    "min properties": {"type": "object", "minProperties": 1, "additionalProperties": _TRUTH},
    # Arrays.
    "items": {"type": "array", "items": _WHOLE},
    "min items": {"type": "array", "items": _TRUTH, "minItems": 3},
    "max items": {"type": "array", "items": _TRUTH, "maxItems": 2},
    "prefix items": {"type": "array", "prefixItems": [_WHOLE, _TRUTH], "minItems": 2},
    "prefix items alone": {"prefixItems": [_TEXT, _WHOLE], "items": False, "type": "array"},
    "arrays of objects": {"type": "array", "items": _closed(a=_TRUTH), "maxItems": 3},
    "nested arrays": {"type": "array", "items": {"type": "array", "items": _TRUTH}},
    # Texts.
    "min length": {"type": "string", "minLength": 5},
    "max length": {"type": "string", "maxLength": 4},
    "a range of lengths": {"type": "string", "minLength": 2, "maxLength": 6},
    "an anchored pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$"},
    "a pattern that is searched": {"type": "string", "pattern": "[x-z0-9]"},
    "a pattern that needs escapes": {"type": "string", "pattern": '^a["\\\\\n]b$'},
    "a pattern with a length": {"type": "string", "pattern": "^[ab]+$", "maxLength": 5},
    "a pattern of letters": {"type": "string", "pattern": "^[\u00e0-\u00fc]{1,3}$"},
    **{f"format {name}": {"type": "string", "format": name} for name in _FORMATS},
    # Numbers.
    "minimum": {"type": "integer", "minimum": 17},
    "maximum": {"type": "integer", "maximum": -3},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    "bounds of numbers": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "exclusive bounds of numbers": {
        "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1,
    },
    "a multiple of whole numbers": {"type": "integer", "multipleOf": 7},
    "a multiple of numbers": {"type": "number", "multipleOf": 0.01},
    # Values.
    "enum of texts": {"enum": ["red", "green", "grey"]},
    "enum of all kinds": {"enum": ["a", 1, None, True, [1, 2], {"b": "c"}]},
    "enum with a type": {"type": "string", "enum": ["a", 1]},
    "enum beyond ASCII": {"enum": ["\u00e9t\u00e9", "\U0001f600", 'a"b', "\n"]},
    "const": {"const": "x y"},
    "const object": {"const": {"a": [1, 2.5], "b": {"c": None}}},
    # Combinations.
    "any of": {"anyOf": [_WHOLE, {"type": "string", "maxLength": 3}]},
    "any of beside properties": _object("a", a=_WHOLE) | {"anyOf": [_object("b", b=_TRUTH),
                                                                   _object("c", c=_TRUTH)]},
    "all of": {"allOf": [_object("a", a=_WHOLE), _object("b", b=_TRUTH)]},
    "one of several consts": {"oneOf": [{"const": "a"}, {"const": "b"}]},
    "one of told apart": {"oneOf": [
        _closed(kind={"const": "cat"}, lives=_WHOLE), _closed(kind={"const": "dog"}, good=_TRUTH),
    ]},
    "ref": {"$defs": {"a": _WHOLE}, **_closed(a={"$ref": "#/$defs/a"})},
    "ref to itself": _closed(a=_TRUTH) | {"properties": {
        "a": {"anyOf": [_TRUTH, {"$ref": "#"}]}}},
    "a recursive list": {
        "$defs": {"node": _object(["next"], next={"anyOf": [
            {"$ref": "#/$defs/node"}, {"type": "null"}]}) | {"additionalProperties": False}},
        "$ref": "#/$defs/node",
    },
    "a recursive tree": {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    "ref with siblings": {
        "$defs": {"a": {"type": "string"}}, **_closed(a={"$ref": "#/$defs/a", "maxLength": 2}),
    },
    "bounds without a type": {"minimum": 5, "maxLength": 2},
    "title and description": {"title": "T", "description": "d", "default": 1, "type": "boolean"},
}  # fmt: skip
REFUSED = {
    "unique items": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "contains": _WHOLE}, "contains"),
    "not": ({"not": _TEXT}, "not"),
    "if then": ({"if": _TEXT, "then": {"maxLength": 2}}, "if"),
    "dependent required": ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "dependent schemas": ({"dependentSchemas": {"a": _TEXT}}, "dependentSchemas"),
    "property names": ({"propertyNames": {"maxLength": 2}}, "propertyNames"),
    "unevaluated": ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    "one of that overlaps": ({"oneOf": [_WHOLE, {"type": "number"}]}, "oneOf"),
    "an unknown format": ({"type": "string", "format": "color"}, "Unknown format: color"),
    "a count with optional names": (
        _object(a=_WHOLE) | {"minProperties": 1}, "min/maxProperties only"),
    "a count of names that may repeat": (
        {"type": "object", "minProperties": 2}, "minProperties: 2 cannot be held"),
    "lookaround": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "a remote ref": ({"$ref": "https://example.com/a.json"}, "not present in a registry"),
}  # fmt: skip
