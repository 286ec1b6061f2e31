"""Published JSON Schemas and grammars, against what --schema and --grammar make of them.

  python3 tests/schemas.py suite FOLDER       JSON-Schema-Test-Suite/tests/draft2020-12
  python3 tests/schemas.py maskbench FOLDER   guidance-ai/jsonschemabench/maskbench/data
  python3 tests/schemas.py grammars FOLDER    ggml-org/llama.cpp/grammars
  python3 tests/schemas.py numbers 2000       that many random bounds, made by this script

Fetch FOLDER first: it is not kept here.  A schema is refused by name, or takes every valid text
and no other.  Texts are spelled as replies are: compact, with the keys in the schema's order or
their own.  In the suite a schema without a type gets the type that its keywords apply to.
--every N takes each Nth schema, --masks also times a mask before every token of the valid texts,
--replies N also makes so many replies of each schema, of tokens drawn from masks, and has them
judged by jsonschema's validator; --list names refused schemas and wrong answers.  Wrong answers
make the exit status 1."""
import argparse
import collections
import glob
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile

import jsonschema

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Machine:
    """tests/schemas.c, which compiles and matches."""

    def __init__(self):
        self.program = os.environ.get("SCHEMAS")
        if not self.program:
            self.folder = tempfile.TemporaryDirectory()
            self.program = os.path.join(self.folder.name, "schemas")
            subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-O2", "-ffp-contract=off",
                            "-w", "-D_GNU_SOURCE", "tests/schemas.c", "gemma2.c", "-lm", "-o",
                            self.program], cwd=ROOT, check=True)
        self.child = subprocess.Popen([self.program, os.path.join(ROOT, "tokenizer.bin")],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, letter, text):
        text = text.encode("utf-8", "surrogatepass")
        self.child.stdin.write(b"%s %d\n%s" % (letter.encode(), len(text), text))
        self.child.stdin.flush()
        return self.child.stdout.readline().decode("utf-8", "replace").rstrip("\n")


def places(schema, root, seen):
    """The schema and the other schemas that apply to the same value."""
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    yield schema
    also = [each for key in ("allOf", "anyOf", "oneOf") for each in schema.get(key) or []]
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        at = root
        for part in ref[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            at = at[int(part)] if isinstance(at, list) else at.get(part) if at else None
        also.append(at)
    for each in also:
        yield from places(each, root, seen)


def ordered(value, schemas, root):
    """The value with the keys of its objects in the order of the schemas that apply to it."""
    known = [p for s in schemas for p in places(s, root, set())]
    for s in known:
        for each in [s.get("const")] + list(s.get("enum") or []):
            if json.dumps(each, sort_keys=True) == json.dumps(value, sort_keys=True):
                return each
    if isinstance(value, list):
        return [ordered(v, [s["items"] for s in known if isinstance(s.get("items"), dict)] +
                        [s["prefixItems"][i] for s in known
                         if i < len(s.get("prefixItems") or [])], root)
                for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    rank, below = {}, collections.defaultdict(list)
    for s in known:
        properties = s.get("properties")
        for key, each in (properties if isinstance(properties, dict) else {}).items():
            rank.setdefault(key, len(rank))
            below[key].append(each)
        for key in value:
            if key not in (properties or {}) and isinstance(s.get("additionalProperties"), dict):
                below[key].append(s["additionalProperties"])
    keys = sorted(value, key=lambda key: rank.get(key, len(rank)))
    return {key: ordered(value[key], below[key], root) for key in keys}


def whole(v):
    """The value with whole numbers spelled without a fraction."""
    if isinstance(v, dict):
        return {key: whole(each) for key, each in v.items()}
    if isinstance(v, list):
        return [whole(each) for each in v]
    return int(v) if isinstance(v, float) and v == int(v) and abs(v) < 2 ** 63 else v


def spelled(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


KINDS = [("object", "properties required additionalProperties patternProperties minProperties "
                    "maxProperties"),
         ("array", "items prefixItems minItems maxItems"),
         ("number", "minimum maximum exclusiveMinimum exclusiveMaximum"),
         ("string", "minLength maxLength pattern format")]


def typed(schema):
    """The schema; where it names no type, it gets the type that its keywords apply to."""
    if isinstance(schema, list):
        return [typed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: each if key in ("enum", "const") else
           {k: typed(v) for k, v in each.items()}
           if key in ("properties", "patternProperties", "$defs") else typed(each)
           for key, each in schema.items()}
    for kind, words in KINDS:
        if set(words.split()) & set(new) and not {"enum", "const"} & set(new):
            new.setdefault("type", kind)
    return new


def suite(folder):
    paths = glob.glob(os.path.join(folder, "*.json")) + glob.glob(
        os.path.join(folder, "optional/format/*.json"))
    for path in sorted(paths):
        if path == os.path.join(folder, "format.json"):
            continue  # it holds that formats constrain nothing; here they do
        with open(path) as f:
            for group in json.load(f):
                yield (os.path.relpath(path, folder) + ": " + group["description"], group["schema"],
                       [(t["data"], t["valid"]) for t in group["tests"]])


def maskbench(folder):
    for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
        with open(path) as f:
            case = json.load(f)
        yield (os.path.basename(path), case["schema"],
               [(t["data"], t["valid"]) for t in case["tests"]])


def numbers(count):
    """Random bounds and numbers around them, with their validity worked out here."""
    random.seed(1)
    for _ in range(count):
        scale = random.choice([1, 1, 10, 100])
        spread = random.choice([3, 30, 400, 12345])
        def pick():
            return random.randint(-spread, spread) / scale
        kind = random.choice(["integer", "number"])
        schema = {"type": kind}
        for words in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            for word in words:
                if random.random() < 0.45:
                    schema[word] = pick()
        bounds = [v for v in schema.values() if v != kind] or [0]
        values = {round(b + d, 4) for b in bounds
                  for d in (0, 1, -1, .1, -.1, .01, -.01, .001, -.001, 7, -10, 100, -999)}
        values |= {pick() for _ in range(20)}
        yield f"{schema}", schema, [(v, (kind == "number" or v == int(v)) and
                                     schema.get("minimum", v) <= v <= schema.get("maximum", v) and
                                     schema.get("exclusiveMinimum", v - 1) < v and
                                     v < schema.get("exclusiveMaximum", v + 1)) for v in values]


def percent(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, len(values) * p // 100)] if values else 0


def misfits(machine, schema, count):
    """Replies that the validator does not take, each behind what it says."""
    bad = []
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for i in range(count):
        most, text = 10 + 37 * i % 150, ""
        while not text and most < 100000:  # shorter than the shortest
            text, most = machine.ask("R", f"{most} {i}"), 4 * most
        try:
            validator.validate(json.loads(text))
        except (ValueError, RecursionError, jsonschema.ValidationError) as error:
            bad.append((str(error).split("\n")[0], text))
        except jsonschema.exceptions._WrappedReferencingError:
            return []  # it names a schema elsewhere
    return bad


def schemas(cases, options):
    machine, refused, wrong = Machine(), collections.Counter(), []
    compiled = passed = total = valids = invalids = replies = 0
    compile_us, mask_us, slow = [], [], []
    for i, (name, schema, tests) in enumerate(cases):
        if i % options.every:
            continue
        total += 1
        validator = None
        if options.kind == "suite":
            schema = whole(schema)
            validator = jsonschema.Draft202012Validator(
                typed(schema), format_checker=jsonschema.FormatChecker())
        said = machine.ask("S", json.dumps(schema, ensure_ascii=False))
        if not said.startswith("ok "):
            why = re.sub(r"^refused \S+: ", "", said)
            refused[re.sub(r"[0-9]+", "N", why)] += 1
            if options.list:
                print("REFUSED", name, said)
            continue
        compile_us.append(float(said[3:]))
        before = len(wrong)
        for value, valid in tests:
            text = spelled(ordered(whole(value) if valid else value, [schema], schema))
            if valid and name.startswith("optional/format/"):
                continue  # replies use only a part of the texts that a format allows
            if valid and validator and not validator.is_valid(value):
                continue
            if valid and machine.ask("T", text) != "1":  # keys that only some branches name
                text = spelled(whole(value))
            if valid and options.masks:
                said, *times = machine.ask("M", text).split()
                mask_us += map(float, times)
                slow += [(float(t), name) for t in times if float(t) > 1000]
            else:
                said = machine.ask("T", text)[:1]
            valids += valid
            invalids += not valid
            if (said == "1") != valid:
                at = machine.ask("T", text)
                at = at if at != "1" else "0 0"  # other tokens may spell it
                wrong.append((name, "accepted" if said == "1" else "not taken",
                              text if said == "1" else text.encode()[:int(at[2:])].decode(
                                  "utf-8", "replace") + " <HERE> " + text[-60:]))
        compiled += 1
        passed += len(wrong) == before
        replies += options.replies
        for why, text in misfits(machine, schema, options.replies):
            wrong.append((name, "made though invalid: " + why, text))
    print(f"{total} schemas: {compiled} compile ({compiled / total:.1%}), "
          f"{passed} pass ({passed / total:.1%}); {valids} valid texts, {invalids} invalid; "
          f"{sum(w[1] == 'accepted' for w in wrong)} accepted though invalid, "
          f"{sum(w[1] == 'not taken' for w in wrong)} not taken though valid")
    print(f"{replies} replies made, {sum(w[1].startswith('made') for w in wrong)} of them invalid")
    print(f"compiling: median {statistics.median(compile_us):.0f} us, "
          f"99 of 100 within {percent(compile_us, 99):.0f} us, longest {max(compile_us):.0f} us")
    if mask_us:
        print(f"{len(mask_us)} masks: median {percent(mask_us, 50):.1f} us, 99 of 100 within "
              f"{percent(mask_us, 99):.1f} us, longest {max(mask_us):.0f} us")
    if options.list:
        for name, what, text in wrong:
            print("WRONG", what, name, text[-400:])
        for why, n in refused.most_common(60):
            print(f"{n:6} {why}")
        for t, name in sorted(slow)[-20:]:
            print(f"SLOW {t:.0f} us {name}")
    return len(wrong)


def grammars(folder, options):
    machine, bad = Machine(), 0
    for path in sorted(glob.glob(os.path.join(folder, "*.gbnf"))):
        with open(path) as f:
            said = machine.ask("G", f.read())
        bad += not said.startswith("ok ")
        print(os.path.basename(path), said)
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["suite", "maskbench", "grammars", "numbers"])
    parser.add_argument("folder")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--replies", type=int, default=0)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.kind == "grammars":
        return grammars(options.folder, options) != 0
    cases = {"suite": suite, "maskbench": maskbench,
             "numbers": lambda n: numbers(int(n))}[options.kind](options.folder)
    return schemas(cases, options) != 0


if __name__ == "__main__":
    sys.exit(main())
