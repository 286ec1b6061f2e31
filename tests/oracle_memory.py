"""Memory of a conversion, for oracle.py: a model as wide as 27B, with an adapter of rank 64 on
all its matrices, converts in less than the 400 MB that README promises for any Gemma 2.

Run by hand, it converts two layers and all 256,000 rows, from any form.  That takes a few
minutes and up to 12 GB of disk and memory.  Only export.py is measured:

  python3 tests/oracle_memory.py safetensors|gguf|sbs|torch|keras|flax [options of export.py]"""
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import types

import numpy as np

import make_golden
import oracle_arrays
import oracle_gguf
import oracle_sbs
import reference as ref
from oracle_export import EXPORT
from reference import check

WIDTHS = dict(D=4608, N=32, K=16, H=128, F=36864)
GB = 1e9


# ---- files of the right size that take no disk space --------------------------------------


def sparse_safetensors(path, dtype, shapes, first=None):
    """Writes {name: shape} as zeros: a header, the {name: bytes} of first, then a hole."""
    width, at, header, first = {"BF16": 2, "F32": 4}[dtype], 0, {}, first or {}
    for name, data in first.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    for name, shape in shapes.items():
        size = width
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(first.values()))
        f.truncate(8 + len(text) + at)


def matrices(D, N, K, H, F):
    return {"self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H),
            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}


def wide_config(layers, rows):
    return ref.hf_config("LG" * (layers // 2) + "L" * (layers % 2), vocab_size=rows,
                         hidden_size=WIDTHS["D"], num_attention_heads=WIDTHS["N"],
                         num_key_value_heads=WIDTHS["K"], head_dim=WIDTHS["H"],
                         intermediate_size=WIDTHS["F"], query_pre_attn_scalar=144,
                         sliding_window=4096)


def checkpoint(path, layers, rows, dtype="BF16"):
    D = WIDTHS["D"]
    os.makedirs(path)
    shapes = {"model.embed_tokens.weight": [rows, D], "model.norm.weight": [D]}
    for i in range(layers):
        for name, shape in matrices(**WIDTHS).items():
            shapes["model.layers.%d.%s.weight" % (i, name)] = list(shape)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes["model.layers.%d.%s_layernorm.weight" % (i, name)] = [D]
    sparse_safetensors(os.path.join(path, "model.safetensors"), dtype, shapes)
    wide_config(layers, rows).save_pretrained(path)
    with open(os.path.join(path, "tokenizer.model"), "wb") as f:
        f.write(make_golden.tiny_tokenizer())


def adapter(path, layers, rank):
    os.makedirs(path)
    shapes = {}
    for i in range(layers):
        for name, (rows, cols) in matrices(**WIDTHS).items():
            key = "base_model.model.model.layers.%d.%s." % (i, name)
            shapes[key + "lora_A.weight"] = [rank, cols]
            shapes[key + "lora_B.weight"] = [rows, rank]
    sparse_safetensors(os.path.join(path, "adapter_model.safetensors"), "F32", shapes)
    with open(os.path.join(path, "adapter_config.json"), "w") as f:
        json.dump({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, f)


# ---- the other forms, written by hand -----------------------------------------------------


class Wide(oracle_arrays.Source):
    """Two layers of 27B's widths in random bf16, 4.9 GB."""

    def __init__(self):
        import torch
        self.facts, self.dtype, self.L = wide_config(2, 256000), "bfloat16", 2
        self.__dict__.update(WIDTHS)
        shapes = {"model.embed_tokens": (256000, self.D), "model.norm": (self.D,)}
        for i in range(self.L):
            at = "model.layers.%d." % i
            shapes.update({at + name: shape for name, shape in matrices(**WIDTHS).items()})
            shapes.update({at + name: (self.D,) for name in ref.HF_NAMES.values()
                           if "norm" in name})
        self.state = {name + ".weight": torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
                      for name, shape in shapes.items()}


def as_gguf(folder):
    """Q4_K, the most common type."""
    rng, data = np.random.default_rng(1), {}
    model = types.SimpleNamespace(config=wide_config(2, 256000), data=data)
    shapes = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), matrices(**WIDTHS).values()))
    for name, role, layer in oracle_gguf.Model.names(model):
        shape = (256000, WIDTHS["D"]) if role == "embedding" else shapes.get(role)
        oracle_gguf.Model.add(model, role, layer, "Q4_K" if shape else "F32", (
            oracle_gguf.random_blocks(rng, "Q4_K", shape, 0.02) if shape
            else np.ones(WIDTHS["D"], np.float32)))
    path = os.path.join(folder, "27b.gguf")
    oracle_gguf.write_gguf(path, model)
    return path


def as_sbs(folder):
    """SFP, whose zeros decode no faster than other values."""
    D, N, K, H, F = (WIDTHS[k] for k in "DNKHF")
    shapes = {"c_embedding": (256000, D), "c_final_norm": (1, D)}
    for i in range(2):
        shapes.update({"%s_%d" % (name, i): shape for name, shape in {
            "att_ein": (N * D, H), "gating_ein": (2 * F, D), "linear_w": (D, F),
            "qkv_ein": ((N + 2 * K) * H, D), "pre_att_ns": (1, D), "post_att_ns": (1, D),
            "pre_ff_ns": (1, D), "post_ff_ns": (1, D)}.items()})
    data = {name: ("SFP", bytes(rows * cols), 1.0, rows, cols)
            for name, (rows, cols) in shapes.items()}
    path = os.path.join(folder, "27b.sbs")
    oracle_sbs.write_sbs(path, data)
    return path


def as_safetensors(folder):
    path = os.path.join(folder, "27b")
    checkpoint(path, 2, 256000)
    return path


FORMS = {
    "safetensors": as_safetensors, "gguf": as_gguf, "sbs": as_sbs,
    "torch": lambda folder: oracle_arrays.save(folder, oracle_arrays.gemma_pytorch(Wide())),
    "keras": lambda folder: oracle_arrays.preset(folder, Wide()),
    "flax": lambda folder: oracle_arrays.kaggle(folder, oracle_arrays.flax_arrays(Wide()))}


# ---- measuring ----------------------------------------------------------------------------


def descendants(pid):
    """The process and all its descendants."""
    found = [pid]
    for p in found:
        try:
            for task in os.listdir("/proc/%d/task" % p):
                with open("/proc/%d/task/%s/children" % (p, task)) as f:
                    found += [int(c) for c in f.read().split() if int(c) not in found]
        except OSError:
            pass  # it ended
    return found


def resident(family):
    """Resident bytes of several processes.  Shared pages count once."""
    total = 0
    for p in family:
        try:
            with open("/proc/%d/smaps_rollup" % p) as f:
                total += sum(int(line.split()[1]) << 10 for line in f if line.startswith("Pss:"))
        except OSError:
            pass
    return total


def peak(command):
    """Exit status, standard error, greatest resident size and number of processes, seconds."""
    began, most, processes = time.time(), 0, 0
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while p.poll() is None:
        family = descendants(p.pid)
        most, processes = max(most, resident(family)), max(processes, len(family))
        time.sleep(0.02)
    return p.returncode, p.stderr.read(), most, processes, time.time() - began


def measure(folder, layers, model, bound, options):
    lora, out = (os.path.join(folder, name) for name in ("lora", "out.bin"))
    adapter(lora, layers, 64)
    for _ in range(3):  # a busy machine may see nothing of the first
        status, error, most, processes, seconds = peak(
            EXPORT + [model, out, "--lora", lora, *options])
        if processes > 2:
            break
    if check(status == 0, f"memory: exit {status}: {error}"):
        check(processes > 2, f"memory: only {processes} processes were seen")
        check(most <= bound, f"memory: {most / GB:.2f} GB resident, allowed {bound / GB:.2f}")
        print(f"memory: {os.path.basename(model)} {' '.join(options)}: {most / GB:.2f} GB resident "
              f"at most, {os.path.getsize(out) / GB:.2f} GB written in {seconds:.0f} s")
    return most


def test_memory(engine, folder):
    """One layer and few rows take 0.15 GB: a conversion holds some slabs of a few tensors at a
    time.  Run by hand, all rows and pieces take 0.25 GB.  More layers add nothing."""
    path = os.path.join(folder, "27b")
    checkpoint(path, 1, 512)
    measure(folder, 1, path, 0.4 * GB, ["--type", "bf16", "-j", "2"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        measure(temporary, 2, FORMS[sys.argv[1]](temporary), 4 * GB, sys.argv[2:] + [
            "--tokenizer", os.path.join(ref.ROOT, "tokenizer.bin")])
    print(f"{check.passed} passed, {check.failed} failed")
