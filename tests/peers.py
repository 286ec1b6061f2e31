#!/usr/bin/env python3
"""The same work through gemma2.c and other engines, side by side.

    python3 tests/peers.py gguf CHECKPOINT OUT.gguf [--type q8_0|q4_0|bf16]
    python3 tests/peers.py random OUT.gguf
    python3 tests/peers.py compare MODEL.bin --peer NAME=PROGRAM:GGUF[:ARGUMENTS] ...
                                   [--works WORK,WORK] [--long] [--runs 3] [--threads 2]
                                   [--json FILE] [--under COMMAND]

`gguf` writes a Hugging Face directory as GGUF (pip install gguf).  llama.cpp itself
requantises q4_0, and its llama-quantize makes other formats from bf16.  `random` writes random
bf16 weights in the shape of build/bench --shape 2b: speed does not depend on their values.

`compare` runs build/bench and run beside any number of peers.  PROGRAM is the llama-bench of
llama.cpp or of ik_llama.cpp (best built natively with clang), or the word llama-cpp-python
for that library.  llama-bench gets ARGUMENTS as they are:

    --peer ik=ik/build/bin/llama-bench:2b-iq4_ks.gguf:'-fa 1 -rtr 1'
    --peer lib=llama-cpp-python:2b-q4_0.gguf

The works (--works selects some by name, --long adds the works of 8000 tokens):

    prefill 512, 2048, 8000      tokens a second of a prompt of that length, one call
    decode at 0, 4096, 8000      tokens a second of 16 tokens after that many others
    first token                  seconds from starting a process to the first token after a
                                 prompt of 20 tokens, with the file in the page cache
    memory                       GiB that the process of "prefill 512" held at its peak

Each number comes from a process of its own.  For every work all engines take turns, --runs
times, so that a machine whose speed drifts treats all alike.  The table shows medians, and
for each work the best peer with the median over the turns of gemma2.c's ratio to it: above 1,
gemma2.c is ahead.  --under puts a command before each process, as in
--under 'taskset -c 0,1'.
"""
import argparse
import ctypes
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}


# ---- gguf -----------------------------------------------------------------------------

def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest[:-1])]}.weight"


def add_config(writer, config):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(config["sliding_window"])


def add_tokenizer(writer, model_file):
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = range(sp.vocab_size())
    kind = lambda i: (3 if sp.is_control(i) else 2 if sp.is_unknown(i) else
                      6 if sp.is_byte(i) else 1)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([sp.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([sp.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    for add, i in ((writer.add_bos_token_id, sp.bos_id()), (writer.add_eos_token_id, sp.eos_id()),
                   (writer.add_unk_token_id, sp.unk_id())):
        add(i)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def add_tensors(writer, checkpoint, kind):
    import gguf
    from safetensors import safe_open
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():
                x = tensors.get_tensor(name).float().numpy()
                if x.ndim == 1:  # GGUF stores 1 + w
                    writer.add_tensor(gguf_name(name), x + 1)
                else:
                    writer.add_tensor(gguf_name(name), gguf.quants.quantize(x, kind),
                                      raw_dtype=kind)


SHAPE = {"max_position_embeddings": 8192, "hidden_size": 2304, "num_hidden_layers": 26,
         "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256, "rms_norm_eps": 1e-6, "sliding_window": 4096, "vocab_size": 256000}


def make_random(args):
    import gguf
    import numpy as np
    d, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    q, kv = (SHAPE["head_dim"] * SHAPE[f"num_{k}_heads"] for k in ("attention", "key_value"))
    shapes = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
              "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}
    noise = np.random.default_rng(1).standard_normal(1 << 20, np.float32) * np.float32(0.02)
    pool = np.resize((noise.view(np.uint32) >> 16).astype(np.uint16), v * d)  # all share it
    bf16 = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(args.out, "gemma2")
    add_config(writer, SHAPE)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<0x{i:02X}>" if i < 256 else f"t{i}" for i in range(v)])
    writer.add_token_scores([0.0] * v)
    writer.add_token_types([6] * 256 + [1] * (v - 256))
    writer.add_bos_token_id(300)
    writer.add_eos_token_id(301)

    def add_matrix(name, rows, cols):
        weights = pool[:rows * cols].reshape(rows, cols)
        writer.add_tensor(name + ".weight", weights.view(np.uint8), raw_dtype=bf16)

    add_matrix("token_embd", v, d)
    writer.add_tensor("output_norm.weight", np.ones(d, np.float32))
    for layer in range(SHAPE["num_hidden_layers"]):
        for name in NAMES.values():
            if name in shapes:
                add_matrix(f"blk.{layer}.{name}", *shapes[name])
            else:
                writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(d, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_gguf(args):
    import gguf
    types = gguf.GGMLQuantizationType
    base = types.BF16 if args.type == "bf16" else types.Q8_0
    out = args.out if args.type != "q4_0" else args.out + ".q8_0"
    writer = gguf.GGUFWriter(out, "gemma2")
    add_config(writer, json.loads((args.checkpoint / "config.json").read_text()))
    add_tokenizer(writer, args.checkpoint / "tokenizer.model")
    add_tensors(writer, args.checkpoint, base)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if args.type == "q4_0":
        import llama_cpp
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = 2, True
        llama_cpp.llama_model_quantize(out.encode(), args.out.encode(), ctypes.byref(params))
        os.unlink(out)


# ---- compare --------------------------------------------------------------------------

DECODED = 16
WORKS = ("prefill 512", "prefill 2048", "decode at 0", "decode at 4096", "first token", "memory")
LONG = ("prefill 8000", "decode at 8000")
LESS_IS_BETTER = ("first token", "memory")
PROMPT = "Far out in the ocean, where the water is as blue as the prettiest cornflower, it"


def run_process(args, command):
    """The command's standard output, seconds from start to end, peak resident memory in GiB."""
    start = time.perf_counter()
    child = subprocess.Popen([*shlex.split(args.under), *map(str, command)],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"exit code {child.returncode}: {shlex.join(map(str, command))}")
    return out, seconds, usage.ru_maxrss / 2**20


class Ours:
    """build/bench, and run for the first token."""

    name = "gemma2.c"

    def __init__(self, args):
        self.args, self.model = args, args.model

    def speed(self, kind, n):
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            _, _, memory = run_process(self.args, [
                ROOT / "build/bench", self.model, "--no-limits", "--runs", 1,
                "--threads", self.args.threads, "--json", out.name,
                "--prefill", n if kind == "prefill" else "none",
                "--decode", n if kind == "decode" else "none"])
            results = json.load(out)["results"]
        if not results:
            sys.exit(f"{self.model}: its context is too short for {kind} {n}")
        return results[0]["median"], memory

    def first_token(self):
        return run_process(self.args, [ROOT / "run", self.model, "-q", "-n", 1, "-t", 0, "-j",
                                       self.args.threads, PROMPT])[1]


class LlamaBench:
    """llama-bench.  Depth is -d N in llama.cpp, -gp N,16 in ik_llama.cpp.  A prompt of 32
    tokens before the measured prompt touches the weights, as build/bench does."""

    def __init__(self, args, name, program, model, more):
        self.args, self.name = args, name
        self.command = [program, "-m", model, "-t", args.threads, "-r", 1, "-o", "json",
                        *shlex.split(more)]
        try:
            usage = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
        except OSError as e:
            sys.exit(f"{program}: {e.strerror}")
        self.has_depth = "--n-depth" in usage
        self.unwarmed = ["--no-warmup"] if "--no-warmup" in usage else ["-w", 0]

    def rows(self, *options):
        out, seconds, memory = run_process(self.args, [*self.command, *options])
        return json.loads(out), seconds, memory

    def speed(self, kind, n):
        if kind == "prefill":
            rows, _, memory = self.rows("-p", f"32,{n}", "-n", 0, *self.unwarmed)
        elif self.has_depth:
            rows, _, memory = self.rows("-p", 0, "-n", DECODED, "-d", n)
        elif n:
            rows, _, memory = self.rows("-p", 0, "-n", 0, "-gp", f"{n},{DECODED}")
        else:
            rows, _, memory = self.rows("-p", 0, "-n", DECODED)
        return rows[-1]["avg_ts"], memory

    def first_token(self):
        return self.rows("-p", 20, "-n", 0, *self.unwarmed)[1]


class LlamaCpp:
    """llama-cpp-python's low-level interface, in a process of its own: library_work."""

    def __init__(self, args, name, model):
        self.args, self.name, self.model = args, name, model

    def process(self, kind, n):
        return run_process(self.args, [sys.executable, __file__, "library", self.model, kind, n,
                                       self.args.threads])

    def speed(self, kind, n):
        out, _, memory = self.process(kind, n)
        return float(out.split()[-1]), memory

    def first_token(self):
        return self.process("first", 20)[1]


def library_context(lib, args):
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(args.model.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = args.n + 64, 512, 512
    params.n_threads = params.n_threads_batch = args.threads
    return lib.llama_init_from_model(model, params), quiet  # quiet must outlive the context


def library_work(args):
    """Prints tokens a second of one work."""
    import llama_cpp as lib
    context, _quiet = library_context(lib, args)

    def seconds(n):
        start = time.perf_counter()
        for at in range(0, n, 512):
            part = [(at + i) * 7919 % 256000 for i in range(min(512, n - at))]
            ids = (lib.llama_token * len(part))(*part)
            lib.llama_decode(context, lib.llama_batch_get_one(ids, len(part)))
        lib.llama_get_logits_ith(context, -1)
        return time.perf_counter() - start

    if args.kind == "first":
        seconds(args.n)
    elif args.kind == "prefill":
        seconds(32)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        print(args.n / seconds(args.n))
    else:
        seconds(max(args.n, 1))
        print(1 / statistics.median(seconds(1) for _ in range(DECODED)))


def make_peer(args, text):
    name, _, rest = text.partition("=")
    program, _, rest = rest.partition(":")
    model, _, more = rest.partition(":")
    if not model:
        sys.exit(f"--peer is NAME=PROGRAM:GGUF[:ARGUMENTS], not {text}")
    if program == "llama-cpp-python":
        return LlamaCpp(args, name, model)
    return LlamaBench(args, name, program, model, more)


def measure(engine, work):
    if work == "first token":
        return engine.first_token()
    if work == "memory":
        return engine.speed("prefill", 512)[1]
    return engine.speed(work.split()[0], int(work.split()[-1]))[0]


def take_turns(args, engines, work):
    """{name: [a value a run]}.  For "first token" one more run warms the page cache first."""
    if work == "first token":
        for engine in engines:
            measure(engine, work)
    values = {engine.name: [] for engine in engines}
    for _ in range(1 if work == "memory" else args.runs):
        for engine in engines:
            values[engine.name].append(measure(engine, work))
    return values


def best_peer(work, values):
    """The best peer's name and the median ratio of gemma2.c to it."""
    ours = values[Ours.name]
    choose, sign = (min, -1) if work in LESS_IS_BETTER else (max, 1)
    name = choose((n for n in values if n != Ours.name),
                  key=lambda n: statistics.median(values[n]))
    return name, statistics.median((x / y) ** sign for x, y in zip(ours, values[name]))


def selected_works(args):
    known = WORKS + LONG
    if args.works:
        works = [w.strip() for w in args.works.split(",")]
        for w in works:
            if w not in known:
                sys.exit(f"no work is named {w}; there are: {', '.join(known)}")
        return works
    return [*WORKS, *(LONG if args.long else ())]


def compare(args):
    works = selected_works(args)
    engines = [Ours(args), *(make_peer(args, text) for text in args.peer)]
    if len({e.name for e in engines}) != len(engines):
        sys.exit("the names of the peers must differ, from each other and from gemma2.c")
    print(f"{args.threads} threads, medians of {args.runs} alternating runs")
    print(f"{'':16}" + "".join(f"{e.name:>14}" for e in engines) + "   ratio to the best peer")
    results = {}
    for work in works:
        values = take_turns(args, engines, work)
        medians = "".join(f"{statistics.median(v):14.2f}" for v in values.values())
        name, ratio = best_peer(work, values)
        results[work] = {"values": values, "best_peer": name, "ratio": ratio}
        print(f"{work:16}{medians}   {ratio:.2f}  {name}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"model": args.model, "peers": args.peer, "threads": args.threads,
                       "works": results}, f, indent=1)


def add_compare(commands):
    p = commands.add_parser("compare")
    p.add_argument("model")
    p.add_argument("--peer", action="append", required=True, metavar="NAME=PROGRAM:GGUF[:ARGS]")
    p.add_argument("--works", metavar="WORK,WORK")
    p.add_argument("--long", action="store_true", help="also with 8000 tokens")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--under", default="", metavar="COMMAND", help="put before each process")
    p.set_defaults(run=compare)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="gguf|random|compare")
    p = commands.add_parser("gguf")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("out")
    p.add_argument("--type", default="q8_0", choices=("q8_0", "q4_0", "bf16"))
    p.set_defaults(run=make_gguf)
    p = commands.add_parser("random")
    p.add_argument("out")
    p.set_defaults(run=make_random)
    add_compare(commands)
    p = commands.add_parser("library")
    p.add_argument("model")
    p.add_argument("kind", choices=("prefill", "decode", "first"))
    p.add_argument("n", type=int)
    p.add_argument("threads", type=int)
    p.set_defaults(run=library_work)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
