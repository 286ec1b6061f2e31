"""The exporter's command line, pieces and chat templates: a part of oracle.py."""
import os
import shutil
import subprocess
import sys

import reference as ref
from reference import check


def test_without_numpy(folder):
    """Help and wrong usage need no library; the program's name is the one it was called by."""
    path = os.path.join(folder, "gemma2-export")
    shutil.copy(os.path.join(ref.ROOT, "export.py"), path)
    for arguments, status, words in (
            (["--help"], 0, ["usage: gemma2-export", "\n  gemma2-export --tokenizer-only"]),
            (["--version"], 0, ["gemma2-export 0"]), (["one"], 2, ["gemma2-export: error"]),
            (["one", "two", "--type", "q5"], 2, ["gemma2-export: error", "'q8'"]),
            (["one", "two"], 1, ["gemma2-export needs numpy"])):
        run = subprocess.run([sys.executable, "-S", "-I", path, *arguments], capture_output=True,
                             text=True, timeout=60)
        said = run.stdout + run.stderr
        check(run.returncode == status and all(w in said for w in words),
              f"without numpy, {arguments}: {run.returncode}, {said[-300:]!r}")


def test_chat(engine, folder):
    test_without_numpy(folder)
