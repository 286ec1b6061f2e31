#!/usr/bin/env python3
"""The same work through gemma2.c and llama.cpp, side by side.

    python3 tests/peers.py gguf CHECKPOINT OUT.gguf [--type q8_0|q4_0|bf16]
    python3 tests/peers.py compare MODEL.bin PEER.gguf [--runs 3] [--threads 2]
                                   [--llama-bench PROGRAM]

`gguf` writes a Hugging Face directory as GGUF (pip install gguf; q4_0 is requantised by
llama.cpp itself).  `compare` alternates short runs of build/bench and of the peer, so that a
machine whose speed drifts treats both alike, and prints medians and the median of the
ratios.  The peer is llama-cpp-python (pip, best built with CC=clang and
CMAKE_ARGS=-DGGML_NATIVE=ON) or a llama-bench program, of llama.cpp or a fork, that you name.
"""
import argparse
import ctypes
import json
import os
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
    kind = lambda i: 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else 1
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
                    writer.add_tensor(gguf_name(name), gguf.quants.quantize(x, kind), raw_dtype=kind)


def make_gguf(args):
    import gguf
    base = gguf.GGMLQuantizationType.BF16 if args.type == "bf16" else gguf.GGMLQuantizationType.Q8_0
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

WORKS = ("prefill 512", "decode at 0")


def run_ours(args):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        subprocess.run([ROOT / "build/bench", args.model, "--quick", "--runs", "1", "--threads",
                        str(args.threads), "--json", out.name], check=True, stdout=subprocess.DEVNULL)
        results = json.load(open(out.name))["results"]
    return {r["work"]: r["median"] for r in results}


def run_llama_bench(args):
    out = subprocess.run([args.llama_bench, "-m", args.peer, "-p", "512", "-n", "16", "-r", "1", "-t",
                          str(args.threads), "-o", "json", *args.bench_args.split()],
                         check=True, capture_output=True, text=True).stdout
    rows = json.loads(out)
    return {"prefill 512": next(r["avg_ts"] for r in rows if r["n_prompt"]),
            "decode at 0": next(r["avg_ts"] for r in rows if r["n_gen"])}


class LlamaCpp:
    """llama-cpp-python's low-level interface, the model loaded once."""

    def __init__(self, args):
        import llama_cpp as lib
        self.lib, self.n = lib, 512
        self.quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(args.peer.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
        params.n_threads = params.n_threads_batch = args.threads
        self.context = lib.llama_init_from_model(model, params)
        self.ids = (lib.llama_token * self.n)(*[2] + [i * 7919 % 256000 for i in range(1, self.n)])
        self.one = (lib.llama_token * 1)(651)

    def seconds(self, ids, n):
        start = time.perf_counter()
        self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, n))
        self.lib.llama_get_logits_ith(self.context, -1)
        return time.perf_counter() - start

    def run(self):
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        prefill = self.n / self.seconds(self.ids, self.n)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        decode = statistics.median(self.seconds(self.one, 1) for _ in range(17))
        return {"prefill 512": prefill, "decode at 0": 1 / decode}


def compare(args):
    if args.llama_bench:
        peer = lambda: run_llama_bench(args)
    else:
        library = LlamaCpp(args)
        peer = library.run
    peer()  # warm the page cache and the peer's own tables
    ours, theirs = [], []
    for _ in range(args.runs):
        ours.append(run_ours(args))
        theirs.append(peer())
    print(f"{'':14}{'gemma2.c':>12}{'peer':>12}{'ratio':>8}   {args.threads} threads, "
          f"medians of {args.runs} alternating runs")
    for work in WORKS:
        a, b = [r[work] for r in ours], [r[work] for r in theirs]
        ratio = statistics.median(x / y for x, y in zip(a, b))
        print(f"{work:14}{statistics.median(a):12.2f}{statistics.median(b):12.2f}{ratio:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("gguf")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("out")
    p.add_argument("--type", default="q8_0", choices=("q8_0", "q4_0", "bf16"))
    p.set_defaults(run=make_gguf)
    p = commands.add_parser("compare")
    p.add_argument("model")
    p.add_argument("peer")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--llama-bench", metavar="PROGRAM")
    p.add_argument("--bench-args", default="", help="further arguments of llama-bench, as one string")
    p.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
