"""The reference of the tests, written apart from the engine and the exporter:
random Gemma 2 models run by transformers, the byte tables of gemma2.c read with numpy,
SentencePiece's algorithm in plain Python, and the engine itself through ctypes.

make_golden.py writes the committed test data with it, and oracle.py compares with it live."""
import ctypes as C
import hashlib
import heapq
import os
import struct
import subprocess
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
GOLDEN = os.path.join(HERE, "golden")
sys.path.insert(0, ROOT)  # for `import export` in scripts that import this one

# ---- counting ------------------------------------------------------------------------


class Tally:
    passed = failed = 0

    def __call__(self, ok, what):
        if ok:
            self.passed += 1
        else:
            self.failed += 1
            print("FAIL", what, flush=True)
        return bool(ok)


check = Tally()

# ---- random models, run by transformers -------------------------------------------


def bf16_round(x):
    """x rounded to the nearest bfloat16, ties to even; works on floats and arrays."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


def hf_config(layers, **changes):
    """A Gemma2Config; layers is a string of L (local) and G (global), as in "LGGL"."""
    from transformers import Gemma2Config
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    facts = dict(
        vocab_size=347, hidden_size=42, intermediate_size=50, num_hidden_layers=len(layers),
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=7,
        sliding_window=8, layer_types=[kinds[c] for c in layers], rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        max_position_embeddings=512, hidden_activation="gelu_pytorch_tanh",
        pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
        attention_dropout=0.0)
    facts.update(changes)
    return Gemma2Config(**facts)


def fill_random(model, seed):
    """Weights at which every feature shows: attention scores and logits reach tens, so
    that both soft-caps bend; norm weights have both signs; no branch drowns another."""
    import torch
    g = torch.Generator().manual_seed(seed)

    def draw(shape, std, mean=0.0):
        return torch.randn(shape, generator=g) * std + mean

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(draw(p.shape, 0.7, 0.4))
            elif "embed" in name or "lm_head" in name:
                p.copy_(draw(p.shape, 1.0 / np.sqrt(p.shape[1]) * 2.2))
            elif "q_proj" in name or "k_proj" in name:
                p.copy_(draw(p.shape, 1.15 / np.sqrt(p.shape[1])))
            else:
                p.copy_(draw(p.shape, 1.0 / np.sqrt(p.shape[1])))


def hf_model(config, seed=None):
    """A float32 model with eager attention (sdpa has no soft-cap).  Its embedding scale is
    rounded to bf16, as transformers does in bf16, the type in which models are trained."""
    import torch
    from transformers import Gemma2ForCausalLM
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).float().eval()
    if seed is not None:
        fill_random(model, seed)
    set_embedding_scale(model, float(bf16_round(config.hidden_size ** 0.5)))
    return model


def set_embedding_scale(model, scale):
    import torch
    model.model.embed_tokens.embed_scale = torch.tensor(scale, dtype=torch.float32)


def save_checkpoint(model, path, tokenizer=None, **options):
    model.save_pretrained(path, **options)
    if tokenizer is not None:
        with open(os.path.join(path, "tokenizer.model"), "wb") as f:
            f.write(tokenizer)


def hf_logits(model, ids):
    """Logits [len(ids), V] at every position."""
    import torch
    with torch.no_grad():
        out = model(torch.tensor([list(map(int, ids))]), use_cache=False)
    return out.logits[0].float().numpy()


def quantise_inputs(module):
    """Rounds a Linear's inputs as the engine's q8, q6, q4 and q3 kernels do: to int8 in groups
    of 32, scale absmax / 127."""
    import torch

    def hook(module, args):
        x = args[0]
        n = x.shape[-1]
        groups = torch.nn.functional.pad(x, (0, -n % 32)).unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        q = torch.round(groups / torch.where(scale > 0, scale, torch.ones(()))).clamp(-127, 127)
        return ((q * scale).flatten(-2)[..., :n],)

    module.register_forward_pre_hook(hook)


def hf_trace(model, ids):
    """Every activation that the engine's trace names: {(name, layer): [T, columns]}."""
    import torch
    from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb
    seen, hooks = {}, []

    def keep(name, layer, module, what="output"):
        def hook(module, args, kwargs, output):
            x = output if what == "output" else args[0] if args else kwargs["hidden_states"]
            x = x[0] if isinstance(x, tuple) else x
            seen[name, layer] = x.detach()[0].clone()
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    rotary = {}
    hooks.append(model.model.rotary_emb.register_forward_hook(
        lambda module, args, output: rotary.update(cos=output[0], sin=output[1])))
    keep("embedding", 0, model.model.embed_tokens)
    for l, block in enumerate(model.model.layers):
        attn, mlp = block.self_attn, block.mlp
        keep("attn_norm", l, block.input_layernorm)
        keep("q", l, attn.q_proj), keep("k", l, attn.k_proj), keep("v", l, attn.v_proj)
        keep("attn", l, attn.o_proj, "input"), keep("o", l, attn.o_proj)
        keep("post_attn_norm", l, block.post_attention_layernorm)
        keep("attn_residual", l, block.pre_feedforward_layernorm, "input")
        keep("ffn_norm", l, block.pre_feedforward_layernorm)
        keep("geglu", l, mlp.down_proj, "input"), keep("down", l, mlp.down_proj)
        keep("post_ffn_norm", l, block.post_feedforward_layernorm)
        keep("residual", l, block)
    keep("final_norm", 0, model.model.norm)
    logits = hf_logits(model, ids)
    for h in hooks:
        h.remove()

    T, H = len(ids), model.config.head_dim
    for l, block in enumerate(model.model.layers):  # transformers scales scores, the engine q
        q, k = (seen[n, l].view(1, T, -1, H).transpose(1, 2) for n in "qk")
        q, k = apply_rotary_pos_emb(q, k, rotary["cos"], rotary["sin"])
        q = q * block.self_attn.scaling
        seen["q", l], seen["k", l] = (x.transpose(1, 2).reshape(T, -1) for x in (q, k))
    trace = {key: value.float().numpy() for key, value in seen.items()}
    trace["logits", 0] = logits
    return trace


# ---- the weight file, read from the byte tables in gemma2.c ------------------------

ROLES = {1: "facts", 2: "tokenizer", 3: "kept", 16: "embedding", 17: "head", 18: "final_norm",
         32: "attn_norm", 33: "q", 34: "k", 35: "v", 36: "o", 37: "post_attn_norm",
         40: "ffn_norm", 41: "gate", 42: "up", 43: "down", 44: "post_ffn_norm"}
TYPES = {0: "bytes", 1: "f32", 2: "bf16", 3: "q8", 4: "q6", 5: "q4", 6: "q3"}
HEADER_FIELDS = {  # name: (offset, struct format)
    "file_bytes": (32, "<Q"), "alignment": (56, "<I"), "L": (64, "<I"), "D": (68, "<I"),
    "N": (72, "<I"), "K": (76, "<I"), "H": (80, "<I"), "F": (84, "<I"), "V": (88, "<I"),
    "W": (92, "<I"), "context": (96, "<I"), "eps": (100, "<f"), "rope_theta": (104, "<d"),
    "attn_softcap": (112, "<f"), "final_softcap": (116, "<f"), "query_scale": (120, "<f"),
    "embedding_scale": (124, "<f"), "n_stop": (256, "<I")}
CODEBOOK = np.array([-31, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 28], np.int64)
CODEBOOKS_Q3 = np.array([[-31, -17, -9, -2, 4, 10, 17, 27], [-31, -20, -12, -5, 0, 7, 14, 23]],
                        np.int64)


class Bin:
    """A weight file in memory: .header, .sections {(role, layer): section}, and edits.
    write() computes digests and identity anew."""

    def __init__(self, path):
        with open(path, "rb") as f:
            self.data = bytearray(f.read())
        d = self.data
        if bytes(d[:8]) != b"\x89GEMMA2\n":
            raise ValueError("not a weight file")
        self.header = {n: struct.unpack_from(fmt, d, at)[0]
                       for n, (at, fmt) in HEADER_FIELDS.items()}
        self.header["local"] = [d[128 + l // 8] >> (l % 8) & 1 for l in range(self.header["L"])]
        self.header["stop"] = list(struct.unpack_from("<15I", d, 260))[:self.header["n_stop"]]
        self.at, self.count = struct.unpack_from("<QI", d, 40)
        self.sections = {}
        for i in range(self.count):
            role, layer, kind, flags, rows, cols, offset, size = struct.unpack_from(
                "<4I4Q", d, self.at + 96 * i)
            key = ROLES.get(role, str(role)), layer
            self.sections[key] = dict(type=TYPES[kind], rows=rows, cols=cols, offset=offset,
                                      bytes=size, index=i, flags=flags)

    def bytes(self, role, layer=0):
        s = self.sections[role, layer]
        return self.data[s["offset"]:s["offset"] + s["bytes"]]

    def tensor(self, role, layer=0):
        s = self.sections[role, layer]
        return dequantise(s["type"], bytes(self.bytes(role, layer)), s["rows"], s["cols"])

    def facts(self):
        d, out, at = bytes(self.bytes("facts")), {}, 4
        for _ in range(struct.unpack_from("<I", d)[0]):
            nk, nv = struct.unpack_from("<II", d, at)
            key, value = d[at + 8:at + 8 + nk], d[at + 8 + nk:at + 8 + nk + nv]
            out[key.decode()] = value.decode()
            at += 8 + nk + nv
        return out

    def vocabulary(self):
        return read_tokenizer(bytes(self.bytes("tokenizer")))

    def set(self, **fields):
        for name, value in fields.items():
            at, fmt = HEADER_FIELDS[name]
            struct.pack_into(fmt, self.data, at, value)
        return self

    def patch(self, role, layer, new):
        s = self.sections[role, layer]
        assert len(new) == s["bytes"]
        self.data[s["offset"]:s["offset"] + s["bytes"]] = new
        return self

    def digest_faults(self):
        """Names of sections whose SHA-256 is wrong, "identity" among them."""
        bad = [key for key, s in self.sections.items() if hashlib.sha256(
            self.bytes(*key)).digest() != self._entry(s)[48:80]]
        return bad + ([] if self._identity() == bytes(self.data[480:512]) else ["identity"])

    def _entry(self, s):
        return bytes(self.data[self.at + 96 * s["index"]:][:96])

    def _identity(self):
        end = self.at + 96 * self.count
        return hashlib.sha256(bytes(self.data[:480] + self.data[self.at:end])).digest()

    def write(self, path):
        for key, s in self.sections.items():
            at = self.at + 96 * s["index"] + 48
            self.data[at:at + 32] = hashlib.sha256(self.bytes(*key)).digest()
        self.data[480:512] = self._identity()
        with open(path, "wb") as f:
            f.write(self.data)


def dequantise(kind, data, rows, cols):
    """Section 2 of gemma2.c: bytes of a tensor to float32 [rows, cols]."""
    tiles = -(-rows // 16)
    if kind == "f32":
        w = np.frombuffer(data, np.float32).reshape(tiles, cols, 16).transpose(0, 2, 1)
    elif kind == "bf16":
        pairs = -(-cols // 2)
        w = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        w = w.view(np.float32).reshape(tiles, pairs, 16, 2).transpose(0, 2, 1, 3)
        w = w.reshape(tiles, 16, 2 * pairs)
    else:
        w = dequantise_blocks(kind, data, tiles, -(-cols // 256))
    return np.ascontiguousarray(w.reshape(tiles * 16, -1)[:rows, :cols])


GROUP_BYTES = {"q8": 512, "q6": 384, "q4": 256, "q3": 192}


def dequantise_blocks(kind, data, tiles, blocks):
    """q8, q6, q4, q3 to [tiles, 16, blocks * 256]."""
    group = GROUP_BYTES[kind]
    raw = np.frombuffer(data, np.uint8).reshape(tiles, 64 + blocks * (128 + 8 * group))
    S = raw[:, :64].copy().view(np.float32)                              # [tile][row]
    raw = raw[:, 64:].reshape(tiles, blocks, 128 + 8 * group)
    b = raw[:, :, :128].reshape(tiles, blocks, 8, 16)                    # group scale bytes
    v = raw[:, :, 128:].reshape(tiles, blocks, 8, group)
    if kind == "q8":
        s, values = b.astype(np.int64), v.view(np.int8).astype(np.int64)
        values = values.reshape(tiles, blocks, 8, 8, 16, 4)              # [step][row][input]
    elif kind == "q3":
        s = b.view(np.int8).astype(np.int64) >> 1
        values = CODEBOOKS_Q3[(b & 1)[:, :, :, None, :, None], index_steps(v)]
    else:
        low = nibble_steps(v[..., :256])
        if kind == "q4":
            s = b.view(np.int8).astype(np.int64) >> 1
            values = CODEBOOK[low] + 4 * (b & 1).astype(np.int64)[:, :, :, None, :, None]
        else:
            s = b.view(np.int8).astype(np.int64)
            values = high_steps(v[..., 256:]) * 16 + low - 32
    weight = (s[:, :, :, None, :, None] * values).astype(np.float32)     # exact integers
    weight *= S[:, None, None, None, :, None]
    return weight.transpose(0, 4, 1, 2, 3, 5).reshape(tiles, 16, blocks * 256)


def nibble_steps(v):
    """n operands of [16 rows][4 inputs]: step 2 o low, 2 o + 1 high -> [2 n][16][4]."""
    v = v.reshape(v.shape[:-1] + (-1, 16, 4)).astype(np.int64)
    both = np.stack([v & 15, v >> 4], axis=-3)
    return both.reshape(v.shape[:-3] + (-1, 16, 4))


def index_steps(v):
    """3 operands as nibbles: bits 0 .. 2 hold steps 0 .. 5, bits 3 hold 6 and 7 -> [8][16][4]."""
    nibble = nibble_steps(v)
    last = [sum((nibble[..., 2 * o + i, :, :] >> 3) << o for o in range(3)) for i in (0, 1)]
    return np.concatenate([nibble & 7, np.stack(last, axis=-3)], axis=-3)


def high_steps(v):
    """2 operands, bits 2j, 2j+1 are step 4 o + j -> [8][16][4]."""
    v = v.reshape(v.shape[:-1] + (2, 16, 4)).astype(np.int64)
    four = np.stack([v >> (2 * j) & 3 for j in range(4)], axis=-3)
    return four.reshape(v.shape[:-3] + (8, 16, 4))


HF_NAMES = {"attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
            "v": "self_attn.v_proj", "o": "self_attn.o_proj",
            "post_attn_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm", "gate": "mlp.gate_proj",
            "up": "mlp.up_proj", "down": "mlp.down_proj",
            "post_ffn_norm": "post_feedforward_layernorm"}


def hf_from_bin(bin_file):
    """transformers' model with a weight file's facts and dequantised weights.  Where weights
    were quantised, activations are int8."""
    import torch
    h = bin_file.header
    untied = ("head", 0) in bin_file.sections
    config = hf_config(
        "".join("GL"[bit] for bit in h["local"]), vocab_size=h["V"], hidden_size=h["D"],
        intermediate_size=h["F"], num_attention_heads=h["N"], num_key_value_heads=h["K"],
        head_dim=h["H"],
        sliding_window=h["W"], rms_norm_eps=h["eps"], tie_word_embeddings=not untied,
        rope_parameters={"rope_type": "default", "rope_theta": h["rope_theta"]},
        attn_logit_softcapping=h["attn_softcap"] or None,
        final_logit_softcapping=h["final_softcap"] or None,
        max_position_embeddings=h["context"])
    model = hf_model(config)
    state = {"model.embed_tokens.weight": bin_file.tensor("embedding"),
             "model.norm.weight": bin_file.tensor("final_norm")[:, 0]}
    state["lm_head.weight"] = bin_file.tensor("head" if untied else "embedding")
    for l in range(h["L"]):
        for role, name in HF_NAMES.items():
            w = bin_file.tensor(role, l)
            state[f"model.layers.{l}.{name}.weight"] = w[:, 0] if "norm" in role else w
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()})
    set_embedding_scale(model, h["embedding_scale"])
    for l, block in enumerate(model.model.layers):
        block.self_attn.scaling = h["query_scale"]
        for role, name in HF_NAMES.items():
            if bin_file.sections[role, l]["type"] in GROUP_BYTES:
                quantise_inputs(block.get_submodule(name))
    if bin_file.sections["head" if untied else "embedding", 0]["type"] in GROUP_BYTES:
        quantise_inputs(model.lm_head)
    return model


# ---- vocabularies -------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE, MARKER = range(1, 8)


def read_tokenizer(d):
    """The tokenizer section: dict of ids and a list of (bytes, score, kind)."""
    V, bos, eos, pad, unk, sot, eot, blob = struct.unpack_from("<8I", d)
    scores = np.frombuffer(d, np.float32, V, 64)
    ends = np.frombuffer(d, np.uint32, V, 64 + 4 * V)
    kinds = np.frombuffer(d, np.uint8, V, 64 + 8 * V)
    text = d[64 + 9 * V:64 + 9 * V + blob]
    starts = np.concatenate([[0], ends[:-1]])
    pieces = [(text[a:b], float(s), int(k)) for a, b, s, k in zip(starts, ends, scores, kinds)]
    ids = dict(bos=bos, eos=eos, pad=pad, unk=unk, start_of_turn=sot, end_of_turn=eot)
    return ids, pieces


def sentencepiece_model(pieces, unk_id=3):
    """Serialised SentencePiece BPE model of these pieces, set up as Gemma's is."""
    from sentencepiece import sentencepiece_model_pb2 as pb
    m = pb.ModelProto()
    for text, score, kind in pieces:
        p = m.pieces.add()
        p.piece, p.score, p.type = text.decode(), score, USER if kind == MARKER else kind
    t, n = m.trainer_spec, m.normalizer_spec
    t.model_type, t.vocab_size, t.byte_fallback = 2, len(pieces), True
    t.unk_id, t.bos_id, t.eos_id, t.pad_id = unk_id, 2, 1, 0
    n.name, n.add_dummy_prefix, n.remove_extra_whitespaces = "identity", False, False
    n.escape_whitespaces, n.precompiled_charsmap = True, b""
    return m.SerializeToString()


# vocabulary_digest of Gemma 2's tokenizer.model
GEMMA_VOCABULARY = "67807c746c98d263f42afea6bba4dd4771c5aa69d2c03befea4be0f61d722d75"


def vocabulary_digest(pieces):
    """One digest of piece texts, scores and SentencePiece types."""
    h = hashlib.sha256()
    for text, score, kind in pieces:
        kind = USER if kind == MARKER else kind
        h.update(struct.pack("<IfB", len(text), score + 0.0, kind) + text)
    return h.hexdigest()


def model_pieces(path):
    """(bytes, score, kind) of each piece of a tokenizer.model."""
    from sentencepiece import sentencepiece_model_pb2 as pb
    m = pb.ModelProto()
    with open(path, "rb") as f:
        m.ParseFromString(f.read())
    return [(p.piece.encode(), p.score, p.type) for p in m.pieces]


def repair_utf8(text):
    """Bytes to str.  Each byte outside a valid character becomes one U+FFFD.  Python's
    "replace" makes one U+FFFD of a whole truncated character."""
    out, i = [], 0
    while i < len(text):
        for n in (1, 2, 3, 4):
            try:
                out.append(text[i:i + n].decode())
                i += n
                break
            except UnicodeDecodeError:
                continue
        else:
            out.append("\ufffd")
            i += 1
    return "".join(out)


class Bpe:
    """SentencePiece's BPE, slow and simple.  plain=True leaves out the marker pieces, which
    SentencePiece itself cannot do."""

    def __init__(self, pieces, plain=False):
        drop = {MARKER} if plain else set()
        self.id, self.score, user, self.byte = {}, {}, set(), {}
        for i, (text, score, kind) in enumerate(pieces):
            if kind == BYTE:
                self.byte[int(text[3:5], 16)] = i
            if kind in (NORMAL, USER, MARKER, UNUSED) and kind not in drop:
                text = text.decode()
                self.id.setdefault(text, i)
                self.score.setdefault(text, score)
                if kind in (USER, MARKER):
                    user.add(text)
        self.user = {}
        for text in sorted(user, key=len, reverse=True):
            self.user.setdefault(text[0], []).append(text)

    def symbols(self, text):
        i = 0
        while i < len(text):
            whole = next((u for u in self.user.get(text[i], ()) if text.startswith(u, i)), None)
            yield (whole, True) if whole else (text[i], False)
            i += len(whole) if whole else 1

    def encode(self, text):
        """bytes to ids"""
        parts = list(self.symbols(repair_utf8(text).replace(" ", "\u2581")))
        sym, frozen = [p[0] for p in parts], [p[1] for p in parts]
        n = len(sym)
        nxt, prv = list(range(1, n)) + [-1], list(range(-1, n - 1))
        heap = []

        def consider(a, b):
            if a < 0 or b < 0 or frozen[a] or frozen[b]:
                return
            joined = sym[a] + sym[b]
            if joined in self.id:
                heapq.heappush(heap, (-self.score[joined], a, b, joined))

        for i in range(n - 1):
            consider(i, i + 1)
        while heap:
            _, a, b, joined = heapq.heappop(heap)
            if not sym[a] or not sym[b] or sym[a] + sym[b] != joined or nxt[a] != b:
                continue
            sym[a], sym[b] = joined, ""
            nxt[a] = nxt[b]
            if nxt[b] >= 0:
                prv[nxt[b]] = a
            consider(prv[a], a)
            consider(a, nxt[a])
        ids = []
        for s in filter(None, sym):
            ids += [self.id[s]] if s in self.id else [self.byte[c] for c in s.encode()]
        return ids


# Mixtures that nobody would write and that encoders get wrong.
SCRIPTS = ("The quick brown fox jumps over the lazy dog 0123456789 .,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`",
           "àéîõüßçñøåæœĀžšłđ ÀÉÎÕÜ", "Съешь же ещё этих мягких французских булок",
           "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία", "نص حكيم له سر قاطع وذو شأن عظيم", "דג סקרן שט בים",
           "ऋषियों को सताने वाले दुष्ट", "เป็นมนุษย์สุดประเสริฐ", "生活的真谛是宽恕与忘记 我能吞下玻璃",
           "いろはにほへと チリヌルヲ", "키스의 고유조건은 입술끼리", "ﬁﬂ①②ⅣＡＢＣ１２３ｶﾅ", "∀x∈ℝ: ⌈x⌉ ≈ ∫ √2 → ∞ ½ ° µ",
           "😈🤗👩‍👩‍👧‍👦🇭🇺👍🏽❤️", "a\u0301e\u0308o\u0302\u200b\u200d\ufeff\u00a0\u3000\u2028", "\ue000\U000f0000\U0010ffff\ufffd\ufffe")
FORGED = ("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
          "<unused0>", "<unused98>", "<unused99>", "<start_of_turn", "end_of_turn>", "<0x41>", "<unused", "<s>",
          "</s>", "<table>", "</td></tr>", "<h1>", "<blockquote>", "<code>", "<sup>", "<", ">")
SPACES = (" ", "  ", "   ", "\n", "\n\n", "\t", "\t\t", "\r\n", "\u2581", "\u2581\u2581", "\u00a0", "\u3000", "\0")
BAD_UTF8 = (b"\xff", b"\xc3", b"\xe2\x96", b"\xf0\x9f\x98", b"\x80", b"\xc0\x80", b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xf0\x80\x80\xaf")


def random_part(rng, pieces):
    kind = rng.randrange(10)
    if kind == 0:
        return "".join(rng.choice(SPACES) for _ in range(rng.randrange(1, 6))).encode()
    if kind == 1:
        return (rng.choice(SPACES) * rng.choice((1, 2, 3, 15, 16, 31, 32, 33, 50))).encode()
    if kind == 2:
        return rng.choice(FORGED).encode()
    if kind == 3:
        return rng.choice(BAD_UTF8) if rng.randrange(2) else rng.randbytes(rng.randrange(1, 7))
    if kind == 4:
        return (rng.choice(rng.choice(SCRIPTS)) * rng.randrange(1, 40)).encode()
    if kind in (5, 6):
        return b"".join(rng.choice(pieces)[0].replace(b"\xe2\x96\x81", b" ")
                        for _ in range(rng.randrange(1, 6)))
    script = rng.choice(SCRIPTS)
    a = rng.randrange(len(script))
    return script[a:a + rng.randrange(1, 20)].encode()


def random_text(rng, pieces):
    """Bytes: scripts, white space, tags, forged control strings, broken UTF-8, pieces."""
    return b"".join(random_part(rng, pieces) for _ in range(rng.randrange(0, 9)))


def random_ids(rng, pieces):
    """Ids to decode: pieces of all kinds and runs of bytes, few of them valid UTF-8."""
    zero = next(i for i, p in enumerate(pieces) if p[2] == BYTE)  # <0x00>; the others follow
    out = []
    for _ in range(rng.randrange(0, 8)):
        if rng.randrange(2):
            out.append(rng.randrange(len(pieces)) if rng.randrange(4) else rng.randrange(4))
        elif rng.randrange(2):
            text = rng.choice(rng.choice(SCRIPTS)).encode() + rng.choice(BAD_UTF8 + (b"",))
            out += [zero + c for c in text[:rng.randrange(1, len(text) + 1)]]
        else:
            out += [zero + c for c in rng.randbytes(rng.randrange(1, 6))]
    return out


# ---- the engine -----------------------------------------------------------------------


class Config(C.Structure):
    _fields_ = ([(n, C.c_int32) for n in (
        "n_layers d_model n_heads n_kv_heads head_dim d_ffn n_vocab window n_context").split()]
        + [(n, C.c_float) for n in (
            "rms_norm_eps attn_softcap final_softcap query_scale embedding_scale").split()]
        + [("rope_theta", C.c_double)]
        + [(n, C.c_int32) for n in (
            "bos eos pad unk start_of_turn end_of_turn n_stop").split()]
        + [("stop", C.c_int32 * 15), ("max_piece_bytes", C.c_int32),
           ("is_local", C.c_uint8 * 1024), ("identity", C.c_uint8 * 32),
           ("file_bytes", C.c_uint64), ("isa", C.c_char_p)])


class SessionParams(C.Structure):
    _fields_ = [("struct_size", C.c_uint32)] + [(n, C.c_int32) for n in (
        "n_context n_batch n_threads window cache_type").split()] + [("worker", C.c_void_p)]


class Row(C.Structure):
    _fields_ = [("session", C.c_void_p), ("id", C.c_int32), ("logits", C.c_void_p),
                ("prefill", C.c_int32), ("status", C.c_int32)]


class Message(C.Structure):
    _fields_ = [("role", C.c_int32), ("text", C.c_char_p), ("size", C.c_int64)]


class Utf8(C.Structure):
    _fields_ = [("bytes", C.c_uint8 * 4), ("n", C.c_uint8)]


class EngineError(Exception):
    pass


class Engine:
    """The library, loaded from a shared object."""

    def __init__(self, path):
        lib = self.lib = C.CDLL(path)
        for name, result, args in (
                ("open", C.c_void_p, "spsz"), ("close", None, "p"),
                ("get_config", C.POINTER(Config), "p"), ("session_new", C.c_void_p, "ppsz"),
                ("session_free", None, "p"), ("session_params_init", None, "p"),
                ("eval", C.c_int, "ppzp"), ("prefill", C.c_int, "ppzp"),
                ("eval_rows", C.c_int, "pz"), ("rewind", C.c_int, "pi"),
                ("score", C.c_int, "ppzip"), ("states", C.c_int, "ppzp"),
                ("scores", C.c_int, "ppp"), ("set_hook", C.c_int, "ppp"), ("encode_scratch", C.c_size_t, "z"),
                ("encode", C.c_int64, "pslupzpz"), ("decode", C.c_int, "ppipz"),
                ("chat_scratch", C.c_size_t, "ppz"), ("encode_chat", C.c_int64, "ppzupzpz"),
                ("is_stop", C.c_int, "pi"), ("position", C.c_int32, "p"),
                ("error_string", C.c_char_p, "i")):
            f = getattr(lib, "gemma2_" + name)
            f.restype = result
            f.argtypes = [{"p": C.c_void_p, "s": C.c_char_p, "z": C.c_size_t, "i": C.c_int32,
                           "l": C.c_int64, "u": C.c_uint32}[a] for a in args]


def build_engine(folder):
    """gemma2.c as a shared library."""
    out = os.path.join(folder, "libgemma2.so")
    subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-O2", "-ffp-contract=off",
                    "-fopenmp", "-shared", "-fPIC", os.path.join(ROOT, "gemma2.c"),
                    "-o", out, "-lm"], check=True)
    return Engine(out)


class Model:
    def __init__(self, engine, path, exact=False):
        """exact: prefill in the exact class, so that it returns the bits of eval."""
        self.lib = engine.lib
        err = C.create_string_buffer(512)
        params = (C.c_uint32 * 3)(12, 0, exact)  # gemma2_open_params
        self.handle = self.lib.gemma2_open(os.fsencode(path), C.addressof(params), err, 512)
        if not self.handle:
            raise EngineError(err.value.decode())
        self.config = self.lib.gemma2_get_config(self.handle).contents

    def close(self):
        self.lib.gemma2_close(self.handle)

    def encode(self, text, flags=0):
        size = self.lib.gemma2_encode_scratch(len(text))
        scratch = C.create_string_buffer(size + 64)
        ids = (C.c_int32 * (4 * len(text) + 8))()
        n = self.lib.gemma2_encode(self.handle, text, len(text), flags, C.addressof(ids),
                                   len(ids), C.addressof(scratch), size)
        if n < 0:
            raise EngineError(f"encode: {n}")
        return list(ids[:n])

    def encode_chat(self, messages, flags=0):
        """Messages are pairs of a role (0 system, 1 user, 2 model) and a text."""
        given = (Message * len(messages))(*[
            Message(role, text.encode(), len(text.encode())) for role, text in messages])
        size = self.lib.gemma2_chat_scratch(self.handle, C.addressof(given), len(given))
        scratch, ids = C.create_string_buffer(size + 64), (C.c_int32 * 20000)()
        n = self.lib.gemma2_encode_chat(self.handle, C.addressof(given), len(given), flags,
                                        C.addressof(ids), len(ids), C.addressof(scratch), size)
        if n < 0:
            raise EngineError(f"encode_chat: {n}")
        return list(ids[:n])

    def decode(self, ids):
        hold, out = Utf8(), b""
        room = C.create_string_buffer(self.config.max_piece_bytes + 12)
        for i in list(ids) + [-1]:
            n = self.lib.gemma2_decode(self.handle, C.addressof(hold), i,
                                       C.addressof(room), len(room))
            if n < 0:
                raise EngineError(f"decode {i}: {n}")
            out += room.raw[:n]
        return out


class Session:
    def __init__(self, model, **params):
        self.lib, self.V, self.D = model.lib, model.config.n_vocab, model.config.d_model
        p = SessionParams()
        self.lib.gemma2_session_params_init(C.addressof(p))
        for name, value in {"n_threads": 1, **params}.items():
            setattr(p, name, value)
        err = C.create_string_buffer(512)
        self.handle = self.lib.gemma2_session_new(model.handle, C.addressof(p), err, 512)
        if not self.handle:
            raise EngineError(err.value.decode())

    def close(self):
        self.lib.gemma2_session_free(self.handle)

    def check(self, status):
        if status < 0:
            raise EngineError(self.lib.gemma2_error_string(status).decode())

    def append(self, ids, how="eval"):
        """Appends ids with gemma2_eval or gemma2_prefill; logits after the last."""
        a, out = np.array(ids, np.int32), np.empty(self.V, np.float32)
        call = getattr(self.lib, "gemma2_" + how)
        self.check(call(self.handle, a.ctypes.data, len(a), out.ctypes.data))
        return out

    def rows(self, ids):
        """Appends ids in one shared pass; logits [len(ids), V] of all ids."""
        out = np.empty((len(ids), self.V), np.float32)
        rows = (Row * len(ids))(*[Row(self.handle, int(t), out[i].ctypes.data)
                                  for i, t in enumerate(ids)])
        self.check(self.lib.gemma2_eval_rows(C.addressof(rows), len(ids)))
        return out

    def states(self, ids):
        """Appends ids; the states [len(ids), D] after the final norm."""
        a = np.array(ids, np.int32)
        out = np.empty((len(ids), self.D), np.float32)
        self.check(self.lib.gemma2_states(self.handle, a.ctypes.data, len(a), out.ctypes.data))
        return out

    def scores(self, state, n):
        state, out = np.ascontiguousarray(state, np.float32), np.empty(n, np.float32)
        self.check(self.lib.gemma2_scores(self.handle, state.ctypes.data, out.ctypes.data))
        return out

    def score(self, ids, following=-1):
        a, out = np.array(ids, np.int32), np.full(len(ids), np.nan, np.float32)
        self.check(self.lib.gemma2_score(self.handle, a.ctypes.data, len(a), following,
                                         out.ctypes.data))
        return out
