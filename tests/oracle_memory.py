"""Memory of a conversion, for oracle.py: a model as wide as 27B, with an adapter of rank 64 on
all its matrices, converts in well under the 4 GB that README promises for any Gemma 2.

By hand, with two layers, all 256,000 rows and quantisation, in a few minutes:

  python3 tests/oracle_memory.py [options of export.py]"""
import json
import os
import struct
import subprocess
import sys
import tempfile
import time

import make_golden
import reference as ref
from oracle_export import EXPORT
from reference import check

WIDTHS = dict(D=4608, N=32, K=16, H=128, F=36864)
GB = 1e9


# ---- files of the right size, which take no room ------------------------------------------


def sparse_safetensors(path, dtype, shapes):
    """{name: shape} as zeros: a header, then a hole."""
    width, at, header = {"BF16": 2, "F32": 4}[dtype], 0, {}
    for name, shape in shapes.items():
        size = width
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)


def matrices(D, N, K, H, F):
    return {"self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H),
            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}


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
    config = ref.hf_config("LG" * (layers // 2) + "L" * (layers % 2), vocab_size=rows,
                           hidden_size=D, num_attention_heads=WIDTHS["N"],
                           num_key_value_heads=WIDTHS["K"], head_dim=WIDTHS["H"],
                           intermediate_size=WIDTHS["F"], query_pre_attn_scalar=144)
    config.save_pretrained(path)
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


# ---- measuring ----------------------------------------------------------------------------


def descendants(pid):
    """The process and all that it started."""
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
    """Bytes resident in several processes; what they share counts once."""
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


def measure(folder, layers, rows, bound, options):
    model, lora = (os.path.join(folder, name) for name in ("27b", "lora"))
    out = os.path.join(folder, "out.bin")
    checkpoint(model, layers, rows)
    adapter(lora, layers, 64)
    status, error, most, processes, seconds = peak(EXPORT + [model, out, "--lora", lora, *options])
    if check(status == 0, f"memory: exit {status}: {error}"):
        check(processes > 2, f"memory: only {processes} processes were seen")
        check(most <= bound, f"memory: {most / GB:.2f} GB resident, allowed {bound / GB:.2f}")
        print(f"memory: {' '.join(options)}: {most / GB:.2f} GB resident at most, "
              f"{os.path.getsize(out) / GB:.2f} GB written in {seconds:.0f} s")
    return most


def test_memory(engine, folder):
    """One layer and few rows, as a conversion holds some slabs of a few tensors at a time: 0.15
    GB.  By hand, with all rows and so all pieces, it is 0.25 GB; more layers add nothing."""
    measure(folder, 1, 512, 0.4 * GB, ["--type", "bf16", "-j", "2"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measure(folder, 2, 256000, 4 * GB, sys.argv[1:] + [
            "--tokenizer", os.path.join(ref.ROOT, "tokenizer.bin")])
    print(f"{check.passed} passed, {check.failed} failed")
