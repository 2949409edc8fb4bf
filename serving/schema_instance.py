"""The smallest JSON value that fits a JSON schema, for the scripted engine's structured replies.

Covers what plugins' schemas use (types, enum, const, required properties, minimum sizes, unions, local references); it
is no validator and ignores `pattern` and `format`. The real constrained decoding is vLLM's.
"""

from collections.abc import Mapping

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def minimal_instance(schema: Mapping[str, Json], root: Mapping[str, Json] | None = None, depth: int = 0) -> Json:
    """A value that fits `schema`; references are looked up in `root`, by default the schema itself.

    Raises:
        ValueError: a reference leads nowhere, or required values nest without end.
    """
    if depth > 64:
        raise ValueError("the schema requires a value that never ends")
    root = schema if root is None else root
    if isinstance(ref := schema.get("$ref"), str):
        return minimal_instance(_resolve(ref, root), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if isinstance(options := schema.get("enum"), list) and options:
        return options[0]
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(union), list) and parts and isinstance(first := parts[0], dict):
            return minimal_instance(first, root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "null")
    if isinstance(kind, list):
        kind = kind[0]
    match kind:
        case "object":
            return _object(schema, root, depth)
        case "array":
            items = schema.get("items")
            item = items if isinstance(items, dict) else {}
            return [minimal_instance(item, root, depth + 1) for _ in range(_number(schema, "minItems"))]
        case "string":
            return "x" * _number(schema, "minLength")
        case "integer" | "number":
            return _number(schema, "minimum")
        case "boolean":
            return False
        case _:
            return None


def _object(schema: Mapping[str, Json], root: Mapping[str, Json], depth: int) -> Json:
    properties = schema.get("properties")
    required = schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    filled: dict[str, Json] = {}
    for name in required:
        if isinstance(name, str):
            part = properties.get(name)
            filled[name] = minimal_instance(part if isinstance(part, dict) else {}, root, depth + 1)
    return filled


def _number(schema: Mapping[str, Json], key: str) -> int:
    value = schema.get(key, 0)
    return int(value) if isinstance(value, int | float) else 0


def _resolve(ref: str, root: Mapping[str, Json]) -> Mapping[str, Json]:
    found: Json = dict(root)
    for part in ref.removeprefix("#/").split("/"):
        if not isinstance(found, dict) or part not in found:
            raise ValueError(f"the schema's reference {ref!r} leads nowhere")
        found = found[part]
    if not isinstance(found, dict):
        raise ValueError(f"the schema's reference {ref!r} is not a schema")
    return found
