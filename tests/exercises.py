"""Makes each change of tests/exercises.md in a copy of gemma2.c.  The golden test's first failure
must be the page's, except for the size of the deviation: `make test-exercises`, or

  python3 tests/exercises.py [NUMBER ...]"""
import glob
import multiprocessing.pool
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = [os.environ.get("CC", "cc"), "-std=c11", "-O0", "-ffp-contract=off", "-w",
         "-DGOLDEN_ALONE"]


def read_exercises():
    """(title, lines as they are, lines as they become, what the test says) of each."""
    with open(os.path.join(ROOT, "tests", "exercises.md")) as f:
        for part in f.read().split("\n## ")[1:]:
            diff, said = re.search(r"```diff\n(.*?)\n```.*?```\n(.*?)\n```", part, re.S).groups()
            before, after = ("\n".join(line[1:] for line in diff.split("\n") if line[0] in kinds)
                             for kinds in (" -", " +"))
            yield part.split("\n")[0], before, after, said


def build_golden(folder, source):
    """The golden test of this text of gemma2.c, built in folder."""
    os.makedirs(os.path.join(folder, "tests/unit"), exist_ok=True)
    for path in ("gemma2.h", "tests/unit/common.h", "tests/unit/golden.c",
                 *glob.glob("tests/*.h", root_dir=ROOT)):
        shutil.copy(os.path.join(ROOT, path), os.path.join(folder, path))
    with open(os.path.join(folder, "gemma2.c"), "w") as f:
        f.write(source)
    program = os.path.join(folder, "golden")
    subprocess.run([*BUILD, os.path.join(folder, "tests/unit/golden.c"), "-o", program, "-lm"],
                   check=True)
    return program


def first_failure(source):
    """The golden test's first failure with this text of gemma2.c."""
    with tempfile.TemporaryDirectory() as folder:
        p = subprocess.run([build_golden(folder, source)], cwd=ROOT, capture_output=True, text=True)
        return next((line for line in p.stdout.split("\n") if line.startswith("FAIL")), "nothing")


def main():
    with open(os.path.join(ROOT, "gemma2.c")) as f:
        source = f.read()

    def fault(exercise):
        title, before, after, said = exercise
        if source.count(before) != 1:
            return f"{title}: its lines stand {source.count(before)} times in gemma2.c"
        got = first_failure(source.replace(before, after))
        return got.split(" by ")[0] != said.split(" by ")[0] and f"{title}: the test says\n{got}"

    chosen = [e for e in read_exercises() if not sys.argv[1:] or e[0].split(".")[0] in sys.argv[1:]]
    with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
        faults = [f for f in pool.map(fault, chosen) if f]
    for f in faults:
        print("FAIL", f)
    print(f"{len(chosen) - len(faults)} passed, {len(faults)} failed")
    return bool(faults) or not chosen


if __name__ == "__main__":
    sys.exit(main())
