"""Lines and branches of gemma2.c and run.c that the C tests reach on this CPU: gcc --coverage,
gcov's JSON, a table by section, and with -v the lines not reached or with a branch not taken.
`make coverage` runs it.  It only measures: it fails only if a test fails."""
import gzip
import json
import multiprocessing.pool
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join(ROOT, "build", "coverage")
# -O1 folds the constants in each copy of a kernel's body.  Each copy counts for itself.
FLAGS = ["-std=c11", "-ffp-contract=off", "-fopenmp", "-pthread", "-O1", "-I.", "--coverage",
         "-fprofile-abs-path", "-fprofile-update=atomic"]
PROGRAMS = {  # name: what it is built from, the command that runs it
    "test": (["tests/test.c"], ["sh", "-c", "{0} golden && {0} hosts hostile && {0}"]),
    "test_emulated": (["-DGEMMA2_EMULATE", "tests/test.c"], ["{}"]),
    "fault": (["-D_GNU_SOURCE", "-Dmain=run_main", "-include", "tests/fault.h", "run.c", "gemma2.c",
               "tests/fault.c"], ["{}"]),
    "replay": (["-DREPLAY", "-Dmain=run_main", "tests/fuzz_run.c", "tests/fuzz.c"], ["{}"]),
    "run": (["run.c", "gemma2.c"], ["sh", "tests/cli.sh", "{}"]),
}


def measure(name):
    """Builds and runs one program; returns its last line and whether its tests pass."""
    sources, command = PROGRAMS[name]
    folder = os.path.join(OUT, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    program = os.path.join(folder, name)
    subprocess.run(["gcc", *FLAGS, *sources, "-lm", "-o", program], cwd=ROOT, check=True)
    p = subprocess.run([part.format(program) for part in command], cwd=ROOT, text=True,
                       capture_output=True)
    return (p.stdout.strip().splitlines() or ["no output"])[-1], p.returncode == 0


def read_counts(name, lines, branches, functions):
    """Adds what one program reached: lines and branches of a file by number, and by function."""
    folder = os.path.join(OUT, name)
    notes = [f for f in os.listdir(folder) if f.endswith(".gcno")]
    subprocess.run(["gcov", "--json-format", "--branch-probabilities", *notes], cwd=folder,
                   check=True, stdout=subprocess.DEVNULL)
    for file in (f for f in os.listdir(folder) if f.endswith(".gcov.json.gz")):
        with gzip.open(os.path.join(folder, file)) as f:
            report = json.load(f)
        for source in report["files"]:
            base = os.path.relpath(os.path.join(report["current_working_directory"],
                                                source["file"]), ROOT)
            if base not in ("gemma2.c", "run.c"):
                continue
            for line in source["lines"]:
                key = base, line["line_number"]
                lines[key] = lines.get(key, 0) + line["count"]
                functions[key] = line.get("function_name", "?")
                counts = [b["count"] for b in line["branches"]]
                known = branches.setdefault(key, [0] * len(counts))
                if len(known) == len(counts):  # inlined copies are counted with the others
                    branches[key] = [a + b for a, b in zip(known, counts)]


def sections(file):
    """[(first line, title)] of the banner comments."""
    found, text = [(1, "0")], open(os.path.join(ROOT, file)).read().split("\n")
    for i, line in enumerate(text):
        m = re.match(r" \* ([0-9A]\.? .*)$", line)
        if m and i and text[i - 1].startswith("/* ====="):
            found.append((i, m.group(1).split(",")[0].split(":")[0]))
    return found


def share(part, whole):
    return f"{part:5d} of {whole:5d} {100 * part / whole:6.1f}%" if whole else f"{'':21s}"


def print_table(file, lines, branches):
    starts = sections(file)
    rows = [(title, first, (starts[i + 1:i + 2] or [(1 << 30, "")])[0][0])
            for i, (first, title) in enumerate(starts)]
    print(f"\n{file:34s} {'lines':>20s}  {'branches':>21s}")
    for title, first, end in rows + [("all", 1, 1 << 30)]:
        at = [k for k in lines if k[0] == file and first <= k[1] < end]
        outcomes = [c for k in at for c in branches[k]]
        if at:
            print(f"  {title[:32]:32s} {share(sum(lines[k] > 0 for k in at), len(at))}  "
                  f"{share(sum(c > 0 for c in outcomes), len(outcomes))}")


def print_missed(file, lines, branches, functions, verbose):
    missed = {}
    text = open(os.path.join(ROOT, file)).read().split("\n")
    for key in sorted(k for k in lines if k[0] == file):
        n = sum(c == 0 for c in branches[key]) if lines[key] else 0
        if n or not lines[key]:
            missed.setdefault(functions[key], []).append((key[1], n, lines[key] == 0))
    print(f"\n{file}: branches not taken (lines not reached), by function")
    for name, items in sorted(missed.items(), key=lambda x: x[1][0]):
        print(f"  {name}: {sum(i[1] for i in items)} ({sum(i[2] for i in items)})",
              end="\n" if verbose else ";")
        for number, n, unreached in items if verbose else []:
            print(f"    {number}{' !' if unreached else f' {n}'}: {text[number - 1].strip()[:84]}")
    print()


def main():
    lines, branches, functions, ok = {}, {}, {}, True
    with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
        for name, (line, passed) in zip(PROGRAMS, pool.map(measure, PROGRAMS, chunksize=1)):
            print(f"{name}: {line}")
            ok &= passed
            read_counts(name, lines, branches, functions)
    for file in ("gemma2.c", "run.c"):
        print_table(file, lines, branches)
    for file in ("gemma2.c", "run.c"):
        print_missed(file, lines, branches, functions, "-v" in sys.argv)
    print(f"{int(ok)} passed, {int(not ok)} failed")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
