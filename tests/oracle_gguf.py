"""GGUF files for oracle.py.  The gguf package writes them with the names and shapes of
llama.cpp's converter.  It quantises the weights, or dequantises random blocks of bytes.
The exporter must find the same values, bit for bit."""
import os
import random
import shutil
import struct

import numpy as np

import make_golden
import oracle_export
import reference as ref
from reference import check

import export

GGUF_NAMES = {"attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v",
              "o": "attn_output", "post_attn_norm": "post_attention_norm", "ffn_norm": "ffn_norm",
              "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
              "post_ffn_norm": "post_ffw_norm"}
# Every format of released files, one for each matrix of a model of three layers.
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K",
         "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
         "IQ3_XXS", "IQ3_S"]
# Byte offsets of the f16 scale and minimum in a block
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
          "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
          **dict.fromkeys((k for k in KINDS if k.startswith("IQ")), (0,))}
FACTS = dict(layers="LG", hidden_size=256, intermediate_size=512, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64)


# ---- values ---------------------------------------------------------------------------


def random_blocks(rng, kind, shape, std):
    """A tensor's bytes: random bits, but scales that make the weights spread by about std."""
    import gguf
    t = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[t]
    raw = rng.integers(0, 256, (shape[0] * shape[1] // weights, size), dtype=np.uint8)

    def set_scales(d):
        if kind == "IQ1_M":  # its scale is in the upper bits of four words
            bits = (d * rng.uniform(0.5, 1, len(raw))).astype("<f2").view("<u2")
            words = raw[:, 48:].view("<u2")
            words[:] = words & 0xFFF | (bits[:, None] >> np.arange(0, 16, 4, np.uint16)) << 12
            return
        for at in SCALES[kind]:
            halves = (d * rng.uniform(0.5, 1, len(raw)) * (1 if at == SCALES[kind][0] else 4))
            raw[:, at:at + 2] = halves.astype("<f2").view(np.uint8).reshape(-1, 2)
    set_scales(1)
    spread = gguf.quants.dequantize(raw, t).std()
    set_scales(std / spread)
    return raw.reshape(shape[0], -1)


def encoded(kind, w):
    """w in a plain type, or as the gguf package quantises it."""
    import gguf
    if kind == "F32":
        return w
    if kind == "F16":
        return w.astype(np.float16)
    return gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])


def decoded(kind, data, shape):
    import gguf
    return np.asarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]),
                      np.float32).reshape(shape)


class Model:
    """A random Hugging Face model with exactly the weights of its GGUF tensors,
    .data {GGUF name: (kind, array)}."""

    def __init__(self, kind_of, **facts):
        import torch
        self.config = ref.hf_config(**{**FACTS, **facts})
        self.hf = ref.hf_model(self.config, seed=9)
        self.data, rng = {}, np.random.default_rng(3)
        state = self.hf.state_dict()
        for name, role, layer in self.names():
            w = state[name].numpy()
            if "norm" in role:  # of 12 bits, so that 1 + w keeps them
                w = np.round(w * 1024).astype(np.float32) / 1024 + 0.0  # no -0
                self.add(role, layer, "F32", w + 1)
            else:
                kind = kind_of(role, layer)
                own = kind.startswith("IQ") or kind.endswith("_K")
                data = (random_blocks(rng, kind, w.shape, w.std()) if own else encoded(kind, w))
                self.add(role, layer, kind, data)
                w = decoded(kind, data, w.shape)
            state[name] = torch.from_numpy(w.copy())
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.original = ref.hf_model(self.config, seed=9)
        self.hf.load_state_dict(state)

    def names(self):
        """(Hugging Face's name, role, layer) of every tensor."""
        yield "model.embed_tokens.weight", "embedding", 0
        yield "model.norm.weight", "final_norm", 0
        for layer in range(self.config.num_hidden_layers):
            for role, name in ref.HF_NAMES.items():
                yield f"model.layers.{layer}.{name}.weight", role, layer

    def add(self, role, layer, kind, data):
        top = {"embedding": "token_embd", "final_norm": "output_norm"}
        name = top.get(role) or f"blk.{layer}.{GGUF_NAMES[role]}"
        self.data[name + ".weight"] = kind, data


# ---- files ----------------------------------------------------------------------------


def tiny_vocabulary():
    """tokens, scores, types as they are in tiny.model."""
    pieces = ref.model_pieces(os.path.join(ref.GOLDEN, "tiny.model"))
    return [list(x) for x in zip(*pieces)]


def write_gguf(path, model, vocabulary=None, edit=None, drop=(), big=False, **options):
    """The file that llama.cpp's converter makes of the model; edit(writer) may add keys."""
    import gguf
    c = model.config
    endian = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    arch = options.pop("arch", "gemma2")
    w = gguf.GGUFWriter(path, arch, endianess=endian, **options)
    w.add_name("Tiny model")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_attn_logit_softcapping(c.attn_logit_softcapping)
    w.add_final_logit_softcapping(c.final_logit_softcapping)
    w.add_sliding_window(c.sliding_window)
    add_vocabulary(w, *(vocabulary or tiny_vocabulary()))
    for part in w.kv_data:
        for key in drop:
            part.pop(key, None)
    if edit:
        edit(w)
    for name, (kind, data) in model.data.items():
        w.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def add_vocabulary(w, tokens, scores, types):
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(2), w.add_eos_token_id(1), w.add_unk_token_id(3), w.add_pad_token_id(0)
    w.add_eot_token_id(5)
    w.add_chat_template("{{ bos_token }}template")
    w.add_add_space_prefix(False)


def as_f32(path, out, *options):
    run = oracle_export.convert(path, out, "--type", "f32", *options)
    check(run.returncode == 0, f"{path}: exit {run.returncode}: {run.stderr.strip()}")
    return run


def check_same(path, model, folder, what, *options):
    """The f32 files of path and of the model's Hugging Face directory have the same sections
    but for the facts, bit for bit, and the same header but for the stop ids."""
    hf = os.path.join(folder, "hf")
    ref.save_checkpoint(model.hf, hf, make_golden.tiny_tokenizer())
    as_f32(hf, hf + ".bin", *options)
    as_f32(path, path + ".bin", *options)
    a, b = ref.Bin(hf + ".bin"), ref.Bin(path + ".bin")
    check(list(a.sections) == list(b.sections), f"{what}: sections differ")
    for key in a.sections:
        if key != ("facts", 0):
            check(a.bytes(*key) == b.bytes(*key), f"{what}: {key} differs")
    for header in (a.header, b.header):
        header.pop("file_bytes")
    check(a.header == {**b.header, "stop": a.header["stop"], "n_stop": a.header["n_stop"]},
          f"{what}: header {b.header}, not {a.header}")
    shutil.rmtree(hf)
    os.remove(hf + ".bin")
    return b


# ---- good files -----------------------------------------------------------------------


def test_blocks(folder):
    """In every format any rows of a tensor equal the gguf package's rows of the whole tensor.
    The bits are random, so scales may be NaN and infinite."""
    import gguf
    rng, path = np.random.default_rng(1), os.path.join(folder, "blocks")
    for t in gguf.GGMLQuantizationType:
        weights, size = gguf.GGML_QUANT_SIZES[t]
        shape = 37, 768
        raw = rng.integers(0, 256, shape[0] * shape[1] // weights * size, dtype=np.uint8)
        try:
            with np.errstate(all="ignore"):
                want = gguf.dequantize(raw.reshape(shape[0], -1), t).astype(np.float32)
        except NotImplementedError:
            check(t.name not in KINDS, f"gguf {t.name}: the package cannot decode it")
            continue
        raw.tofile(path)
        export.handles.clear()
        tensor = export.Blocks(path, t.name, shape, 0)
        check(export.Blocks.size(t.name, shape) == len(raw), f"gguf {t.name}: size")
        for start, stop in ((0, 37), (0, 1), (5, 36), (36, 37)):
            have = tensor.rows(start, stop)
            check(have.dtype == np.float32 and same_bits(have, want[start:stop]),
                  f"gguf {t.name}: rows {start} to {stop} differ")
        check(np.isnan(want).mean() < 0.1, f"gguf {t.name}: too many NaN to compare")
    export.handles.clear()


def same_bits(a, b):
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(
        a[~nan].view(np.uint32), b[~nan].view(np.uint32))


def test_every_type(engine, folder):
    """A model with a matrix of every type: the file's weights and the engine's logits."""
    kinds = iter(KINDS)
    model = Model(lambda role, layer: next(kinds), layers="LGL")
    path = os.path.join(folder, "every.gguf")
    write_gguf(path, model)
    f = check_same(path, model, folder, "gguf of every type")
    check(f.header["stop"] == [1, 5], f"gguf: stops {f.header['stop']}")
    check(f.facts().get("chat_template") == "{{ bos_token }}template", "gguf: chat template")
    check(f.facts().get("name") == "Tiny model", "gguf: name")
    ids = [2] + [random.Random(1).randrange(347) for _ in range(30)]
    off = abs(logits(engine, path + ".bin", ids) - ref.hf_logits(model.hf, ids)).max()
    check(off <= 1e-4, f"gguf of every type: logits off by {off:.2g}")
    split_files(model, folder)
    return f"logits of all types off by {off:.2g}"


def logits(engine, path, ids):
    model = ref.Model(engine, path)
    session = ref.Session(model, n_batch=len(ids), cache_type=1)
    out = session.rows(ids)
    session.close(), model.close()
    return out


def split_files(model, folder):
    """Parts as gguf-split writes them.  The argument is any part or their directory."""
    place = os.path.join(folder, "split")
    os.makedirs(place)
    write_gguf(os.path.join(place, "m.gguf"), model, split_max_tensors=12)
    parts = sorted(os.listdir(place))
    check(len(parts) == 3 and parts[0] == "m-00001-of-00003.gguf", f"gguf: parts {parts}")
    out = os.path.join(folder, "out.bin")
    for given in (place, os.path.join(place, parts[1])):
        as_f32(given, out)
        a, b = ref.Bin(out), ref.Bin(os.path.join(folder, "every.gguf.bin"))
        check(a.sections.keys() == b.sections.keys() and all(
            a.bytes(*k) == b.bytes(*k) for k in a.sections if k != ("facts", 0)),
            "gguf: split files differ from one")
    os.rename(os.path.join(place, parts[2]), os.path.join(place, "gone"))
    bad(place, "missing part", "1 to 3", "fetch the others")
    shutil.move(os.path.join(place, parts[1]), os.path.join(folder, "part.gguf"))
    bad(os.path.join(folder, "part.gguf"), "a part alone", "part")
    shutil.rmtree(place)


def test_q8_0(engine, folder):
    """How far Q8_0 moves the logits of the unquantised model."""
    model = Model(lambda role, layer: "Q8_0", num_attention_heads=2, head_dim=32,
                  num_key_value_heads=1, query_pre_attn_scalar=32)
    path = os.path.join(folder, "q8_0.gguf")
    write_gguf(path, model)
    check_same(path, model, folder, "gguf Q8_0")
    ids = [2] + [random.Random(2).randrange(347) for _ in range(30)]
    off = abs(logits(engine, path + ".bin", ids) - ref.hf_logits(model.original, ids)).max()
    check(off <= 0.6, f"gguf Q8_0: logits off by {off:.2g} from the original's")
    return f"Q8_0 moves logits by {off:.2g}"


def test_norms():
    """A GGUF norm is 1 + w.  Subtracting 1 loses nothing: the engine's 1 + w restores the norm."""
    rng = np.random.default_rng(5)
    w = np.concatenate([rng.normal(0, s, 20000) for s in (1e-3, 0.1, 1, 30)]).astype(np.float32)
    stored = w + np.float32(1)
    check(np.array_equal((stored - np.float32(1)) + np.float32(1), stored), "gguf: norms")
    bf16 = ref.bf16_round(w)
    kept = abs(bf16) >= 2.0 ** -16
    check(np.array_equal(((bf16 + np.float32(1)) - np.float32(1))[kept], bf16[kept]),
          "gguf: bf16 norms")


def test_facts(folder):
    """Keys that old files lack, and the query scale, which no file has."""
    model = Model(lambda role, layer: "BF16")
    path = os.path.join(folder, "old.gguf")
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    write_gguf(path, model, drop=["gemma2." + k for k in keys])
    m = export.Gguf(path).model
    check((m.attn_softcap, m.final_softcap, m.window) == (50, 30, 4096), "gguf: old file's facts")
    check(m.query_scale == 0.125 and m.local == (True, False), "gguf: facts")
    own = {"output.weight": ("F32", np.ones((347, 256), np.float32))}
    write_gguf(path, with_data(model, **own), drop=["tokenizer.ggml.tokens"])
    reader = export.Gguf(path)
    export.check_shapes(reader), export.settle_head(reader)
    check("head" in reader.tensors, "gguf: a head of its own")
    check(reader.tokenizer() == (None, None), "gguf: no vocabulary")
    for D, N, H, L, want in ((4608, 32, 128, 2, 144), (4608, 32, 128, 46, 144),
                             (2304, 8, 256, 46, 256), (3584, 16, 256, 60, 256)):
        sizes = {"block_count": L, "embedding_length": D, "feed_forward_length": 64,
                 "attention.head_count": N, "attention.head_count_kv": N // 2,
                 "attention.key_length": H}
        facts = {"gemma2." + k: v for k, v in sizes.items()}
        m = export.model_of_gguf(export.Config("x", {"general.architecture": "gemma2", **facts}))
        check(m.query_scale == float(np.float32(want ** -0.5)), f"gguf: scale of {D}, {L} layers")


# ---- the tokenizer --------------------------------------------------------------------


def converter_vocabulary(pieces, with_config):
    """Gemma's vocabulary as llama.cpp's converter writes it.  The converter learns which pieces
    are user-defined from tokenizer_config.json alone, not from SentencePiece."""
    types = [ref.NORMAL if k in (ref.USER, ref.MARKER) else k for _, _, k in pieces]
    tokens, scores = [t for t, _, _ in pieces], [s for _, s, _ in pieces]
    for i in (*range(217), *range(255968, 256000)) if with_config else ():
        text = tokens[i].decode()
        special = i in (0, 1, 2, 3, 106, 107) or text in ("<mask>", "<2mass>", "[@BOS@]")
        special = special or text.startswith("<unused")
        types[i] = ref.CONTROL if special else ref.USER
        scores[i] = -1000.0
        tokens[i] = text.encode() if special else text.replace("\u2581", " ").encode()
    return tokens, scores, types


def test_real_vocabulary(folder):
    """With or without tokenizer_config.json the section is tokenizer.bin's.  </s> is no stop id."""
    ids, pieces = (f := ref.Bin(os.path.join(ref.ROOT, "tokenizer.bin"))).vocabulary()
    model, path = Model(lambda role, layer: "BF16", layers="L"), os.path.join(folder, "v.gguf")
    for with_config in (False, True):
        tokens, scores, types = converter_vocabulary(pieces, with_config)
        check(sum(a != t for a, (t, _, _) in zip(tokens, pieces)) == (30 if with_config else 0),
              "gguf: the converter's vocabulary")
        # a padded embedding, as the converter fills it
        more = [b"[PAD%d]" % i for i in range(256000, 256004)]
        vocabulary = tokens + more, scores + [-10000.0] * 4, types + [ref.UNUSED] * 4
        write_gguf(path, model, vocabulary, lambda w: w.add_eot_token_id(213),
                   drop=["tokenizer.ggml.eot_token_id"])
        reader = export.Gguf(path)
        _, tokenizer = reader.tokenizer()
        check(reader.model.stop_ids == (1,), f"gguf: stops {reader.model.stop_ids}")
        check(tokenizer.kinds[256000:] == [ref.UNUSED] * 4, "gguf: kinds of padding")
        export.finish_tokenizer(tokenizer, 256000, path)
        check(export.tokenizer_section(tokenizer) == bytes(f.bytes("tokenizer")),
              f"gguf: Gemma's vocabulary, listed {with_config}")
    # a fine-tune renames pieces, control pieces among them, and adds three
    for i, name in (1, b"<|im_end|>"), (3, b"<|user|>"), (7, b"<|im_start|>"), (106, b"<|sys|>"):
        tokens[i], types[i] = name, ref.CONTROL
    more = [b"<tool>", b"word", b"new"], [-1000.0, -9.0, -1000.0], [ref.CONTROL, 1, ref.USER]
    write_gguf(path, model, [a + b for a, b in zip((tokens, scores, types), more)],
               lambda w: w.add_chat_template("{% for m in messages %}<|im_start|>{{ m['role'] + '\n' "
                                             "+ m['content'] + eos_token }}\n{% endfor %}"),
               drop=["tokenizer.chat_template"])
    t = (reader := export.Gguf(path)).own_tokenizer
    export.finish_tokenizer(t, 256003, path)
    check([t.kinds[i] for i in (0, 1, 2, 3, 7, 106, 107, 108, 256000, 256001, 256002)] == [
        ref.CONTROL, ref.MARKER, ref.CONTROL, ref.MARKER, ref.MARKER, ref.MARKER, ref.MARKER,
        ref.USER, ref.MARKER, ref.NORMAL, ref.USER], "gguf: kinds of a fine-tune")
    check(t.ids["eos"] == 1 and t.ids["start_of_turn"] is None, f"gguf: ids of a fine-tune {t.ids}")
    chat = export.chat_facts(*reader.chat_template(), t)
    check(chat.get("chat.model.after") == "<|im_end|>\n", f"gguf: turns of a fine-tune {chat}")
    check(t.scores[256000:] == [0, -9, 0] and t.pieces[7] == "<|im_start|>", "gguf: its scores")


# ---- bad files ------------------------------------------------------------------------


def bad(path, what, *words):
    """A conversion that must fail: status 1, one sentence with the words, nothing left."""
    place = os.path.join(os.path.dirname(os.path.abspath(path)), "place")
    os.makedirs(place)
    run = oracle_export.convert(path, os.path.join(place, "out.bin"))
    text = run.stderr.strip().split("\n")[-1]
    check(run.returncode == 1, f"{what}: exit {run.returncode}: {run.stderr[-300:]}")
    check("Traceback" not in run.stderr and text, f"{what}: says {run.stderr[-300:]!r}")
    check(all(w in text for w in words), f"{what}: {words} not in {text!r}")
    check(not os.listdir(place), f"{what}: leaves {os.listdir(place)}")
    shutil.rmtree(place)


def refused(reader, path, what, *words):
    """The same refusal, in this process and without the conversion."""
    try:
        made = reader(path)
        export.check_shapes(made)
        check(False, f"{what}: accepted")
    except export.ExportError as e:
        text = str(e)
        check(all(w in text for w in words) and len(text) < 400 and "\n" not in text,
              f"{what}: {words} not in {text[:400]!r}")


def with_data(model, **data):
    """The same model with some tensors replaced, or left out where None."""
    other = Model.__new__(Model)
    data = {k: v for k, v in {**model.data, **data}.items() if v is not None}
    other.config, other.data = model.config, data
    return other


def test_bad(folder):
    import gguf
    path, q = os.path.join(folder, "bad.gguf"), "blk.0.attn_q.weight"
    good = Model(lambda role, layer: "BF16", layers="L", hidden_size=32, intermediate_size=32,
                 head_dim=8)

    def no(what, *words, data=None, **options):
        write_gguf(path, with_data(good, **(data or {})), **options)
        refused(export.Gguf, path, "gguf " + what, *words)

    ones = np.ones((32, 32), np.float32)
    no("missing tensor", "layers.0.q", data={q: None})
    no("unknown tensor", "surprise", data={"surprise.weight": ("F32", ones)})
    no("wrong shape", "layers.0.q", "shape", "header", data={q: ("F32", ones[:31])})
    no("three dimensions", "dimensions", data={q: ("F32", np.ones((2, 4, 4), np.float32))})
    for kind in ("Q8_1", "Q8_K", "I8", "F64"):
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        raw = np.zeros((4, size * (256 // weights)), np.uint8)
        no(kind, kind, q, data={q: (kind, raw)})
    bad_facts(no)
    nan = {q: ("F32", np.full((32, 32), np.nan, np.float32))}
    write_gguf(path, with_data(good, **nan))
    bad(path, "gguf NaN", "layers.0.q", "NaN")
    write_gguf(path, good)
    stub = os.path.join(folder, "stub")
    os.makedirs(stub)
    with open(os.path.join(stub, "gguf.py"), "w") as f:
        f.write("raise ImportError('not here')\n")
    run = oracle_export.apart(path, path + ".bin", env={**os.environ, "PYTHONPATH": stub})
    check(run.returncode == 1 and "pip install gguf" in run.stderr, f"no gguf: {run.stderr}")
    test_damage(folder, path)


def bad_facts(no):
    no("llama", "llama", "only Gemma 2", arch="llama")
    no("gemma3", '"gemma3"', "only Gemma 2", arch="gemma3")
    no("adapter", "general.type", "adapter", edit=lambda w: w.add_type("adapter"))
    no("big-endian", "big-endian", big=True)
    no("key missing", "block_count", drop=["gemma2.block_count"])
    no("value_length", "value_length", drop=["gemma2.attention.value_length"],
       edit=lambda w: w.add_value_length(16))
    no("scaled rope", "rope", edit=lambda w: w.add_string("gemma2.rope.scaling.type", "linear"))
    no("scaled rope", "scaling.factor", edit=lambda w: w.add_rope_scaling_factor(2.0))
    no("rope of local layers", "freq_base_swa", edit=lambda w: w.add_rope_freq_base_swa(1e6))
    no("heads of local layers", "key_length_swa", edit=lambda w: w.add_key_length_swa(16))
    no("attention to both sides", "causal", edit=lambda w: w.add_causal_attention(False))
    no("head count as list", "head_count", drop=["gemma2.attention.head_count"],
       edit=lambda w: w.add_head_count([4] * 5000))
    no("BPE tokenizer", "gpt2", drop=["tokenizer.ggml.model"],
       edit=lambda w: w.add_tokenizer_model("gpt2"))
    no("scores", "scores", drop=["tokenizer.ggml.scores"])
    no("stop id", "eot_token_id", drop=["tokenizer.ggml.eot_token_id"],
       edit=lambda w: w.add_eot_token_id(999999))


def test_damage(folder, path):
    """Files cut anywhere, counts and offsets of any size, any byte of the header changed."""
    with open(path, "rb") as f:
        whole = f.read()
    base = len(whole) - sum(t.size(t.kind, t.shape) for t in export.Gguf(path).tensors.values())
    for n in (0, 3, 4, 20, 24, 31, 40, 100, base // 2, base, len(whole) - 40):
        damaged(path, whole[:n], f"gguf of {n} bytes", always=True)
    bad(path, "truncated gguf", "truncated")
    for at in (8, 16, 24):  # tensors, keys, the first key's length
        for value in (1 << 63, 1 << 40, (1 << 64) - 1, 70000):
            damaged(path, whole[:at] + struct.pack("<Q", value) + whole[at + 8:],
                    f"gguf with {value} at {at}", always=True)
    at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    for field, values in ((at, (0, 5, 1 << 31)), (at + 20, (200, 1 << 31))):
        for value in values:
            damaged(path, whole[:field] + struct.pack("<I", value) + whole[field + 4:],
                    f"gguf with {value} in a tensor", always=True)
    for field in (at + 4, at + 12, at + 24):  # dimensions, offset
        for value in (0, 1 << 63, 1 << 62, 1 << 32, (1 << 64) - 32, 17):
            damaged(path, whole[:field] + struct.pack("<Q", value) + whole[field + 8:],
                    f"gguf with {value} in a tensor", always=True)
    at = whole.index(b"general.name")
    damaged(path, whole[:at - 8] + struct.pack("<Q", 900) + whole[at:], "gguf, a long key", True)
    with open(path, "wb") as f:  # lists that would take ten times their bytes in memory
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 20))
        for i in range(20):
            f.write(struct.pack("<Q4sIIQ", 4, b"l%03d" % i, 9, 0, 1 << 22))
            f.seek(1 << 22, os.SEEK_CUR)
        f.truncate()
    refused(export.Gguf, path, "gguf, a header of 80 MB", "goes on beyond byte 67108864")
    rng = random.Random(4)
    for _ in range(300):
        i = rng.randrange(min(base, len(whole)))
        damaged(path, whole[:i] + bytes([rng.randrange(256)]) + whole[i + 1:], f"gguf, byte {i}")


def damaged(path, data, what, always=False, reader=export.Gguf):
    """The bytes are refused in a sentence or, unless always is set, read as another file."""
    with open(path, "wb") as f:
        f.write(data)
    export.handles.clear()
    try:
        export.check_shapes(reader(path))
        check(not always, f"{what}: accepted")
    except export.ExportError as e:
        check(len(str(e)) < 600 and "\n" not in str(e), f"{what}: says {str(e)[:300]!r}")
    except Exception as e:  # what a user would see as a traceback
        check(False, f"{what}: {type(e).__name__}: {e}")


def test_gguf(engine, folder):
    folder = os.path.join(folder, "gguf")
    os.makedirs(folder)
    test_blocks(folder)
    test_norms()
    every = test_every_type(engine, folder)
    q8 = test_q8_0(engine, folder)
    test_facts(folder)
    test_real_vocabulary(folder)
    test_bad(folder)
    print(f"gguf: {every}; {q8}")
