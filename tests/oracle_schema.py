"""A part of oracle.py: replies under --schema, against jsonschema's validator."""
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import reference as ref
from reference import check

TREE = {"$ref": "#/$defs/node", "$defs": {"node": {
    "type": "object", "required": ["name", "kids"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 5},
                   "kids": {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/node"}}}}}}
PERSON = {"type": "object", "required": ["name", "age"], "properties": {
    "name": {"type": "string", "minLength": 1, "maxLength": 20},
    "age": {"type": "integer", "minimum": 0, "maximum": 130},
    "email": {"type": "string", "pattern": r"^[\w.]+@[a-z]+\.(com|org)$"}}}
SCHEMAS = [
    True, {}, {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "object"},
    {"type": ["null", "boolean", "integer"]}, TREE, PERSON,
    {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "integer", "minimum": -17, "maximum": 1203},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 101},
    {"type": "number", "minimum": -90, "maximum": 90}, {"type": "number", "minimum": 17},
    {"type": "number", "maximum": 5},
    {"enum": ["red", "green", 5, None, "\u00e9\"\\"]}, {"const": -1.5},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}}]},
    {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer"}]},
    {"allOf": [{"type": "object", "additionalProperties": {"type": "integer", "minimum": 3}}]},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False,
     "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "number"},
     "minItems": 2, "maxItems": 5},
    {"type": "string", "format": "date-time"}, {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"}, {"type": "string", "format": "uri"},
    {"type": "string", "format": "email"}, {"type": "string", "format": "hostname"},
    {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"], "properties": {
        "b": {"type": "boolean"}, "n": {"maximum": 5}}}],
     "$defs": {"a": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 2}}}}},
    {"type": "object", "properties": {"a": {"const": 1}, "ab": {"const": 2}}, "minProperties": 1,
     "additionalProperties": {"type": "null"}},
    {"type": "object", "patternProperties": {"^x-": {"type": "boolean"}}, "maxProperties": 2,
     "additionalProperties": False},
    {"oneOf": [{"type": "object", "required": ["k"], "properties": {"k": {"const": k}, k: {}},
                "additionalProperties": False} for k in ("cat", "dog")]},
    {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [
        {"required": ["a"]}, {"required": ["b"]}]},
    {"type": "string", "pattern": "^[a-z ]{3,6}$"},
    {"type": "string", "pattern": r"^(\+\d{1,3} )?\d{3}-\d{4}$"},
    {"type": "string", "pattern": "cat|^[^a-z\\s]{2,5}\\.?$"},
    {"type": "string", "pattern": "^[x%.-]+.{2}(?:x|yz)*?\\S$"},
]


def reply(program, path, seed):
    story = os.path.join(ref.ROOT, "tests/demo/story-q8.bin")
    run = subprocess.run([program, story, "-q", "--json", "-t", "3", "-n", "200",
                          "-s", str(seed), "--schema", path, "Once"], capture_output=True,
                         text=True, timeout=600)
    return run.stdout if run.returncode == 0 else run.stderr


def test_schema(engine, folder):
    """At a temperature where the model says anything, every reply fits its schema."""
    import jsonschema
    program = os.path.join(folder, "run-schema")
    subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-ffp-contract=off", "-O2", "-w",
                    "-I", ref.ROOT, os.path.join(ref.ROOT, "run.c"),
                    os.path.join(ref.ROOT, "gemma2.c"), "-lm", "-o", program], check=True)
    jobs, began = [], time.time()
    for i, schema in enumerate(SCHEMAS):
        path = os.path.join(folder, f"schema{i}.json")
        with open(path, "w") as f:
            json.dump(schema, f)
        jobs += [(schema, path, seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda job: reply(program, *job[1:]), jobs))
    for (schema, _, seed), text in zip(jobs, said):
        try:
            result = json.loads(text)
            jsonschema.Draft202012Validator(
                schema, format_checker=jsonschema.FormatChecker()).validate(
                    json.loads(result["text"]))
            fits = result["finish_reason"] == "stop"
        except (ValueError, jsonschema.ValidationError):
            fits = False
        check(fits, f"{schema}, seed {seed}: {text[-300:]!r}")
    print(f"schema: {len(jobs)} replies to {len(SCHEMAS)} schemas in {time.time() - began:.0f} s")
