"""The part of oracle.py about how weights are chosen: what --importance and --effort gain,
measured apart from the exporter, and files of importance that must be refused."""
import os
import shutil
import struct
import subprocess

import numpy as np

import reference as ref
from oracle_export import Checkpoint, convert
from reference import check

import export as exporter

RUN = os.path.join(ref.ROOT, "run")
HEADER = "<8s2I7IIQQ"
TEXT = b"The old witch looked at the boy and said nothing. " * 12

INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down",
         "embedding": "head"}


def moments(path):
    """{(input, layer): M [cols, cols]}, block and tokens of a file of importance, by run.c."""
    with open(path, "rb") as f:
        data = f.read()
    _, _, block, L, D, N, _, H, F, _, _, tokens, _ = struct.unpack_from(HEADER, data)
    names = [(n, l, c) for l in range(L) for n, c in (("q", D), ("o", N * H), ("gate", D),
                                                      ("down", F))] + [("head", 0, D)]
    found, at = {}, 64
    for name, layer, cols in names:
        stored = np.frombuffer(data, "<f4", block * cols, at).reshape(block, cols)
        M = np.zeros((cols, cols))
        for c in range(cols):
            first = c - c % block
            n = min(block, cols - first)
            M[first:first + n, c] = stored[:n, c]
        found[name, layer] = M
        at += 4 * block * cols
    check(at == len(data) and tokens > 0, "importance: size of the file")
    return found, block, tokens


def losses(path, state, M):
    """Sum over rows of e M e^T of every matrix of a file, relative to that of the weights."""
    f, out = ref.Bin(path), {}
    for (role, layer), s in f.sections.items():
        if role not in INPUT:
            continue
        name = "model.embed_tokens" if role == "embedding" else \
            f"model.layers.{layer}.{ref.HF_NAMES[role]}"
        w = state[name + ".weight"].double().numpy()
        e = f.tensor(role, layer) - w
        m = M[INPUT[role], layer]
        out[role, layer] = float(((e @ m) * e).sum() / ((w @ m) * w).sum())
    return out


def gather(model, out, block, text=TEXT):
    p = subprocess.run([RUN, model, "-q", "--importance", out, "--importance-block", str(block),
                        "-C", "64"], input=text, capture_output=True)
    check(p.returncode == 0, f"run --importance: {p.stderr.decode()[-200:]}")


def damped(M, block, tokens):
    """As export.py documents: a part of the mean square more on the diagonal."""
    part = 0.01 + block / tokens
    return {k: m + part * np.trace(m) / len(m) * np.eye(len(m)) for k, m in M.items()}


COMBINATIONS = {1: ("q4", "q6", "q8"), 32: ("q8",), 256: ("q4", "q6")}


def test_gain(c, folder):
    """In the norm that the text gives, knowing it pays, for all types, in every matrix."""
    state, out = c.hf.state_dict(), os.path.join(folder, "weighed.bin")
    for block, kinds in COMBINATIONS.items():
        path = os.path.join(folder, f"importance.{block}")
        gather(os.path.join(folder, "exact.bin"), path, block)
        M, stored, tokens = moments(path)
        check(stored == block, "importance: block of the file")
        for kind in kinds:
            plain = losses(os.path.join(folder, f"{kind}.bin"), state, M)
            run = convert(c.path, out, "--type", kind, "--head", kind, "--importance", path)
            if not check(run.returncode == 0, f"--importance: {run.stderr[-200:]}"):
                continue
            weighed = losses(out, state, M)
            worse = [k for k in plain if weighed[k] > plain[k]]
            check(not worse, f"{kind}, block {block}: importance raises the error of {worse}")
            gain = 1 - sum(weighed.values()) / sum(plain.values())
            check(gain > (0.25 if block > 1 else 0.02), f"{kind}, block {block}: gains {gain:.3f}")
            check_report(run.stdout, losses(out, state, damped(M, block, tokens)),
                         f"{kind}, block {block}")
            print(f"quality: {kind} with importance in blocks of {block}: weighted squared error "
                  f"less by {gain:.1%}")


def test_few_tokens(c, folder):
    """Blocks from a text much shorter than they are wide do no harm on a longer one."""
    state, few = c.hf.state_dict(), os.path.join(folder, "few")
    gather(os.path.join(folder, "exact.bin"), few, 256, TEXT[:8])
    M, _, _ = moments(os.path.join(folder, "importance.256"))
    convert(c.path, few + ".bin", "--type", "q4", "--head", "q4", "--importance", few)
    plain, weighed = (sum(losses(os.path.join(folder, name), state, M).values())
                      for name in ("q4.bin", "few.bin"))
    check(weighed < plain, f"q4, importance of {moments(few)[2]} tokens: {weighed:.4e} of "
          f"{plain:.4e} without")


def check_report(text, weighed, what):
    """The report's relative errors are those measured here."""
    for (role, layer), square in weighed.items():
        name = role if role == "embedding" else f"layers.{layer}.{role}"
        said = next(float(l.split()[-1]) for l in text.splitlines() if l.split()[:1] == [name])
        check(abs(said / square ** 0.5 - 1) < 0.002, f"{what}: report of {name}: {said:.3e}, "
              f"measured {square ** 0.5:.3e}")


def test_effort(c, folder):
    """Wider search leaves less error, on the whole of each type."""
    state, out = c.hf.state_dict(), os.path.join(folder, "effort.bin")
    one = {(n, l): np.eye(s) for n, l, s in (
        (n, l, {"o": 60, "down": 290}.get(n, 300)) for l in (0, 1)
        for n in ("q", "o", "gate", "down", "head"))}
    for kind, efforts in (("q4", "12"), ("q6", "2"), ("q8", "2")):
        before = sum(losses(os.path.join(folder, f"{kind}.bin"), state, one).values())
        for effort in efforts:
            run = convert(c.path, out, "--type", kind, "--head", kind, "--effort", effort)
            check(run.returncode == 0, f"--effort {effort}: {run.stderr[-200:]}")
            after = sum(losses(out, state, one).values())
            check(after < before, f"{kind}: --effort {effort} leaves {after:.4e} of {before:.4e}")
            print(f"quality: {kind} --effort {effort}: squared error less by "
                  f"{1 - after / before:.1%}")


def spoilt(data, what):
    """Files that are no importance of this model."""
    def at(offset, fmt, *values):
        out = bytearray(data)
        struct.pack_into(fmt, out, offset, *values)
        return bytes(out)
    return {
        "empty": b"", "header cut": data[:40], "cut": data[:-4], "longer": data + b"\0" * 4,
        "magic": b"X" + data[1:], "version": at(8, "<I", 2), "block 0": at(12, "<I", 0),
        "block 2^31": at(12, "<I", 1 << 31), "block of another": at(12, "<I", 64),
        "layers": at(16, "<I", 3), "2^32 - 1 layers": at(16, "<I", 2 ** 32 - 1),
        "width": at(20, "<I", 7), "no tokens": at(48, "<Q", 0), "reserved": at(44, "<I", 1),
        "NaN": at(64, "<f", float("nan")), "infinity": at(64, "<f", float("inf")),
        "negative": at(64, "<f", -1.0), "too large": at(64, "<f", 1e20),
        "asymmetric": at(68, "<f", 1e-7)}[what]


REFUSED = ("empty", "header cut", "cut", "longer", "magic", "version", "block 0", "block 2^31",
           "block of another", "layers", "2^32 - 1 layers", "width", "no tokens", "reserved",
           "NaN", "infinity", "negative", "too large", "asymmetric")


def test_refused(c, folder):
    place = os.path.join(folder, "place")
    os.makedirs(place)
    with open(os.path.join(folder, "importance.32"), "rb") as f:
        data = f.read()
    bad, out = os.path.join(folder, "bad"), os.path.join(place, "out.bin")
    reader = exporter.open_checkpoint(c.path)
    exporter.check_shapes(reader)
    for what in REFUSED:
        with open(bad, "wb") as f:
            f.write(spoilt(data, what))
        check(is_refused(bad, reader.model), f"importance, {what}: not refused")
        if what in ("cut", "NaN"):  # seen at the start, seen on the way
            refuse(convert(c.path, out, "--importance", bad), place, f"importance, {what}")
    check(not is_refused(os.path.join(folder, "importance.32"), reader.model), "sound importance")
    refuse(convert(c.path, out, "--importance", bad + ".none"), place, "importance, missing")
    refuse(convert(c.path, out, "--importance", folder), place, "importance, a directory")
    shutil.copy(os.path.join(folder, "importance.32"), out)
    run = convert(c.path, out, "--importance", out)
    check(run.returncode == 1 and os.path.getsize(out) == len(data), "importance as the output")


def is_refused(path, model):
    """Whether opening a file of importance or reading all of it gives a sentence."""
    try:
        importance = exporter.Importance(path, model)
        for key in importance.offsets:
            importance.moments(key)
    except exporter.ExportError as e:
        return path in str(e)
    finally:
        exporter.handles.clear()
    return False


def refuse(run, place, what):
    check(run.returncode == 1 and "Traceback" not in run.stderr and run.stderr.startswith(
        "export.py: ") and run.stderr.count("\n") == 1, f"{what}: {run.returncode}: "
        f"{run.stderr[-300:]}")
    check(not os.listdir(place), f"{what}: leaves {os.listdir(place)}")


def test_quality(engine, folder):
    folder = os.path.join(folder, "quality")
    os.makedirs(folder)
    c = Checkpoint(folder, hidden_size=300, num_attention_heads=6, num_key_value_heads=3,
                   head_dim=10, intermediate_size=290)
    for kind in ("f32", "q4", "q6", "q8"):
        name = "exact" if kind == "f32" else kind
        run = convert(c.path, os.path.join(folder, name + ".bin"), "--type", kind, "--head", kind)
        check(run.returncode == 0, f"quality: {run.stderr[-200:]}")
    types = {role: s["type"] for (role, _), s in
             ref.Bin(os.path.join(folder, "q4.bin")).sections.items() if role in INPUT}
    check([r for r, t in types.items() if t != "q4"] == ["v"], f"--type q4 --head q4: {types}")
    test_gain(c, folder)
    test_few_tokens(c, folder)
    test_effort(c, folder)
    test_refused(c, folder)
