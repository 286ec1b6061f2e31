"""The part of oracle.py about how weights are chosen: the gain from --importance, measured
apart from the exporter, the importance files that must be refused, and the choices of --size
and --bits."""
import os
import shutil
import struct
import subprocess

import numpy as np

import reference as ref
from oracle_export import Checkpoint, apart, convert
from reference import check

import export as exporter

RUN = os.path.join(ref.ROOT, "run")
HEADER = "<8s2I7IIQQ"
TEXT = b"The old witch looked at the boy and said nothing. " * 12

INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down",
         "embedding": "head"}


def moments(path):
    """{(input, layer): M [cols, cols]}, block and tokens of an importance file that run.c wrote."""
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
    """For each matrix of a file, e its error: e M e^T summed over rows, divided by w M w^T."""
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
    """Adds a part of the mean square to the diagonal, as export.py documents."""
    part = 0.01 + block / tokens
    return {k: m + part * np.trace(m) / len(m) * np.eye(len(m)) for k, m in M.items()}


COMBINATIONS = {1: ("q4", "q6", "q8"), 32: ("q8",), 96: ("q3",), 256: ("q4", "q6")}


def test_gain(c, folder):
    """In the norm that the text defines, importance lowers the error of every type and matrix."""
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
    """Importance from a text much shorter than a block does no harm on a longer text."""
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


def spoilt(data, what):
    """The importance file with one fault, by name."""
    def at(offset, fmt, *values):
        out = bytearray(data)
        struct.pack_into(fmt, out, offset, *values)
        return bytes(out)
    return {
        "empty": b"", "header cut": data[:40], "cut": data[:-4], "longer": data + b"\0" * 4,
        "magic": b"X" + data[1:], "version": at(8, "<I", 2), "block 0": at(12, "<I", 0),
        "block 2^31": at(12, "<I", 1 << 31), "block 48": at(12, "<I", 48),
        "block of another": at(12, "<I", 64),
        "layers": at(16, "<I", 3), "2^32 - 1 layers": at(16, "<I", 2 ** 32 - 1),
        "width": at(20, "<I", 7), "no tokens": at(48, "<Q", 0), "reserved": at(44, "<I", 1),
        "NaN": at(64, "<f", float("nan")), "infinity": at(64, "<f", float("inf")),
        "negative": at(64, "<f", -1.0), "too large": at(64, "<f", 1e20),
        "asymmetric": at(68, "<f", 1e-7)}[what]


def contradicting(data, cols):
    """Moments of three inputs: each pair is possible, all three together are not."""
    out = bytearray(data)
    for r, row in enumerate(((1, 1, -1), (1, 1, 1), (-1, 1, 1))):
        struct.pack_into("<3f", out, 64 + 4 * r * cols, *(1e6 * m for m in row))
        for i in range(3, 32):
            struct.pack_into("<f", out, 64 + 4 * r * cols + 4 * i, 0)
            struct.pack_into("<f", out, 64 + 4 * i * cols + 4 * r, 0)
    return bytes(out)


REFUSED = ("empty", "header cut", "cut", "longer", "magic", "version", "block 0", "block 2^31",
           "block 48", "block of another", "layers", "2^32 - 1 layers", "width", "no tokens",
           "reserved", "NaN", "infinity", "negative", "too large", "asymmetric")


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
        if what in ("cut", "NaN"):  # found at opening, found while reading
            refuse(convert(c.path, out, "--importance", bad), place, f"importance, {what}")
    check(not is_refused(os.path.join(folder, "importance.32"), reader.model), "sound importance")
    with open(bad, "wb") as f:
        f.write(contradicting(data, reader.model.D))
    refuse(convert(c.path, out, "--type", "q4", "--importance", bad), place, "contradicting means")
    refuse(convert(c.path, out, "--importance", bad + ".none"), place, "importance, missing")
    refuse(convert(c.path, out, "--importance", folder), place, "importance, a directory")
    shutil.copy(os.path.join(folder, "importance.32"), out)
    run = convert(c.path, out, "--importance", out)
    check(run.returncode == 1 and os.path.getsize(out) == len(data), "importance as the output")


def is_refused(path, model):
    """Whether opening or reading an importance file fails with a message that names it."""
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


# ---- --size and --bits ----


def chosen(text):
    """{tensor: (type, bytes, relative error)} of a report."""
    rows = [l.split() for l in text.splitlines()]
    return {r[0]: (r[1], int(r[5]), float(r[6])) for r in rows if len(r) == 7 and r[3] == "x"}


def assumed_loss(types, harms):
    """The loss as export.py adds it up, from the errors that its report gives."""
    return sum(harms[name] * error ** 2 for name, (_, _, error) in types.items()
               if "norm" not in name)


def test_sizes(c, folder):
    """A file fits and fills --size, a larger size never loses more, a size too small is refused."""
    place = os.path.join(folder, "sizes")
    os.makedirs(place)
    out = os.path.join(place, "out.bin")
    weigh = ("--importance", os.path.join(folder, "importance.256"))
    ends = []
    for kind in ("q3", "q8"):
        convert(c.path, out, "--type", kind, "--tensor", f"*={kind}")
        ends.append(os.path.getsize(out))
    reader = exporter.open_checkpoint(c.path)
    exporter.check_shapes(reader)
    harms = exporter.harms(exporter.Job(reader, exporter.Importance(weigh[1], reader.model)), True)
    before = None
    for wish in (*np.linspace(ends[0], ends[1], 4).astype(int), 10 ** 12):
        run = convert(c.path, out, "--size", str(wish), *weigh)
        if not check(run.returncode == 0, f"--size {wish}: {run.stderr[-200:]}"):
            continue
        types, size = chosen(run.stdout), os.path.getsize(out)
        check(size <= wish, f"--size {wish}: {size} bytes")
        smaller = min(n for k, (t, n, _) in types.items() if "norm" not in k)
        check(size >= min(wish, ends[1]) - smaller - 64, f"--size {wish} leaves room: {size}")
        loss = assumed_loss(types, harms)
        check(before is None or loss <= before * 1.02, f"--size {wish} loses {loss}, less {before}")
        before = loss
        check({t for t, _, _ in types.values()} <= {"f32", *exporter.LADDER}, f"{wish}: {types}")
    check(facts_of(out).endswith("--size 1000000000000 --importance importance.256"),
          f"--size among the facts: {facts_of(out)}")
    test_bits(c, out, weigh)
    least = int(convert(c.path, out, "--size", "9k").stderr.split("(")[-1].split()[0])
    run = convert(c.path, out, "--size", str(least))
    check(run.returncode == 0 and least - 64 <= os.path.getsize(out) <= least <= ends[0],
          f"--size {least}: {os.path.getsize(out)} bytes {run.stderr[-200:]}")
    os.remove(out)
    for options, says in (
            (("--size", str(least - 1)), f"kB ({least} bytes)"),
            (("--bits", "1.5"), "bits a weight"), (("--type", "q4", "--size", "9M"), "--type"),
            (("--bits", "8", "--size", "9M"), "--bits"), (("--size", "0"), "such as 11G"),
            (("--size", "-3"), "--size"), (("--size", "4x"), "such as 11G"),
            (("--size", "9" * 99), "such as 11G"), (("--bits", "0.9"), "from 1 to 32"),
            (("--bits", "nan"), "from 1 to 32")):
        run = convert(c.path, out, *options)
        check(run.returncode == 2 and says in run.stderr and not os.listdir(place),
              f"{options}: {run.returncode}: {run.stderr[-200:]}")


def test_shares(folder):
    """Each matrix of a layer that adds little to the residual stream gets a smaller type than the
    same matrix of the other layer."""
    c = Checkpoint(os.path.join(folder, "shares"), hidden_size=256, num_attention_heads=4,
                   head_dim=64)
    for norm in ("attention", "feedforward"):
        c.tensors[f"model.layers.0.post_{norm}_layernorm.weight"][:] = -0.98
    out = os.path.join(folder, "shares.bin")
    run = convert(c.write().path, out, "--bits", "6", "--head", "q4")
    level = {name: exporter.LADDER.index(kind) for name, (kind, _, _) in chosen(run.stdout).items()
             if kind != "f32"}
    for role in exporter.INPUTS:
        check(level[f"layers.0.{role}"] < level[f"layers.1.{role}"], f"shares: {role}: {level}")


def facts_of(path):
    f = ref.Bin(path)
    s = f.sections["facts", 0]
    facts = bytes(f.data[s["offset"]:s["offset"] + s["bytes"]])
    start = facts.index(b"export.py ")
    return facts[start:].split(b"\0")[0].split(b"\n")[0].decode()


def test_bits(c, out, weigh):
    """--bits counts all weights, and --tensor and --head override it."""
    for bits in ("7", "9"):
        run = convert(c.path, out, "--bits", bits, *weigh, "--head", "q3", "--tensor",
                      "layers.0.k=bf16")
        types = chosen(run.stdout)
        said = float(run.stdout.split(" bits a weight")[0].split("(")[-1])
        check(run.returncode == 0 and float(bits) - 0.2 < said <= float(bits),
              f"--bits {bits}: {said} {run.stderr[-200:]}")
        check(types["embedding"][0] == "q3" and types["layers.0.k"][0] == "bf16",
              f"--bits {bits}: {types}")


def test_odd_weights(c, folder):
    """Rows of zeros, a matrix of zeros and outliers are measured.  NaN is refused."""
    place = os.path.join(folder, "odd")
    odd = Checkpoint(place, hidden_size=300, num_attention_heads=6, num_key_value_heads=3,
                     head_dim=10, intermediate_size=290)
    out = os.path.join(place, "out.bin")
    name = "model.layers.%d.mlp.%s_proj.weight"
    odd.tensors[name % (0, "up")][::3] = 0
    odd.tensors[name % (1, "up")][:] = 0
    odd.tensors[name % (0, "down")][5, 7] = 1e4
    run = convert(odd.write().path, out, "--bits", "8",
                  "--importance", os.path.join(folder, "importance.256"))
    types = chosen(run.stdout)
    check(run.returncode == 0 and not run.stderr, f"odd weights: {run.stderr[-200:]}")
    check(types["layers.1.up"][::2] == ("q3", 0.0), f"a matrix of zeros: {types['layers.1.up']}")
    for kind in exporter.LADDER:  # in blocks, an outlier's error moves the other weights
        run = convert(odd.path, out, "--type", kind, "--tensor", f"*={kind}", "--importance",
                      os.path.join(folder, "importance.256"))
        check(run.returncode == 0 and not run.stderr, f"odd weights, {kind}: {run.stderr[-200:]}")
        f = ref.Bin(out)
        found = {k: f.tensor(*k) for k in (("up", 0), ("up", 1), ("down", 0))}
        check(all(np.isfinite(w).all() for w in found.values()), f"{kind}, an outlier: finite")
        check(not found["up", 0][::3].any() and not found["up", 1].any()
              and found["up", 0][1::3].any(axis=1).all(), f"{kind}: rows of zeros")
        check(np.abs(found["down", 0][5, 7] / 1e4 - 1) < 0.1, f"{kind}: an outlier is kept")
    odd.tensors[name % (0, "gate")][17, 3] = float("nan")
    os.remove(out)
    there = sorted(os.listdir(place))
    run = convert(odd.write().path, out, "--bits", "8")
    check(run.returncode == 1 and "layers.0.gate holds NaN" in run.stderr
          and sorted(os.listdir(place)) == there, f"NaN: {run.returncode} {run.stderr[-200:]}")
    run = convert(c.path, out, "--bits", "8", "--importance", os.path.join(folder, "bad"))
    check(run.returncode == 1 and sorted(os.listdir(place)) == there, "--bits, importance bad")


# ---- --fisher ----


def test_pass(c):
    """The converter's own pass is transformers', and its head gives the gradient of log p(t)."""
    import torch
    reader = exporter.open_checkpoint(c.path)
    exporter.check_shapes(reader)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, reader.model.V, (2, 40)))
    run, m = exporter.Pass(torch, reader, ids.shape[1]), reader.model
    embedding, head = run.tensor("embedding"), run.tensor("head")
    with torch.no_grad():
        x = embedding[ids] * m.embedding_scale
        for layer in range(m.L):
            x = run.layer(x, run.weights(layer), m.local[layer], {})
        states = run.norm(x, run.tensor("final_norm"))
        want = c.hf.model(ids, use_cache=False).last_hidden_state
        off = float((states - want).abs().max() / want.abs().max())
        check(off < 1e-4, f"--fisher: the pass differs from transformers' by {off:.1e}")
    for x in states[0, 20:23]:
        slopes = torch.autograd.functional.jacobian(lambda x: torch.log_softmax(torch.tanh(
            head @ x / m.final_softcap) * m.final_softcap, 0), x)
        found = run.head(x[None], head)[0]
        off = float((slopes + found).norm(dim=1).min() / found.norm())
        check(off < 1e-3, f"--fisher: the head's gradient is off by {off:.1e}")


def divergence(c, path, ids):
    """KL of a file's predictions from the checkpoint's, run by transformers."""
    import torch
    with torch.no_grad():
        want, got = (torch.log_softmax(m(ids, use_cache=False).logits.double(), -1)
                     for m in (c.hf, ref.hf_from_bin(ref.Bin(path))))
    return float((want.exp() * (want - got)).sum(-1).mean())


def letters(rng):
    return bytes(rng.choice(np.frombuffer(b"aabcdeefghiijklmnoopqrstuuvwxyz    ", np.uint8), 9000))


def ids_of(model, text):
    p = subprocess.run([RUN, model, "-q", "--tokenize"], input=text, capture_output=True)
    check(p.returncode == 0, f"run --tokenize: {p.stderr.decode()[-200:]}")
    return p.stdout


def test_fisher(folder):
    """On other tokens --fisher loses less in the same bytes.  What it cannot use is refused."""
    import torch
    place, out, plain, weights, ids = (os.path.join(folder, n) for n in (
        "fisher", "fisher/out.bin", "plain.bin", "fisher.imp", "some.ids"))
    os.makedirs(place)
    c = Checkpoint(folder, hidden_size=96, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=20, intermediate_size=270, tie_word_embeddings=False)
    test_pass(c)
    rng = np.random.default_rng(2)
    exact, text = os.path.join(folder, "exact.bin"), letters(rng)
    convert(c.path, exact, "--type", "f32")
    gather(exact, weights, 96, text)
    weigh = ("--importance", weights)
    with open(ids, "wb") as f:
        f.write(ids_of(exact, text))
    other = torch.tensor([list(map(int, ids_of(exact, letters(rng)).split()))[:400]])
    convert(c.path, plain, "--type", "q3", *weigh)
    options = c.path, out, "--type", "q3", *weigh, "--fisher", ids
    run = convert(*options)
    if not check(run.returncode == 0, f"--fisher: {run.stderr[-300:]}"):
        return
    a, b = ref.Bin(plain), ref.Bin(out)
    check(all(b.sections[k]["type"] == s["type"] and b.sections[k]["bytes"] == s["bytes"]
              for k, s in a.sections.items() if k[0] != "facts"), "--fisher: another format")
    before, after = divergence(c, plain, other), divergence(c, out, other)
    check(after < 0.92 * before, f"--fisher: KL {before:.5f} -> {after:.5f}")
    print(f"quality: q3 with --fisher: KL on other tokens {before:.4f} -> {after:.4f}")
    convert(*options)
    check(bytes(ref.Bin(out).data) == bytes(b.data), "--fisher: the same twice")
    run = convert(*options, "--keep-vocab", ids)  # rows of embedding and head in another order
    check(run.returncode == 0 and ref.Bin(out).bytes("down", 1) == b.bytes("down", 1),
          f"--fisher and --keep-vocab: other gradients {run.stderr[-200:]}")
    os.remove(out)
    test_fisher_refused(c, folder, place, weights, ids)


def test_fisher_refused(c, folder, place, weights, ids):
    with open(os.path.join(folder, "torch.py"), "w") as f:
        f.write("raise ImportError")
    wrong = {"few": "2 5 7", "words": "2 five " * 40, "outside": "2 347 " * 40, "empty": ""}
    for name, text in wrong.items():
        with open(os.path.join(folder, name), "w") as f:
            f.write(text)
    means = os.path.join(folder, "means.imp")
    gather(os.path.join(folder, "exact.bin"), means, 1)
    weigh = ("--importance", weights)
    for code, options, says in (
            (2, ("--fisher", ids), "--importance"), (1, (*weigh, "--fisher", ids), "needs torch"),
            (2, ("--importance", means, "--fisher", ids), "in blocks"),
            *((1, (*weigh, "--fisher", os.path.join(folder, n)), n) for n in wrong)):
        run = apart(c.path, os.path.join(place, "out.bin"), *options,
                      env={**os.environ, "PYTHONPATH": folder})
        check(run.returncode == code and says in run.stderr and "Traceback" not in run.stderr
              and not os.listdir(place), f"--fisher {options}: {run.returncode}: "
              f"{run.stderr[-200:]} {os.listdir(place)}")


def test_quality(engine, folder):
    folder = os.path.join(folder, "quality")
    os.makedirs(folder)
    c = Checkpoint(folder, hidden_size=300, num_attention_heads=6, num_key_value_heads=3,
                   head_dim=10, intermediate_size=290)
    for kind in ("f32", "q3", "q4", "q6", "q8"):
        name = "exact" if kind == "f32" else kind
        run = convert(c.path, os.path.join(folder, name + ".bin"), "--type", kind, "--head", kind)
        check(run.returncode == 0, f"quality: {run.stderr[-200:]}")
    types = {role: s["type"] for (role, _), s in
             ref.Bin(os.path.join(folder, "q4.bin")).sections.items() if role in INPUT}
    check([r for r, t in types.items() if t != "q4"] == ["v"], f"--type q4 --head q4: {types}")
    test_gain(c, folder)
    test_few_tokens(c, folder)
    test_refused(c, folder)
    test_sizes(c, folder)
    test_shares(folder)
    test_odd_weights(c, folder)
    test_fisher(folder)
