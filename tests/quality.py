#!/usr/bin/env python3
"""What each number format costs: perplexity and divergence on a text, beside llama.cpp's.

    python3 tests/quality.py CHECKPOINT TEXT [--calibration TEXT] [--tokens N] [--peers]
                             [--ggml LIBRARY] [--svg FILE]

CHECKPOINT is a Hugging Face directory (bf16), TEXT plain text that the model was not trained
on.  Importance is gathered from the --calibration text.  Without it, the first half of TEXT
gives importance and the second half is scored.  TEXT is cut into chunks of 512 tokens (fewer
where the context is shorter).  BOS replaces the first token of each chunk, and every later
token is scored given all before it, --tokens in all.

Each variant is made by export.py and run by the engine, in the exact class, keys and values
in f32.  KL is the mean over positions of KL(bf16 || variant) over the whole vocabulary, in
nats; bytes are those of the matrices, head included, and bits are bytes over weights.

--peers (pip install gguf xllamacpp) quantises the same matrices with llama.cpp's own code, in
the types that llama-quantize would choose, with and without its importance matrix: the mean
squares that our engine found on the calibration text.  --ggml names another library that has
ggml_quantize_chunk, such as the libggml-base.so of a build.  The gguf package
dequantises the result, and this engine runs it as f32 weights.  So peers differ in their
weights alone and do not even pay for rounded activations, as our variants do.

--svg draws divergence over bytes.
"""
import argparse
import ctypes
import importlib.util
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

import reference as ref

CHUNK, BATCH = 512, 64
MEANS, BLOCKS, BROAD = "means.imp", "blocks.imp", "broad.imp"

# name, importance, options of export.py (IDS: those of the calibration text); after a mix that is
# PLANNED comes what --size makes in its bytes
VARIANTS = [
    ("bf16", None, "--type bf16"),
    ("q8", None, "--type q8"),
    ("q6", None, "--type q6"),
    ("q4 (head, v q6)", None, "--type q4"),
    ("q4, importance", MEANS, "--type q4"),
    ("q4, importance in blocks", BLOCKS, "--type q4"),
    ("q3 (head, v q6)", None, "--type q3"),
    ("q3, importance", MEANS, "--type q3"),
    ("q3, importance in blocks", BLOCKS, "--type q3"),
    ("q4, importance in blocks of 768", BROAD, "--type q4"),
    ("q3, importance in blocks of 768", BROAD, "--type q3"),
    ("q4, the same, --fisher", BROAD, "--type q4 --fisher IDS"),
    ("q3, the same, --fisher", BROAD, "--type q3 --fisher IDS"),
    ("q3, down q4, in blocks", BLOCKS, "--type q3 --tensor *.down=q4"),
    ("q3, down and o q4, in blocks", BLOCKS, "--type q3 --tensor *.down=q4 --tensor *.o=q4"),
    ("q4, gate and up q3, in blocks", BLOCKS, "--type q4 --tensor *.gate=q3 --tensor *.up=q3"),
    ("q3, head and v q4, in blocks", BLOCKS, "--type q3 --head q4 --tensor *.v=q4"),
    ("q4, up q3, in blocks", BLOCKS, "--type q4 --tensor *.up=q3"),
    ("q4, down q6, in blocks", BLOCKS, "--type q4 --tensor *.down=q6"),
    ("q4, down and o q6, in blocks", BLOCKS, "--type q4 --tensor *.down=q6 --tensor *.o=q6"),
    ("q6, gate and up q4, in blocks", BLOCKS, "--type q6 --tensor *.gate=q4 --tensor *.up=q4"),
    ("q6, importance in blocks", BLOCKS, "--type q6"),
]
PLANNED = "in blocks"

# llama.cpp's mixes: type of the head, of all other matrices, and of the roles that differ
PEERS = {
    "Q8_0": ("Q8_0", "Q8_0", {}),
    "Q4_K_M": ("Q6_K", "Q4_K", {"v": "more", "down": "more"}),
    "IQ4_XS": ("Q6_K", "IQ4_XS", {}),
    "Q3_K_M": ("Q6_K", "Q3_K", {"v": "Q4_K", "down": "Q4_K", "o": "Q4_K"}),
    "Q3_K_S": ("Q6_K", "Q3_K", {}),
    "IQ3_S": ("Q6_K", "IQ3_S", {}),
    "IQ3_XXS": ("Q6_K", "IQ3_XXS", {}),
}


def quiet(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def export(checkpoint, out, *options):
    quiet([sys.executable, Path(ref.ROOT, "export.py"), checkpoint, out, "-q", *options])


# ---- llama.cpp ------------------------------------------------------------------------


class Ggml:
    """llama.cpp's own quantisation, by one of its libraries."""

    def __init__(self, path):
        spec = None if path else importlib.util.find_spec("xllamacpp")
        path = path or spec and next(Path(spec.origin).parent.glob("*.so"), None)
        if not path:
            sys.exit("--peers needs llama.cpp's code: pip install xllamacpp, or --ggml LIBRARY")
        self.quantise = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self.quantise.restype = ctypes.c_size_t
        floats = np.ctypeslib.ndpointer(np.float32, flags="C")
        self.quantise.argtypes = (ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64,
                                  ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

    def rounded(self, w, type_name, weights):
        """w rounded to type_name, and the bytes it takes there."""
        import gguf
        kind = gguf.GGMLQuantizationType[type_name]
        of_block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty((len(w), w.shape[1] // of_block * size), np.uint8)
        done = self.quantise(int(kind), w, out.ctypes.data, 0, *w.shape,
                             None if weights is None else weights.ctypes.data)
        assert done == out.nbytes, (type_name, done)
        return gguf.quants.dequantize(out, kind), done


def peer_type(mix, role, layer, layers):
    head, body, others = PEERS[mix]
    if layer is None:
        return head
    found = others.get(role, body)
    if found == "more":  # the first and the last eighth of layers, and every third between
        eighth = layers // 8
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        found = "Q6_K" if more else body
    return found


def means_by_input(path):
    """{(role of the first matrix, layer): mean squares} of an importance file of block 1."""
    head = struct.unpack_from("<8s2I7IIQQ", data := path.read_bytes())
    L, D, N, _, H, F, _ = head[3:10]
    found, at = {}, 64
    for key, cols in [((n, l), c) for l in range(L) for n, c in (
            ("q", D), ("o", N * H), ("gate", D), ("down", F))] + [(("head", None), D)]:
        found[key] = np.frombuffer(data, "<f4", cols, at).copy()
        at += 4 * cols
    return found


INPUTS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down",
          "embed_tokens": "head"}


def rounded_checkpoint(ggml, checkpoint, out, mix, means, weigh):
    """Writes an f32 checkpoint with the matrices rounded as in a mix, and returns their bytes."""
    from safetensors import safe_open
    from safetensors.numpy import save_file
    out.mkdir()
    for name in ("config.json", "tokenizer.model", "generation_config.json"):
        if (checkpoint / name).exists():
            (out / name).write_bytes((checkpoint / name).read_bytes())
    layers, size = max(l for _, l in means if l is not None) + 1, 0
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, "pt") as f:
            for name in f.keys():
                x = np.ascontiguousarray(f.get_tensor(name).float().numpy())
                if x.ndim == 2:
                    parts = name.split(".")
                    role = parts[-2].removesuffix("_proj")
                    layer = int(parts[2]) if "layers" in parts else None
                    kind = peer_type(mix, role, layer, layers)
                    x, more = ggml.rounded(x, kind, means[INPUTS[role], layer] if weigh
                                           else None)
                    size += more
                tensors[name] = np.ascontiguousarray(x, np.float32)
        save_file(tensors, out / shard.name)
    for index in checkpoint.glob("*.index.json"):
        (out / index.name).write_bytes(index.read_bytes())
    return size


def make_peers(args, folder):
    """(name, path of the f32 file, bytes of matrices) of each peer."""
    ggml, means = Ggml(args.ggml), means_by_input(folder / MEANS)
    for mix in PEERS:
        for weigh in (False, True) if mix in ("Q4_K_M", "Q3_K_M") else (mix != "Q8_0",):
            name = f"llama.cpp {mix}" + (" with imatrix" if weigh else "")
            print("making", name, file=sys.stderr)
            plain = folder / name.replace(" ", "-")
            size = rounded_checkpoint(ggml, args.checkpoint, plain, mix, means, weigh)
            export(plain, str(plain) + ".bin", "--type", "f32")
            yield name, str(plain) + ".bin", size


# ---- measuring ------------------------------------------------------------------------


class Variant:
    def __init__(self, engine, name, path, size=None):
        f = ref.Bin(path)
        matrices = [s for s in f.sections.values() if s["type"] != "bytes" and s["cols"] > 1]
        self.name, self.weights = name, sum(s["rows"] * s["cols"] for s in matrices)
        self.bytes = size or sum(s["bytes"] for s in matrices)
        self.model = ref.Model(engine, path, exact=True)
        self.session = ref.Session(self.model, n_batch=BATCH, n_context=CHUNK, cache_type=1,
                                   n_threads=os.cpu_count())
        self.kl, self.nll = [], []

    def rows(self, ids):
        """Log-probabilities [len(ids), V] in f64."""
        x = self.session.rows(ids).astype(np.float64)
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def measure(self, want, got, following):
        self.kl += (np.exp(want) * (want - got)).sum(-1).tolist()
        self.nll += (-got[np.arange(len(following)), following]).tolist()


def evaluate(variants, ids, n_chunks, length):
    bos = variants[0].model.config.bos
    for c in range(n_chunks):
        print(f"\r{c} of {n_chunks} chunks", end="", file=sys.stderr, flush=True)
        chunk = [bos] + ids[c * length + 1:(c + 1) * length]
        for v in variants:
            v.session.lib.gemma2_rewind(v.session.handle, 0)
        for at in range(0, length - 1, BATCH):
            part = chunk[at:min(at + BATCH, length - 1)]
            want = variants[0].rows(part)
            for v in variants:
                got = want if v is variants[0] else v.rows(part)
                v.measure(want, got, chunk[at + 1:at + 1 + len(part)])
    print("\r", end="", file=sys.stderr)


def table(variants):
    print("| weights | bytes | bits a weight | perplexity | against bf16 | KL to bf16 |\n"
          "|---|---|---|---|---|---|")
    base = np.mean(variants[0].nll)
    for v in variants:
        nll, kl = np.mean(v.nll), np.mean(v.kl)
        print(f"| {v.name} | {v.bytes:,} | {8 * v.bytes / v.weights:.2f} | {np.exp(nll):.3f} | "
              f"{100 * np.expm1(nll - base):+.2f} % | {kl:.5f} +/- "
              f"{np.std(v.kl) / len(v.kl) ** 0.5:.5f} |")


# ---- picture --------------------------------------------------------------------------

STYLE = """text { font: 11px sans-serif; fill: #444 } .axis { stroke: #888; stroke-opacity: 0.4 }
.ours { fill: #1f77b4 } .theirs { fill: #c25e00 } .line { stroke: #1f77b4; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #ccc } .ours { fill: #6cb6ff }
.theirs { fill: #ffa657 } .line { stroke: #6cb6ff } }"""
WIDE, HIGH, LEFT, FOOT = 720, 400, 60, 40


def picture(variants):
    """Divergence (logarithmic) over bytes, with importance: a point for each variant, and a
    line through the variants of --size."""
    shown = [v for v in variants if v.name.endswith(("in blocks", "imatrix", "--size of that"))]
    spots = [(v, v.bytes / 1e6, float(np.mean(v.kl))) for v in shown]
    x_lo, x_hi = min(s[1] for s in spots) * 0.98, max(s[1] for s in spots) * 1.08
    y_lo, y_hi = (math.log10(f(s[2] for s in spots)) for f in (min, max))
    y_lo, y_hi = y_lo - 0.1, y_hi + 0.1

    def at(x, y):
        return (LEFT + (x - x_lo) / (x_hi - x_lo) * (WIDE - LEFT - 10),
                10 + (y_hi - math.log10(y)) / (y_hi - y_lo) * (HIGH - FOOT - 10))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}">',
           f"<style>{STYLE}</style>",
           f'<path class="axis" fill="none" d="M{LEFT} 10V{HIGH - FOOT}H{WIDE - 10}"/>',
           f'<text x="{WIDE / 2:.0f}" y="{HIGH - 6}">MB of matrices</text>',
           f'<text transform="translate(12 {HIGH / 2:.0f}) rotate(-90)">KL to bf16, nats</text>']
    for tick in (t / 5 for t in range(math.ceil(5 * x_lo), math.floor(5 * x_hi) + 1)):
        x, _ = at(tick, 10 ** y_hi)
        out.append(f'<text x="{x - 8:.0f}" y="{HIGH - FOOT + 15}">{tick:g}</text>')
    for tick in (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2):
        if y_lo < math.log10(tick) < y_hi:
            _, y = at(x_lo, tick)
            out.append(f'<text x="22" y="{y + 4:.0f}">{tick:g}</text>'
                       f'<path class="axis" d="M{LEFT} {y:.0f}H{WIDE - 10}"/>')
    line = sorted(s[1:] for s in spots if s[0].name.startswith("--size"))
    out.append('<polyline class="line" points="%s"/>' % " ".join(
        "%.0f,%.0f" % at(*s) for s in line))
    for v, *spot in spots:
        (x, y), whose = at(*spot), "theirs" if "llama.cpp" in v.name else "ours"
        out.append(f'<circle class="{whose}" cx="{x:.0f}" cy="{y:.0f}" r="3"/>')
        if not v.name.startswith("--size"):
            name = re.sub("llama.cpp | with imatrix|, (importance )?in blocks", "", v.name)
            y += 4 if whose == "ours" else -3
            out.append(f'<text class="{whose}" x="{x + 6:.0f}" y="{y:.0f}">{name}</text>')
    x, y = at(line[-1][0], line[-1][1])
    out.append(f'<text class="ours" text-anchor="end" x="{x - 12:.0f}" y="{y + 4:.0f}">'
               '--size, --bits</text>')
    return "\n".join([*out, "</svg>", ""])


def split_text(args):
    """Calibration and evaluation text.  The two halves of one text meet at the end of a line."""
    text = args.text.read_bytes()
    if args.calibration:
        return args.calibration.read_bytes(), text
    half = text.find(b"\n", len(text) // 2) + 1
    return text[:half], text[half:]


def measure(args, folder):
    engine = ref.build_engine(str(folder))
    calibration, text = split_text(args)
    (folder / "calibration.txt").write_bytes(calibration)
    export(args.checkpoint, folder / "bf16.bin", "--type", "bf16")
    for name, block in ((MEANS, 1), (BLOCKS, 256), (BROAD, 768)):
        print("gathering importance, block", block, file=sys.stderr)
        quiet([args.run, folder / "bf16.bin", "--importance", folder / name, "--importance-block",
               block, "-f", folder / "calibration.txt"])
    id_file = folder / "calibration.ids"
    id_file.write_text(quiet([args.run, folder / "bf16.bin", "-q", "--tokenize", "-f",
                              folder / "calibration.txt"]))
    variants = []
    for i, (name, importance, options) in enumerate(VARIANTS):
        print("making", name, file=sys.stderr)
        weigh = ["--importance", folder / importance] if importance else []
        made = folder / f"{i}.bin"
        words = [id_file if o == "IDS" else o for o in options.split()]
        export(args.checkpoint, made, *weigh, *words)
        variants.append(Variant(engine, name, str(made)))
        if name.endswith(PLANNED):
            planned = folder / f"{i}-planned.bin"
            export(args.checkpoint, planned, *weigh, "--size", str(made.stat().st_size))
            variants.append(Variant(engine, "--size of that", str(planned)))
    for peer in make_peers(args, folder) if args.peers else ():
        variants.append(Variant(engine, *peer))
    model = variants[0].model
    length = min(CHUNK, model.config.n_context)
    ids = [model.config.bos] + model.encode(text)
    n_chunks = min(len(ids), max(args.tokens, length)) // length
    if not n_chunks:
        sys.exit(f"the text has {len(ids)} tokens, and a chunk {length}: give a longer one")
    evaluate(variants, ids, n_chunks, length)
    table(variants)
    if args.svg:
        args.svg.write_text(picture(variants))
    print(f"\n{n_chunks} chunks of {length} tokens, {len(variants[0].kl)} scored; importance from "
          f"{len(model.encode(calibration))} tokens of another text.")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--calibration", type=Path, help="text to gather importance from")
    p.add_argument("--tokens", type=int, default=32768, help="of the text, at most")
    p.add_argument("--peers", action="store_true", help="llama.cpp's formats too")
    p.add_argument("--ggml", metavar="LIBRARY", help="with ggml_quantize_chunk, not xllamacpp's")
    p.add_argument("--svg", type=Path, help="a picture of the table, to this file")
    p.add_argument("--run", type=Path, default=Path(ref.ROOT, "run"), help="default: ./run")
    args = p.parse_args()
    if not args.run.exists():
        sys.exit(f"there is no {args.run}: make it first")
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
