"""Random JSON Schemas of what can be enforced: schema(seed) is always the same one."""

import random

NAMES = ["id", "name", "naïve", "a b", 'x"y', "value", "$ref", "items", "ab"]
WORDS = ["red", "green", "", "null", "12", 'a"b', "中文", "line\nbreak"]
PATTERNS = ["^[a-z]{2,8}$", "^(foo|bar)-\\d+\\.\\d{1,3}$", "^\\w+@\\w+\\.org$", "^[^\\x00-\\x7f]{1,3}$",
            "^\\\\\"[A-F0-9]{4}$", "^(?:yes|no)?$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
PLAIN = ["string", "integer", "number", "boolean", "null", "enum", "const"]
NESTED = ["object", "object", "map", "array", "array", "tuple", "anyOf", "oneOf", "allOf", "ref"]


def value(r, depth=1):
    kind = r.randrange(7 if depth else 5)
    if kind < 2:
        return r.choice(WORDS)
    if kind == 5:
        return [value(r, depth - 1) for _ in range(r.randrange(3))]
    if kind == 6:
        return {n: value(r, depth - 1) for n in r.sample(NAMES, r.randrange(3))}
    return r.choice([r.randrange(-50, 100), r.randrange(-99, 99) / 4, True, False, None])


def string(r):
    kind = r.randrange(6)
    if kind == 0:
        return {"type": "string", "format": r.choice(FORMATS)}
    if kind == 1:
        return {"type": "string", "pattern": r.choice(PATTERNS)}
    low = r.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + r.randrange(25)}


def number(r, kind):
    s, unit = {"type": kind}, 1 if kind == "integer" else r.choice([1, 8, 100])
    low = r.randrange(-5000, 5000)
    if r.random() < 0.6:
        s[r.choice(["minimum", "exclusiveMinimum"])] = low / unit if unit > 1 else low
    if r.random() < 0.6:
        high = low + 2 + r.randrange(1000)
        s[r.choice(["maximum", "exclusiveMaximum"])] = high / unit if unit > 1 else high
    return s


def an_object(r, depth):
    names = r.sample(NAMES, r.randrange(5))
    s = {"type": "object", "properties": {n: draw(r, depth - 1) for n in names},
         "required": r.sample(names, r.randrange(len(names) + 1))}
    kind = r.randrange(4)
    if kind == 0:
        s["additionalProperties"] = draw(r, 0)
    elif kind < 3:
        s["additionalProperties"] = False
    return s


def array(r, depth):
    low = r.randrange(3)
    return {"type": "array", "items": draw(r, depth - 1), "minItems": low, "maxItems": low + r.randrange(4)}


def nested(r, kind, depth):
    if kind == "object":
        return an_object(r, depth)
    if kind == "map":
        return {"type": "object", "additionalProperties": draw(r, depth - 1), "maxProperties": r.randrange(1, 4)}
    if kind == "array":
        return array(r, depth)
    if kind == "tuple":
        s = {"type": "array", "prefixItems": [draw(r, depth - 1) for _ in range(r.randrange(1, 4))]}
        return {**s, "minItems": r.randrange(len(s["prefixItems"]) + 1), "items": False}
    if kind == "anyOf":
        return {"anyOf": [draw(r, depth - 1) for _ in range(r.randrange(1, 4))]}
    if kind == "oneOf":  # told apart by a member
        branches = [an_object(r, depth) for _ in range(r.randrange(1, 4))]
        for i, b in enumerate(branches):
            b["properties"] = {"kind": {"const": f"k{i}"}, **b["properties"]}
            b["required"] = ["kind", *b["required"]]
        return {"oneOf": branches}
    if kind == "allOf":
        a, b = an_object(r, depth), an_object(r, depth)
        a.pop("additionalProperties", None), b.pop("additionalProperties", None)
        b["properties"] = {n: v for n, v in b["properties"].items() if n not in a["properties"]}
        b["required"] = [n for n in b["required"] if n in b["properties"]]
        return {"allOf": [a, b]}
    return {"$ref": "#/$defs/node"}


def draw(r, depth):
    kind = r.choice(PLAIN + NESTED + NESTED if depth > 0 else PLAIN)
    if kind == "string":
        return string(r)
    if kind in ("integer", "number"):
        return number(r, kind)
    if kind in ("boolean", "null"):
        return {"type": r.choice([kind, [kind, "integer"]])}
    if kind == "enum":
        return {"enum": [value(r) for _ in range(r.randrange(1, 5))]}
    if kind == "const":
        return {"const": value(r)}
    return nested(r, kind, depth)


def schema(seed):
    """Depth 3 at most, and a recursive definition that some refer to."""
    r = random.Random(seed)
    s = nested(r, r.choice(NESTED[:-1]), 3)
    s["$defs"] = {"node": {"type": "object", "additionalProperties": False, "required": ["v"], "properties": {
        "v": draw(r, 0), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}
    return s
