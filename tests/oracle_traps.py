"""The traps of Gemma 2, each set on purpose: a model file or a copy of gemma2.c is made
wrong in the way that other engines were wrong. The golden test must then fail, with the
message that fits the mistake. A pass here is a caught mistake.

The traps have the numbers of the project's list of known pitfalls.  tests/exercises.md has
those that are not here, 9 among them: the exact GELU instead of tanh.
  1 soft-caps missing             6 window off by one        12 embedding scale not rounded
  2 query scale by head_dim       7 ring of the cache wrong  13 BOS missing
  3 query scale by D / N         10 angles of RoPE in bf16   14 BOS twice
  4 local and global exchanged   11 1 + w added twice        15 <end_of_turn> no stop
  5 window ignored"""
import os
import re
import shutil
import subprocess

import numpy as np

import reference as ref
from exercises import build_golden
from reference import check


def run(program, golden):
    """(exit status, output).  It runs in the root, where tokenizer.bin is."""
    p = subprocess.run([program, golden], cwd=ref.ROOT, capture_output=True, text=True,
                       timeout=600)
    return p.returncode, p.stdout


def expect_caught(what, program, golden, words):
    """The first failure says the words."""
    status, text = run(program, golden)
    said = re.match(rf"FAIL .*({words})", text)
    if check(status == 1 and said, f"trap not caught: {what}: {text[-300:]}"):
        print(f"traps: {what}: \"{said.group(0)[5:75]}\"")


# ---- files made wrong -------------------------------------------------------------------


def exchange(f):
    for i in range(16):
        f.data[128 + i] ^= (1 << min(8, max(0, f.header["L"] - 8 * i))) - 1


def all_global(f):
    f.data[128:256] = bytes(128)


def add_one(role, layer):
    """GGUF files hold 1 + w.  An engine that adds 1 again gets this."""
    def edit(f):
        w = np.frombuffer(bytes(f.bytes(role, layer)), "<f4") + np.float32(1)
        w[f.sections[role, layer]["rows"]:] = 0  # padding
        f.patch(role, layer, w.tobytes())
    return edit


def fields(**values):
    """Sets header fields.  A value may be a function of the header."""
    def edit(f):
        f.set(**{k: v(f.header) if callable(v) else v for k, v in values.items()})
    return edit


def only_eos(f):
    f.set(n_stop=1)
    f.data[264:320] = bytes(56)


FILES = [  # trap, golden model, edit, words of the failure
    ("1 no soft-cap of scores", "both", fields(attn_softcap=0.0), "attn of layer 0"),
    ("1 no soft-cap of scores, 20", "untied", fields(attn_softcap=0.0), "attn of layer 0"),
    ("1 no soft-cap of logits", "both", fields(final_softcap=0.0), "logits at"),
    ("1 a soft-cap where none is", "final", fields(attn_softcap=50.0), "attn of layer 0"),
    ("2 query scale by head_dim", "both", fields(
        query_scale=lambda h: h["H"] ** -0.5), "q of layer 0"),
    ("3 query scale by D / N", "untied", fields(
        query_scale=lambda h: (h["D"] / h["N"]) ** -0.5), "q of layer 0"),
    ("4 local and global exchanged", "both", exchange, "attn of layer 0"),
    ("4 local and global exchanged, long", "long", exchange, "logits at"),
    ("5 window ignored", "both", fields(W=4096), "attn of layer 0"),
    ("5 window ignored, all global", "final", all_global, "attn of layer 0"),
    ("6 window one too wide", "both", fields(W=9), "attn of layer 0"),
    ("6 window one too narrow", "both", fields(W=7), "attn of layer 0"),
    ("6 window one too wide, long", "long", fields(W=9), "logits at"),
    ("12 embedding scale not rounded", "both", fields(
        embedding_scale=lambda h: h["D"] ** 0.5), "embedding of layer 0"),
    ("12 embedding scale not rounded, long", "long", fields(
        embedding_scale=lambda h: h["D"] ** 0.5), "logits at"),
    ("15 <end_of_turn> no stop id", "both", only_eos, "stop ids"),
    ("rope theta", "untied", fields(rope_theta=10000.0), "q of layer 0"),
    ("eps", "untied", fields(eps=1e-6), "attn_norm of layer 0")]
FILES += [(f"11 1 + w added twice, {role}", "both", add_one(role, layer), f"{role} of layer")
          for role, layer in (("attn_norm", 0), ("post_attn_norm", 1), ("ffn_norm", 2),
                              ("post_ffn_norm", 3), ("final_norm", 0))]


def test_files(program, folder):
    for trap, name, edit, words in FILES:
        golden = os.path.join(folder, "wrong")
        shutil.copytree(ref.GOLDEN, golden)
        f = ref.Bin(os.path.join(golden, name + ".bin"))
        edit(f)
        f.write(os.path.join(golden, name + ".bin"))
        expect_caught(trap, program, golden, rf"{name}[,:] .*{words}")
        shutil.rmtree(golden)


# ---- engines made wrong -----------------------------------------------------------------

SOURCES = [  # trap, pattern that stands once in gemma2.c, replacement, words of the failure
    ("7 ring without room for a batch", r"slots = \(int64_t\)s->window \+ s->n_batch;"
     r"((?:.|\n){1,250}?)layer\.slots \+= \(int32_t\)round_up\(MAX_DRAFTS, TILE\);",
     r"slots = (int64_t)s->window;\1;", "attn of layer 0"),
    ("7 ring wraps one group early",
     r"strip = \(from / TILE \+ g\) % a->kv\.keys\.n_strips;",
     "strip = (from / TILE + g) % (a->kv.keys.n_strips > 1 ? a->kv.keys.n_strips - 1 : 1);",
     "attn of layer 0"),
    ("7 slots do not follow the ring", r"slot = \(size_t\)\(position % c->slots\), ",
     "slot = (size_t)(position < c->slots ? position : c->slots - 1), ", "attn of layer 0"),
    ("10 angles in bf16",
     r"float angle = \(float\)row->position \* work->inverse_frequency\[i\];",
     "float angle = (float)row->position * work->inverse_frequency[i]; uint32_t bits; "
     "memcpy(&bits, &angle, 4); bits = (bits + 0x8000) & 0xffff0000; memcpy(&angle, &bits, 4);",
     "q of layer 0"),
    ("10 positions in bf16",
     r"float angle = \(float\)row->position \* work->inverse_frequency\[i\];",
     "float angle = (float)row->position; uint32_t bits; memcpy(&bits, &angle, 4); "
     "bits = (bits + 0x8000) & 0xffff0000; memcpy(&angle, &bits, 4); "
     "angle *= work->inverse_frequency[i];", r"long, .*logits at position 2[59]"),
    ("13 BOS missing", r"emit\(&e, m->config\.bos\);", ";", "BOS is not there once"),
    ("14 BOS twice", r"emit\(&e, m->config\.bos\);",
     "{ emit(&e, m->config.bos); emit(&e, m->config.bos); }", "BOS is not there once"),
    ("15 one stop id", r"i < m->config\.n_stop; i\+\+", "i < 1; i++", "stop ids"),
]


def test_sources(folder, source):
    for trap, pattern, replacement, words in SOURCES:
        found = len(re.findall(pattern, source))
        if check(found == 1, f"trap {trap}: its pattern stands {found} times in gemma2.c"):
            program = build_golden(folder, re.sub(pattern, replacement, source))
            expect_caught(trap, program, ref.GOLDEN, words)


def test_traps(engine, folder):
    with open(os.path.join(ref.ROOT, "gemma2.c")) as f:
        source = f.read()
    program = build_golden(folder, source)
    status, text = run(program, ref.GOLDEN)
    check(status == 0, f"the golden test itself fails: {text[-500:]}")
    test_files(program, folder)
    test_sources(folder, source)
