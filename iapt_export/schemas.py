"""JSON Schemas of the files that others may want to read or write, made of the dataclasses that read them here.

The readers check more than a schema can say: names that must agree, hashes, paths. What a schema refuses they refuse.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from docstring_parser import parse_from_object

from iapt_export.contract.manifest import BundleManifest
from iapt_export.contract.tenant_card import SCHEMA_VERSIONS, TenantCard
from trainers.adapters.adapter import METHOD_FIELD, PEFT_TYPES, AdapterConfig
from trainers.methods.configs import METHOD_CONFIGS

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
SIMPLE: dict[Any, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    float: {"type": "number"},
    types.NoneType: {"type": "null"},
    Any: {},
}


def schemas() -> dict[str, Schema]:
    """File name to its schema: a bundle's manifest, a tenant's card, an adapter's configuration."""
    return {
        "manifest.schema.json": _whole(BundleManifest, "manifest.json of a bundle"),
        "tenant.schema.json": _whole(TenantCard, "the metadata iapt_tenant of a tenant's safetensors"),
        "adapter_config.schema.json": _adapter(),
    }


def _whole(cls: type[Any], title: str) -> Schema:
    definitions: dict[str, Schema] = {}
    body = _object(cls, definitions)
    return {"$schema": DIALECT, "title": title, **body, **({"$defs": definitions} if definitions else {})}


def _adapter() -> Schema:
    """One object for each method: its fields stand beside the others, or apart where stock PEFT reads the file too."""
    definitions: dict[str, Schema] = {}
    common = _object(AdapterConfig, definitions, without=("method",))
    choices = []
    for name, config in METHOD_CONFIGS.items():
        own = _object(config, definitions)
        kind = {"peft_type": {"const": name}}
        if name in PEFT_TYPES:
            definitions[config.__name__] = own
            properties = {**common["properties"], **kind, METHOD_FIELD: {"$ref": f"#/$defs/{config.__name__}"}}
            required, others = [*common["required"], METHOD_FIELD], True  # the rest is for stock PEFT
        else:
            properties = {**own["properties"], **common["properties"], **kind}
            required, others = [*common["required"], *own["required"]], False
        fields = {"type": "object", "properties": properties, "required": [*required, "peft_type"]}
        choices.append({"title": name, **fields, "additionalProperties": others})
    title = "adapter_config.json of an adapter that iapt-export trained"
    return {"$schema": DIALECT, "title": title, "oneOf": choices, "$defs": definitions}


def _object(cls: type[Any], definitions: dict[str, Schema], without: tuple[str, ...] = ()) -> Schema:
    """A dataclass as the readers take it: no other fields, and those without a default must be there."""
    hints, told = typing.get_type_hints(cls), _descriptions(cls)
    properties, required = {}, []
    for item in dataclasses.fields(cls):
        if item.name in without:
            continue
        shape = _of_type(hints[item.name], definitions)
        if item.name == "schema_version":
            shape = {"enum": list(SCHEMA_VERSIONS)} if cls is TenantCard else {"const": item.default}
        properties[item.name] = {**shape, **({"description": told[item.name]} if item.name in told else {})}
        is_optional = (item.default, item.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if not is_optional or item.name == "schema_version":
            required.append(item.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _of_type(hint: Any, definitions: dict[str, Schema]) -> Schema:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # known before its fields, which may hold it
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_of_type(argument, definitions) for argument in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return {"type": "array", "items": _of_type(arguments[0], definitions)}
    if origin is tuple:
        items = [_of_type(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(arguments[1], definitions)}
    return dict(SIMPLE[hint])


def _descriptions(cls: type[Any]) -> dict[str, str]:
    """Field to the text below it, those of the classes above included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for item in parse_from_object(base).params:
                if item.description:
                    found[item.arg_name] = " ".join(item.description.split())
    return found
