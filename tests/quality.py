#!/usr/bin/env python3
"""What each number format costs: perplexity and divergence on a text, beside llama.cpp's.

    python3 tests/quality.py CHECKPOINT TEXT [--calibration TEXT] [--tokens N] [--peers]
                             [--llama-quantize PROGRAM]

CHECKPOINT is a Hugging Face directory (bf16), TEXT plain text that the model was not trained
on.  Importance is gathered from the --calibration text; without one, from the first half of
TEXT, and the second half is the one that counts.  TEXT is cut into chunks of 512 tokens
(fewer where the context is shorter), the first of each replaced by BOS; every token after it
is scored given all before it, --tokens in all.

Each variant is made by export.py and run by the engine, in the exact class, keys and values
in f32.  KL is the mean over positions of KL(bf16 || variant) over the whole vocabulary, in
nats; bytes are those of the matrices, head included, and bits are bytes over weights.

--peers (pip install gguf, and llama-cpp-python unless --llama-quantize names that program)
quantises the same checkpoint with llama.cpp, dequantises it with the gguf package and runs
that as f32 weights in this engine.  So peers differ in their weights alone and do not even
pay for rounded activations, as our variants do.  With the program, Q4_K_M is also made with
an importance matrix: the mean squares that our engine found on the calibration text.
"""
import argparse
import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

import peers
import reference as ref

CHUNK, BATCH = 512, 64
MEANS, BLOCKS = "means.imp", "blocks.imp"  # of --importance, with blocks of 1 and of 256

# name, importance, options of export.py
VARIANTS = [
    ("bf16", None, "--type bf16"),
    ("q8", None, "--type q8"),
    ("q6", None, "--type q6"),
    ("q4 (head, v q6)", None, "--type q4"),
    ("q4, importance", MEANS, "--type q4"),
    ("q4, importance in blocks", BLOCKS, "--type q4"),
    ("q3 (head, v q6)", None, "--type q3"),
    ("q3, importance in blocks", BLOCKS, "--type q3"),
    ("q4, head q4", None, "--type q4 --head q4"),
    ("q4, head q4, importance", MEANS, "--type q4 --head q4"),
    ("q4, head q4, importance in blocks", BLOCKS, "--type q4 --head q4"),
    ("q4, v q4", None, "--type q4 --tensor layers.*.v=q4"),
    ("q4, v q4, importance", MEANS, "--type q4 --tensor layers.*.v=q4"),
    ("q4, v q4, importance in blocks", BLOCKS, "--type q4 --tensor layers.*.v=q4"),
]
PEERS = [("Q8_0", 7, False), ("Q4_0", 2, False), ("Q4_K_M", 15, False), ("Q4_K_M", 15, True)]


def quiet(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip().splitlines()[-1:]}")


def export(checkpoint, out, *options):
    quiet([sys.executable, Path(ref.ROOT, "export.py"), checkpoint, out, "-q", *options])


# ---- llama.cpp ------------------------------------------------------------------------


def write_gguf(checkpoint, out):
    import gguf
    writer = gguf.GGUFWriter(str(out), "gemma2")
    peers.add_config(writer, json.loads((checkpoint / "config.json").read_text()))
    peers.add_tokenizer(writer, checkpoint / "tokenizer.model")
    peers.add_tensors(writer, checkpoint, gguf.GGMLQuantizationType.F32)
    close(writer)


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix(means, out):
    """The mean squares as llama.cpp's llama-imatrix would write them."""
    import gguf
    head = struct.unpack_from("<8s2I7IIQQ", data := means.read_bytes())
    L, D, N, _, H, F, _ = head[3:10]
    tokens, at = head[11], 64
    writer = gguf.GGUFWriter(str(out), "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", -(-tokens // CHUNK))
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    names = [([f"blk.{l}.{n}" for n in group.split()], cols) for l in range(L) for group, cols in (
        ("attn_q attn_k attn_v", D), ("attn_output", N * H), ("ffn_gate ffn_up", D),
        ("ffn_down", F))]
    for group, cols in names + [(["token_embd"], D)]:
        squares = np.frombuffer(data, "<f4", cols, at)[None] * np.float32(tokens)
        at += 4 * cols
        for name in group:
            writer.add_tensor(name + ".weight.in_sum2", squares)
            writer.add_tensor(name + ".weight.counts", np.array([[tokens]], np.float32))
    close(writer)


def quantise(args, source, out, ftype, name, imatrix):
    if args.llama_quantize:
        extra = ["--imatrix", imatrix] if imatrix else []
        return quiet([args.llama_quantize, *extra, source, out, name])
    import llama_cpp
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(),
                                      ctypes.byref(params)):
        sys.exit(f"llama.cpp could not make {name}")


def dequantised(checkpoint, path, out):
    """The GGUF file's matrices in a checkpoint of f32; returns bytes of them and a note on
    the types, which fall back where a row is no multiple of 256."""
    import gguf
    from safetensors import safe_open
    from safetensors.numpy import save_file
    out.mkdir()
    for name in ("config.json", "tokenizer.model", "generation_config.json"):
        if (checkpoint / name).exists():
            (out / name).write_bytes((checkpoint / name).read_bytes())
    stored, size, types = {t.name: t for t in gguf.GGUFReader(path).tensors}, 0, {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, "pt") as f:
            for name in f.keys():
                x = f.get_tensor(name).float().numpy()
                if x.ndim == 2:
                    t = stored[peers.gguf_name(name)]
                    x = gguf.quants.dequantize(t.data, t.tensor_type).reshape(x.shape)
                    size += int(t.n_bytes)
                    types[t.tensor_type.name] = types.get(t.tensor_type.name, 0) + 1
                tensors[name] = np.ascontiguousarray(x, np.float32)
        save_file(tensors, out / shard.name)
    for index in checkpoint.glob("*.index.json"):
        (out / index.name).write_bytes(index.read_bytes())
    return size, " ".join(f"{n} {t}" for t, n in sorted(types.items()))


def make_peers(args, folder):
    """(name, path of the f32 file, bytes of matrices) of each."""
    write_gguf(args.checkpoint, folder / "f32.gguf")
    write_imatrix(folder / MEANS, folder / "imatrix.gguf")
    for name, ftype, weighted in PEERS:
        if weighted and not args.llama_quantize:
            print(f"{name} with importance: not made, it needs --llama-quantize", file=sys.stderr)
            continue
        what = name + (" with imatrix" if weighted else "")
        print("making", what, file=sys.stderr)
        quantise(args, folder / "f32.gguf", folder / "peer.gguf", ftype, name,
                 folder / "imatrix.gguf" if weighted else None)
        plain = folder / ("peer" + what.replace(" ", "-"))
        size, types = dequantised(args.checkpoint, folder / "peer.gguf", plain)
        export(plain, str(plain) + ".bin", "--type", "f32")
        os.remove(folder / "peer.gguf")
        yield f"llama.cpp {what} ({types})", str(plain) + ".bin", size


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


def split_text(args):
    """Calibration and evaluation text; halves part at the end of a line."""
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
    for name, block in ((MEANS, 1), (BLOCKS, 256)):
        print("gathering importance, block", block, file=sys.stderr)
        quiet([args.run, folder / "bf16.bin", "--importance", folder / name, "--importance-block",
               block, "-f", folder / "calibration.txt"])
    variants = []
    for i, (name, importance, options) in enumerate(VARIANTS):
        print("making", name, file=sys.stderr)
        weigh = ["--importance", folder / importance] if importance else []
        export(args.checkpoint, folder / f"{i}.bin", *weigh, *options.split())
        variants.append(Variant(engine, name, str(folder / f"{i}.bin")))
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
    p.add_argument("--llama-quantize", metavar="PROGRAM", help="instead of llama-cpp-python")
    p.add_argument("--run", type=Path, default=Path(ref.ROOT, "run"), help="default: ./run")
    args = p.parse_args()
    if not args.run.exists():
        sys.exit(f"there is no {args.run}: make it first")
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
