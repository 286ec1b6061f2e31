"""gemma.cpp's .sbs files for oracle.py.  No package writes them.  The writer here follows
gemma.cpp's io/blob_store.cc (container), io/fields.cc and util/mat.h (toc),
python/convert_from_safetensors.py (how tensors are laid out) and compression/sfp-inl.h
(values)."""
import os
import random
import struct
import unittest.mock

import numpy as np

import make_golden
import reference as ref
from oracle_export import convert
from oracle_gguf import check_same, damaged, export, logits, refused
from reference import check

TYPES = {"F32": 1, "BF16": 2, "SFP": 3, "NUQ": 4, "INT8": 8}
FACTS = dict(layers="L", hidden_size=2304, intermediate_size=16, num_attention_heads=8,
             num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
             max_position_embeddings=8192)  # 2B's, except layers and feed-forward width
PREFIX = {"F32": "F", "BF16": "B", "SFP": "$", "NUQ": "2", "INT8": "I"}


# ---- values ---------------------------------------------------------------------------


def sfp_values():
    """The value of each byte: 3 bits of mantissa from 2^-7 up, 2 bits below."""
    def magnitude(v):
        if v >= 64:
            return (1 + v % 8 / 8) * 2.0 ** (v // 8 - 15)
        return (1 + v % 4 / 4) * 2.0 ** (v // 4 - 23) if v else 0.0
    return np.array([magnitude(b & 127) * (-1 if b & 128 else 1) for b in range(256)], np.float32)


SFP = sfp_values()


def nearest_sfp(x):
    """Bytes of the nearest values; never 128, which gemma.cpp reserves."""
    order = np.delete(np.argsort(SFP, kind="stable"), np.argsort(SFP).tolist().index(128))
    v = SFP[order]
    i = np.searchsorted(v, x).clip(1, len(v) - 1)
    return order[i - (x - v[i - 1] < v[i] - x)].astype(np.uint8)


def encode(kind, w):
    """(bytes, scale, the values that gemma.cpp decodes) of an array."""
    scale, x = 1.0, np.ascontiguousarray(w, np.float32).reshape(-1)
    if kind == "F32":
        return x.tobytes(), scale, x
    if kind == "BF16":
        x = ref.bf16_round(x)
        return (x.view(np.uint32) >> 16).astype("<u2").tobytes(), scale, x
    scale = np.float32(abs(x).max() / 1.875)  # to the largest value of SFP
    b = nearest_sfp(x / scale)
    return b.tobytes(), scale, SFP[b] * scale


# ---- layout of the tensors --------------------------------------------------------------


def laid_out(t, config, joined):
    """{name: array} of a layer whose parts are t[role], as gemma.cpp's converter stacks them."""
    D, N, K, H = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
                  config.head_dim)
    kv = np.stack([t["k"].reshape(K, H, D), t["v"].reshape(K, H, D)], axis=1).reshape(-1, D)
    norms = {"pre_att_ns": t["attn_norm"], "post_att_ns": t["post_attn_norm"],
             "pre_ff_ns": t["ffn_norm"], "post_ff_ns": t["post_ffn_norm"]}
    if joined:
        o = t["o"].reshape(D, N, H).transpose(1, 0, 2).reshape(N * D, H)
        return {"att_ein": o, "gating_ein": np.concatenate([t["gate"], t["up"]]),
                "linear_w": t["down"], "qkv_ein": np.concatenate([t["q"], kv]), **norms}
    return {"att_w": t["o"], "qkv1_w": t["q"], "qkv2_w": kv, "gating1_w": t["gate"],
            "gating2_w": t["up"], "linear_w": t["down"], **norms}


class Model:
    """A random Hugging Face model that holds what the tensors of an .sbs file decode to:
    .data {name: (kind, bytes, scale, rows, cols)}."""

    def __init__(self, kind_of, joined=True, **facts):
        import torch
        self.config = ref.hf_config(**{**FACTS, **facts})
        self.hf = ref.hf_model(self.config, seed=11)
        state = {k: v.numpy() for k, v in self.hf.state_dict().items() if k != "lm_head.weight"}
        where = {k: np.arange(v.size).reshape(v.shape) for k, v in state.items()}
        self.data = {}
        top = {"c_embedding": "model.embed_tokens.weight", "c_final_norm": "model.norm.weight"}
        for name, hf in top.items():
            state[hf] = self.add(name, state[hf], kind_of(name))
        for layer in range(self.config.num_hidden_layers):
            name_of = {r: f"model.layers.{layer}.{n}.weight" for r, n in ref.HF_NAMES.items()}
            base, parts, at = 0, {}, {}
            for role, hf in name_of.items():  # number every weight, to find it again
                parts[role], at[role] = state[hf], where[hf] + base
                base += state[hf].size
            values, flat = laid_out(parts, self.config, joined), np.empty(base, np.float32)
            for name, place in laid_out(at, self.config, joined).items():
                flat[place] = self.add(f"{name}_{layer}", values[name], kind_of(name))
            for role, hf in name_of.items():
                state[hf] = flat[at[role]]
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.original = ref.hf_model(self.config, seed=11)
        self.hf.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})

    def add(self, name, w, kind):
        data, scale, value = encode(kind, w)
        rows, cols = (1, w.size) if w.ndim == 1 else w.shape
        self.data[name] = kind, data, scale, rows, cols
        return value.reshape(w.shape)


# ---- files ----------------------------------------------------------------------------


def text_words(text):
    data = text.encode()
    data += bytes(-len(data) % 4)
    return [len(data) // 4, *struct.unpack("<%dI" % (len(data) // 4), data)]


def real_word(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def group(words):
    return [len(words), *words]


def toc_words(data):
    words = []
    for name, (kind, raw, scale, rows, cols) in data.items():
        size = {"F32": 4, "BF16": 2}.get(kind, 1)
        words += group([*text_words(name), TYPES.get(kind, 5), size, len(raw) // size, rows, cols,
                        real_word(scale), cols])
    return words


def store(path, blobs, second=True):
    """Writes the container in its first or second form."""
    def pad(n):
        return bytes(-n % 256)
    n, at = len(blobs), 256 if second else -(-(16 + 32 * len(blobs)) // 256) * 256
    keys = b"".join(name.encode().ljust(16, b"\0") for name in blobs)
    ranges, payload = b"", b""
    for data in blobs.values():
        ranges += struct.pack("<QQ", at + len(payload), len(data))
        payload += data + pad(len(data))
    directory, size = keys + ranges, at + len(payload)
    if second:
        size += -(size + len(directory) + 16) % 65536 + len(directory) + 16
        whole = struct.pack("<IIQ", 0x0A534253, 0, 65536).ljust(256, b"\0") + payload
        end = directory + struct.pack("<IIQ", 0x0A534253, n, size)
        whole = whole.ljust(size - len(end), b"\0") + end
    else:
        whole = (struct.pack("<IIQ", 0x0A534253, n, size) + directory).ljust(at, b"\0") + payload
    with open(path, "wb") as f:
        f.write(whole)


def write_sbs(path, data, second=True):
    blobs = {name: entry[1] for name, entry in data.items()}
    blobs["config"] = bytes(400)  # the width tells what it says
    blobs["tokenizer"] = make_golden.tiny_tokenizer()
    blobs["toc"] = np.array(toc_words(data), "<u4").tobytes()
    store(path, blobs, second)


# ---- tests ----------------------------------------------------------------------------


def by_size(large, small="BF16"):
    return lambda name: small if name.endswith("_ns") or name.startswith("c_") else large


def test_values():
    check(np.array_equal(export.SFP[np.arange(256) != 128], SFP[np.arange(256) != 128]), "SFP")
    check(not export.SFP[128], "SFP: the reserved byte")


def test_good(engine, folder):
    cases = [  # what, kinds, stacked tensors, second form of the container, logits' distance
        ("bf16", by_size("BF16"), True, True, 0.2), ("f32", by_size("F32", "F32"), False, False, 0),
        ("sfp", by_size("SFP"), True, False, 2), ("sfp apart", by_size("SFP"), False, True, 2)]
    told = []
    for what, kind_of, joined, second, allowed in cases:
        model = Model(kind_of, joined)
        path = os.path.join(folder, what.replace(" ", "-") + ".sbs")
        write_sbs(path, {("" if second else PREFIX[e[0]]) + name: e  # prefixes: early 2025
                         for name, e in model.data.items()}, second)
        check_same(path, model, folder, f"sbs {what}")
        ids = [2] + [random.Random(1).randrange(347) for _ in range(30)]
        got = logits(engine, path + ".bin", ids)
        off = abs(got - ref.hf_logits(model.hf, ids)).max()
        lost = abs(got - ref.hf_logits(model.original, ids)).max()
        check(off <= 1e-4, f"sbs {what}: logits off by {off:.2g}")
        check(lost <= allowed + 1e-4, f"sbs {what}: logits off by {lost:.2g} from the original's")
        told.append(f"{what} {lost:.2g}")
        os.remove(path), os.remove(path + ".bin")
    return ", ".join(told)


def old_layer(rng, c, scale):
    """Random bytes of SFP: ({name: blob}, {our name: values}) of a layer."""
    D, F, q, kv = (c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim,
                   c.num_key_value_heads * c.head_dim)
    shapes = {"q": (q, D), "k": (kv, D), "v": (kv, D), "o": (D, q), "gate": (F, D), "up": (F, D),
              "down": (D, F), **{n: (D,) for n in ref.HF_NAMES if "norm" in n}}
    parts = {n: rng.integers(0, 128, s, dtype=np.uint8) for n, s in shapes.items()}
    blobs = {("B" if b.ndim == 1 else "$") + name: as_bf16(SFP[b]) if b.ndim == 1 else b.tobytes()
             for name, b in laid_out(parts, c, joined=True).items()}
    stacked = {"o": "att_ein", "gate": "gating_ein", "up": "gating_ein", "down": "linear_w"}
    return blobs, {n: (SFP[b] * (np.float32(1) if b.ndim == 1 else scale[stacked.get(n, "qkv_ein")])
                       ).reshape(len(b), -1) for n, b in parts.items()}


def as_bf16(x):
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype("<u2").tobytes()


def old_file(path):
    """Writes a file as before 2025, of 2B's width.  Returns its blobs and their values."""
    rng = np.random.default_rng(2)
    c = ref.hf_config(**{**FACTS, "layers": "LG"})
    scales, blobs, want = rng.uniform(1, 2, (2, 4)).astype("<f4"), {}, {}
    for layer in range(2):
        scale = dict(zip(("att_ein", "qkv_ein", "gating_ein", "linear_w"), scales[layer]))
        theirs, ours = old_layer(rng, c, scale)
        blobs.update({f"{name}_{layer}": b for name, b in theirs.items()})
        want.update({f"layers.{layer}.{name}": w for name, w in ours.items()})
    norm, table = SFP[rng.integers(0, 128, 2304)], SFP[rng.integers(0, 128, (347, 2304))]
    want["final_norm"], want["embedding"] = norm[:, None], table
    blobs.update({"Fc_final_norm": norm.tobytes(), "Bc_embedding": as_bf16(table),
                  "Fscales": scales.tobytes()})
    store(path, blobs, second=False)
    return blobs, want


def test_old(folder):
    """Types are in the names, scales are in order, and shapes follow from the width."""
    path = os.path.join(folder, "2b-it-sfp.sbs")
    blobs, want = old_file(path)
    with open(os.path.join(folder, "tokenizer.spm"), "wb") as f:
        f.write(make_golden.tiny_tokenizer())
    reader = export.Sbs(folder)
    export.check_shapes(reader)
    check(reader.tensors.keys() == want.keys(), "old sbs: names")
    for name, w in want.items():
        rows, tensor = len(w), reader.tensors[name]
        have = np.concatenate([tensor.rows(i, min(i + 112, rows)) for i in range(0, rows, 112)])
        check(np.array_equal(have, w), f"old sbs: {name} differs")
    check((reader.model.L, reader.model.query_scale) == (2, 1 / 16), "old sbs: model")
    check(len(reader.tokenizer()[1]) == 347, "old sbs: tokenizer.spm")
    for name in "Bimg_emb_kernel", "$gr_lin_x_w_0":  # PaliGemma's, Griffin's
        store(path, {**blobs, name: bytes(1152), "Fscales": bytes(848)}, second=False)
        refused(export.Sbs, path, "old sbs of another model", name)
    store(path, {**blobs, "Fscales": blobs["Fscales"][:-4]}, second=False)
    refused(export.Sbs, path, "old sbs, scales", "scales")
    blobs["2linear_w_0"] = blobs.pop("$linear_w_0")
    store(path, blobs, second=False)
    refused(export.Sbs, path, "old sbs, NUQ", "NUQ")
    export.handles.clear()
    os.remove(path)
    os.remove(os.path.join(folder, "tokenizer.spm"))


def test_bad(folder):
    path = os.path.join(folder, "bad.sbs")
    model = Model(by_size("BF16"), hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=16)
    data = model.data
    write_sbs(path, data)
    refused(export.Sbs, path, "sbs of another width", "width 64")
    with unittest.mock.patch.dict(export.RELEASED, {64: (4, 2, 16)}):
        test_bad_tensors(path, data)


def test_bad_tensors(path, good):
    def no(what, *words, data):
        write_sbs(path, {k: v for k, v in {**good, **data}.items() if v is not None})
        refused(export.Sbs, path, "sbs " + what, *words)

    kind, raw, scale, rows, cols = q = good["qkv_ein_0"]
    no("PaliGemma", "img_emb_bias", data={"img_emb_bias": q})
    no("post-norms", "post_ffn_norm", data={"post_ff_ns_0": None})
    no("norms of queries", "key_norm", data={"key_norm_0": q})
    no("missing tensor", "layers.0.q", data={"qkv_ein_0": None})
    no("unknown tensor", "surprise", data={"surprise_0": q})
    no("layer too many", "layers.1.attn_norm", data={"qkv_ein_7": q})
    no("wrong shape", "qkv_ein_0", data={"qkv_ein_0": (kind, raw, scale, rows - 1, cols)})
    no("size of a blob", "qkv_ein_0", data={"qkv_ein_0": (kind, raw[:-2], scale, rows, cols)})
    no("two forms", "twice", data={"gating1_w_0": (kind, bytes(16 * 64 * 2), scale, 16, 64)})
    for other in "NUQ", "INT8":
        no(other, other, "SFP", data={"qkv_ein_0": (other, raw, scale, rows, cols)})
    no("type", "F64", data={"qkv_ein_0": ("F64", raw, scale, rows, cols)})
    no("scale", "table of tensors", data={"qkv_ein_0": (kind, raw, float("inf"), rows, cols)})
    write_sbs(path, {**good, "linear_w_0": (
        "F32", np.full((64, 16), np.nan, "<f4").tobytes(), 1.0, 64, 16)})
    run = convert(path, path + ".bin")
    check(run.returncode == 1 and "layers.0.down" in run.stderr and "NaN" in run.stderr,
          f"sbs NaN: {run.stderr}")
    for second in (False, True):
        write_sbs(path, good, second)
        test_damage(path, second)
    write_sbs(path, good)
    os.truncate(path, os.path.getsize(path) - 100)
    refused(export.Sbs, path, "truncated sbs", "truncated")


def test_damage(path, second):
    """Files cut anywhere, counts and offsets of any size, bytes of directory and toc changed."""
    with open(path, "rb") as f:
        whole = f.read()
    size, n = len(whole), len(export.Sbs(path).blobs)
    for cut in (0, 4, 16, 47, 48, 300, size // 2, size - 16, size - 1):
        damaged(path, whole[:cut], f"sbs of {cut} bytes", True, export.Sbs)
    head = size - 16 if second else 0
    directory = head - 32 * n if second else 16
    fields = [head + 8, directory + 16 * n, directory + 16 * n + 8, directory + 32 * n - 8]
    for at in fields:
        for value in (0, 1 << 63, (1 << 64) - 256, 1 << 40, size):
            if (at, value) != (head + 8, size):
                damaged(path, whole[:at] + struct.pack("<Q", value) + whole[at + 8:],
                        f"sbs with {value} at {at}", True, export.Sbs)
    for count in (n - 1, n + 1, 1 << 14, 1 << 31):
        damaged(path, whole[:head + 4] + struct.pack("<I", count) + whole[head + 8:],
                f"sbs of {count} blobs", True, export.Sbs)
    rng, blobs = random.Random(6), export.read_sbs_blobs(write_back(path, whole))
    places = [(directory, 32 * n), blobs["toc"]]
    for _ in range(200):
        start, length = rng.choice(places)
        i = start + rng.randrange(length)
        damaged(path, whole[:i] + bytes([rng.randrange(256)]) + whole[i + 1:], f"sbs, byte {i}",
                reader=export.Sbs)


def write_back(path, data):
    with open(path, "wb") as f:
        f.write(data)
    return path


def test_sbs(engine, folder):
    folder = os.path.join(folder, "sbs")
    os.makedirs(folder)
    test_values()
    told = test_good(engine, folder)
    test_old(folder)
    test_bad(folder)
    print(f"sbs: logits moved by {told}")
