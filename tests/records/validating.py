"""Validates documents against the schemas that lfm2kit ships, with the library `jsonschema`."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from lfm2kit.records.schemas import COMMON, common, schemas


def validator_of(schema: Any) -> Draft202012Validator:
    """Return a validator that finds the schema which the others refer to."""
    there: Any = Registry().with_resource(COMMON, Resource.from_contents(common()))
    return Draft202012Validator(schema, registry=there)


def faults(document: Any) -> list[str]:
    """Return what the schema of a document's kind refuses of it."""
    found = validator_of(schemas()[document["kind"]]).iter_errors(document)
    return [f"{error.json_path}: {error.message[:300]}" for error in found]
