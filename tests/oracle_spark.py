"""README's recipe for Apache Spark on local cores, against one process: a part of oracle.py."""
import os
import subprocess
import time

import reference as ref
from reference import check

# The recipe runs this script, which notes the program's status.  The first gets one line and is
# ended with SIGKILL once it has answered, while it waits for more.
WORKER = """#!/bin/sh
cd {}
if mkdir first 2>/dev/null; then
    mkfifo held
    {program} "$@" <held >answer &
    exec 9>held
    head -n 1 >&9
    until [ -s answer ]; do sleep 0.05; done
    kill -9 $!
    wait $!
    status=$?
    cat answer
else
    {program} "$@"
    status=$?
fi
echo $status >>ended
exit $status
"""


def recipe():
    """The lines of README that begin with `command = ` and go to the end of their block."""
    with open(os.path.join(ref.ROOT, "README.md")) as f:
        return "command = " + f.read().split("\ncommand = ")[1].split("\n```")[0]


def lines_of(path):
    with open(path) as f:
        return f.read().splitlines()


def test_spark(engine, folder):
    """Two tasks at a time, each retried when its worker dies, give the results of one process."""
    from pyspark.sql import SparkSession
    program = os.path.join(ref.ROOT, "run")
    story = os.path.join(ref.ROOT, "tests/demo/story-q8.bin")
    source, worker = os.path.join(folder, "in.jsonl"), os.path.join(folder, "worker")
    with open(source, "w") as f:
        for i in range(40):
            f.write(f'{{"id": {i}, "prompt": "Caf\u00e9 {i}", "max_tokens": 40, "top_k": 0}}\n')
        f.write('{"id": "bad", "prompt": 5}\n')
    alone = subprocess.run([program, story, "-q", "--batch", source, "-s", "1"],
                           capture_output=True, text=True).stdout
    with open(worker, "w") as f:
        f.write(WORKER.format(folder, program=program))
    os.chmod(worker, 0o755)
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    spark = (SparkSession.builder.master("local[2,2]").config("spark.ui.enabled", "false")
             .config("spark.log.level", "OFF").getOrCreate())
    out = os.path.join(folder, "out")
    code = (recipe().replace("./run model.bin", f"{worker} {story}")
            .replace('"in.jsonl"', repr(source)).replace('"out"', repr(out)))
    began = time.time()
    exec(code, {"spark": spark})
    spark.stop()
    got = [line for name in sorted(os.listdir(out)) if name.startswith("part-")
           for line in lines_of(os.path.join(out, name))]
    ended = lines_of(os.path.join(folder, "ended"))
    check("137" in ended and len(ended) >= 3, f"spark: exit statuses {ended}; one worker was killed")
    check(len(got) == 41 and sorted(got) == sorted(alone.splitlines()),
          f"spark: {len(got)} results differ from those of one process")
    print(f"spark: {len(got)} results, a worker killed, {time.time() - began:.0f} s")
