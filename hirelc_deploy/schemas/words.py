"""In: what a JSON value is. Out: its schema; the words that schemas are written in."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def text(description: str = "") -> Schema:
    """Return a schema of text."""
    return {"type": "string"} | ({"description": description} if description else {})


def number(description: str = "") -> Schema:
    """Return a schema of a number."""
    return {"type": "number"} | ({"description": description} if description else {})


def whole(description: str = "") -> Schema:
    """Return a schema of a whole number from 0 on."""
    return {"type": "integer", "minimum": 0} | ({"description": description} if description else {})


def truth(description: str = "") -> Schema:
    """Return a schema of true or false."""
    return {"type": "boolean"} | ({"description": description} if description else {})


def one_of(*values: str, description: str = "") -> Schema:
    """Return a schema of one of these texts."""
    return {"enum": list(values)} | ({"description": description} if description else {})


def listed(items: Schema, description: str = "") -> Schema:
    """Return an array of items."""
    return {"type": "array", "items": items} | ({"description": description} if description else {})


def mapped(values: Schema, description: str = "") -> Schema:
    """Return an object whose keys are names."""
    return {"type": "object", "additionalProperties": values} | ({"description": description} if description else {})


def or_null(schema: Schema) -> Schema:
    """Return a schema that null satisfies too; where it stands at the top, the description."""
    inner = dict(schema)
    description = inner.pop("description", "")
    return {"anyOf": [inner, {"type": "null"}]} | ({"description": description} if description else {})


def record(description: str, needed: dict[str, Schema], maybe: dict[str, Schema] | None = None) -> Schema:
    """Return an object with these keys; those of `maybe` need not be there."""
    return {
        "type": "object",
        "description": description,
        "properties": {**needed, **(maybe or {})},
        "required": list(needed),
    }
