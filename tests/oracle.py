"""`make test-oracle` compares the engine and export.py with live references: transformers
in float32 with eager attention, SentencePiece, and numpy code that reads the formats
straight from the byte tables.  The last line is "N passed, N failed".

  python3 tests/oracle.py [NAME ...]        names as in SECTIONS at the end

Without names all sections run, in a few minutes on two cores.  CC names the compiler,
ORACLE_SEED the seed of all that is random."""
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two threads that spin cost ten times one

import numpy as np

import make_golden
import oracle_arrays
import oracle_chat
import oracle_export
import oracle_gguf
import oracle_lora
import oracle_memory
import oracle_packed
import oracle_quality
import oracle_sbs
import oracle_schema
import oracle_spark
import oracle_states
import oracle_traps
import reference as ref
from reference import check

SEED = int(os.environ.get("ORACLE_SEED", "1"))
F32_LOGITS = 1e-4  # largest distance from transformers' float32 logits, as README promises


# ---- random models --------------------------------------------------------------------


def random_config(rng):
    """Any small shape that the architecture allows.  Each soft-cap is off in a third."""
    group, K = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3))
    N = K * group
    layers = "".join(rng.choice("LG") for _ in range(rng.randrange(1, 5)))
    head_dim = 2 * rng.randrange(2, 21)
    return dict(
        layers=layers, vocab_size=rng.randrange(300, 348), num_attention_heads=N,
        num_key_value_heads=K, hidden_size=N * rng.randrange(-(-24 // N), -(-120 // N)),
        head_dim=head_dim, intermediate_size=rng.randrange(8, 300),
        sliding_window=rng.choice((1, 2, 5, 8, 16, 33)),
        query_pre_attn_scalar=int(head_dim * rng.uniform(0.6, 2)) + 1,
        attn_logit_softcapping=rng.choice((50.0, 20.0, None)),
        final_logit_softcapping=rng.choice((30.0, 10.0, None)),
        rope_parameters={"rope_type": "default", "rope_theta": rng.choice((1e4, 100.0, 1e6))},
        rms_norm_eps=rng.choice((1e-6, 1e-5, 1e-3)), tie_word_embeddings=rng.random() < 0.7)


def cut(n, rng, most):
    """Random parts of 1 to most that add up to n."""
    while n > 0:
        part = min(n, rng.randrange(1, most + 1))
        yield part
        n -= part


def engine_logits(model, ids, rng, n_batch):
    """Logits of all positions, evaluated in shared passes of random sizes."""
    session = ref.Session(model, n_batch=n_batch, n_threads=rng.choice((1, 2)))
    out, at = [], 0
    for n in cut(len(ids), rng, n_batch):
        out.append(session.rows(ids[at:at + n]))
        at += n
    session.close()
    return np.concatenate(out)


def test_models(engine, folder, count=12):
    """f32 files against transformers, prompts longer than the window."""
    worst = 0.0
    for number in range(count):
        rng = random.Random(1000 * SEED + number)
        facts = random_config(rng)
        config = ref.hf_config(**facts)
        hf = ref.hf_model(config, seed=rng.randrange(1 << 30))
        ids = [2] + [rng.randrange(config.vocab_size) for _ in range(rng.randrange(40, 90))]
        path = os.path.join(folder, "random")
        ref.save_checkpoint(hf, path, make_golden.cut_tokenizer(
            make_golden.tiny_tokenizer(), config.vocab_size))
        make_golden.export(path, path + ".bin", "--type", "f32")
        check_header(path + ".bin", config, f"random model {number}")
        model = ref.Model(engine, path + ".bin")
        want = ref.hf_logits(hf, ids)
        got = engine_logits(model, ids, rng, rng.choice((1, 3, 8, 40, 100)))
        off = abs(got - want).max()
        worst = max(worst, off)
        check(off <= F32_LOGITS, f"random model {number} {facts}: logits off by {off:.2g}")
        session = ref.Session(model, n_batch=rng.choice((1, 7, 64)), n_threads=2)
        off = abs(session.append(ids, "prefill") - want[-1]).max()
        check(off <= F32_LOGITS, f"random model {number}: prefill off by {off:.2g}")
        session.close(), model.close()
    print(f"models: {count} random f32 models, logits off by {worst:.2g}, allowed {F32_LOGITS}")
    test_far(engine, folder)


def test_far(engine, folder):
    """Positions far out: angles, many blocks of keys, a window that has long wrapped."""
    config = ref.hf_config(layers="LGL", sliding_window=100, max_position_embeddings=4096,
                           head_dim=16, query_pre_attn_scalar=16)
    hf, rng = ref.hf_model(config, seed=SEED), random.Random(SEED)
    ids = [2] + [rng.randrange(config.vocab_size) for _ in range(1999)]
    path = os.path.join(folder, "far")
    ref.save_checkpoint(hf, path, make_golden.tiny_tokenizer())
    make_golden.export(path, path + ".bin", "--type", "f32")
    model = ref.Model(engine, path + ".bin")
    off = abs(engine_logits(model, ids, rng, 256) - ref.hf_logits(hf, ids)).max(1)
    check(off.max() <= F32_LOGITS, f"2000 tokens: logits off by {off.max():.2g}")
    print(f"models: 2000 tokens, logits off by {off.max():.2g}")
    model.close()


# ---- sessions -------------------------------------------------------------------------


class Shadow:
    """A session and what it should hold."""

    def __init__(self, model, rng):
        self.params = dict(window=rng.choice((0, 3, 8)), cache_type=rng.choice((1, 2)))
        self.n_batch = rng.choice((1, 4, 16, 33))
        self.session = ref.Session(model, n_batch=self.n_batch, n_context=200,
                                   n_threads=rng.choice((1, 2, 3)), **self.params)
        self.ids, self.high = [], 0  # high: the most tokens it ever held

    def expected(self, model, known):
        """Logits after ids, from single steps of a fresh session.  known caches them."""
        key = (*self.params.values(), *self.ids)
        if key not in known:
            s = ref.Session(model, n_batch=1, n_context=200, **self.params)
            for i in range(len(self.ids)):
                out = s.append(self.ids[i:i + 1])
                known[(*self.params.values(), *self.ids[:i + 1])] = out
            s.close()
        return known[key]


def test_sessions(engine, folder, steps=150):
    """Sessions of all kinds append alone and together, rewind and continue.  Their logits
    have the bits of single steps."""
    path, wrong = os.path.join(ref.GOLDEN, "mixed.bin"), []
    model, rng, known = ref.Model(engine, path, exact=True), random.Random(SEED), {}
    shadows = [Shadow(model, rng) for _ in range(6)]
    for _ in range(steps):
        s = rng.choice(shadows)
        room = 199 - len(s.ids)
        if room < 40 or rng.randrange(4) == 0:
            wrong += rewind(s, rng)
        elif rng.randrange(2):
            ids = [rng.randrange(337) for _ in range(rng.randrange(1, 40))]
            s.ids += ids
            got = s.session.append(ids, rng.choice(("eval", "prefill")))
            wrong += [] if np.array_equal(got, s.expected(model, known)) else ["append"]
        else:
            wrong += share_pass(model, s, rng.choice(shadows), known, rng)
    check(not wrong, f"sessions: {len(wrong)} of {steps} steps went wrong: {wrong[:3]}")
    for s in shadows:
        s.session.close()
    model.close()
    print(f"sessions: {steps} random steps of {len(shadows)} sessions")


def rewind(s, rng):
    """Goes back, mostly a little.  The engine may refuse a position more than n_batch before
    the session's furthest, as its window may be overwritten."""
    s.high = max(s.high, len(s.ids))
    back = min(len(s.ids), rng.choice((1, 2, s.n_batch, 20, 200)))
    status = s.session.lib.gemma2_rewind(s.session.handle, len(s.ids) - back)
    if status >= 0:
        s.ids = s.ids[:len(s.ids) - back]
        s.high = s.high if s.ids else 0
    elif s.high - (len(s.ids) - back) <= s.n_batch or back == len(s.ids):
        return [f"rewind by {back} of {len(s.ids)}"]
    return []


def share_pass(model, a, b, known, rng):
    """A pass with rows of one session or two: each row has the logits of single steps."""
    rows = [(a, rng.randrange(337)) for _ in range(rng.randrange(1, a.n_batch + 1))]
    if b is not a and len(b.ids) < 190:
        n = min(a.n_batch - len(rows), b.n_batch, 9)
        rows += [(b, rng.randrange(337)) for _ in range(n)]
    out = np.empty((len(rows), model.config.n_vocab), np.float32)
    packed = (ref.Row * len(rows))(*[ref.Row(s.session.handle, t, out[i].ctypes.data)
                                     for i, (s, t) in enumerate(rows)])
    if model.lib.gemma2_eval_rows(ref.C.addressof(packed), len(rows)) < 0:
        return ["eval_rows"]
    wrong = []
    for i, (s, t) in enumerate(rows):
        s.ids.append(t)
        if not np.array_equal(out[i], s.expected(model, known)):
            wrong.append(f"row {i} of {len(rows)} in a shared pass")
    return wrong


def check_header(path, config, what):
    """The header says what config.json says."""
    f = ref.Bin(path)
    local = [int(kind == "sliding_attention") for kind in config.layer_types]
    want = dict(
        L=config.num_hidden_layers, D=config.hidden_size, N=config.num_attention_heads,
        K=config.num_key_value_heads, H=config.head_dim, F=config.intermediate_size,
        V=config.vocab_size, W=config.sliding_window, local=local,
        context=config.max_position_embeddings, eps=np.float32(config.rms_norm_eps),
        rope_theta=config.rope_parameters["rope_theta"],
        attn_softcap=config.attn_logit_softcapping or 0,
        final_softcap=config.final_logit_softcapping or 0,
        query_scale=np.float32(config.query_pre_attn_scalar ** -0.5),
        embedding_scale=ref.bf16_round(config.hidden_size ** 0.5), file_bytes=len(f.data))
    wrong = {k: (f.header[k], v) for k, v in want.items() if f.header[k] != v}
    check(not wrong, f"{what}: header has, and should have, {wrong}")
    check(not f.digest_faults(), f"{what}: digests of {f.digest_faults()}")


# ---- number formats -------------------------------------------------------------------

# (largest relative error of a tensor of normal values, KL to the f32 model in nats).
FORMATS = {"f32": (0.0, 1e-9), "bf16": (0.0018, 3e-6), "q8": (0.006, 5e-5),
           "q6": (0.022, 5e-4), "q4": (0.075, 5e-3), "q3": (0.15, 2e-2)}


def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p, q):
    """Mean KL(p || q) of rows of logits, in nats."""
    p, q = log_softmax(p), log_softmax(q)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def check_tensors(kind, f, state, limit):
    """The largest relative error of a stored tensor, which must not exceed limit."""
    worst = 0.0
    for (role, layer), s in f.sections.items():
        name = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight",
                "final_norm": "model.norm.weight"}.get(role)
        name = name or f"model.layers.{layer}.{ref.HF_NAMES.get(role)}.weight"
        if s["type"] == "bytes":
            continue
        w = state[name].numpy().reshape(s["rows"], s["cols"])
        lost = f.tensor(role, layer) - w
        worst = max(worst, float(np.sqrt((lost ** 2).sum() / (w ** 2).sum())))
    check(worst <= limit, f"{kind}: a tensor lost {worst:.4f} of its size, allowed {limit}")
    return worst


def test_formats(engine, folder, prompts=30, length=8):
    """Each number format: the engine against transformers with the dequantised weights and,
    in quantised formats, the same int8 activations.  With int8 a difference in the last bit
    of a float can turn one rounding over, which moves the rest of its prompt by a quantum.
    So the median of many short prompts must meet the f32 tolerance, the worst prompt may be
    off by a quantum of these models, and the KL covers all prompts."""
    config = ref.hf_config(layers="LGL", hidden_size=300, num_attention_heads=6,
                           num_key_value_heads=3, head_dim=34, intermediate_size=523,
                           query_pre_attn_scalar=40, sliding_window=5)
    hf = ref.hf_model(config, seed=77 + SEED)
    rng = random.Random(SEED)
    texts = [[2] + [rng.randrange(config.vocab_size) for _ in range(length - 1)]
             for _ in range(prompts)]
    path = os.path.join(folder, "formats")
    ref.save_checkpoint(hf, path, make_golden.tiny_tokenizer())
    exact, state = np.stack([ref.hf_logits(hf, ids) for ids in texts]), hf.state_dict()
    test_odd_rows()
    for kind, (loss, kl_to_f32) in FORMATS.items():
        make_golden.export(path, path + ".bin", "--type", kind, "--head", kind)
        f = ref.Bin(path + ".bin")
        lost = check_tensors(kind, f, state, loss)
        dequantised = ref.hf_from_bin(f)
        want = np.stack([ref.hf_logits(dequantised, ids) for ids in texts])
        got = np.stack([short_logits(engine, path + ".bin", ids) for ids in texts])
        off = abs(got - want).max((1, 2))
        kl, kl_same = divergence(exact, got), divergence(want, got)
        quantised = kind in ref.GROUP_BYTES
        check(np.median(off) <= 1e-4, f"{kind}: the median prompt is off by {np.median(off):.2g}")
        check(off.max() <= (0.5 if quantised else 1e-4), f"{kind}: off by {off.max():.2g}")
        check(kl_same <= 1e-6, f"{kind}: KL to the same arithmetic is {kl_same:.2g}")
        check(kl <= kl_to_f32, f"{kind}: KL to f32 is {kl:.2g}, allowed {kl_to_f32}")
        print(f"formats: {kind:4} tensors lose {lost:.5f}; logits off by {np.median(off):.2g} "
              f"(median prompt), {off.max():.2g} (worst), KL {kl_same:.2g}; "
              f"KL to f32 {kl:.2g}", flush=True)


def test_odd_rows():
    """Rows of zeros, of nearly nothing, and with a weight of 1e4 among weights of 1."""
    sys.path.insert(0, ref.ROOT)
    import export
    w = np.random.default_rng(SEED).normal(size=(5, 300)).astype(np.float32)
    w[1], w[2, 5], w[3, :32], w[4] = 0, 1e4, 0, w[4] * np.float32(1e-35)
    for kind in ref.GROUP_BYTES:
        data, _ = export.TYPES[kind].pack(w, None)
        got = ref.dequantise(kind, data, *w.shape)
        check(not got[1].any() and not got[3, :32].any() and not got[4].any(),
              f"{kind}: zeros came back as something")
        off = np.linalg.norm(got[2] - w[2]) / 1e4
        check(off <= 0.02, f"{kind}: the row of an outlier is off by {off:.3f} of it")


def short_logits(engine, path, ids):
    """Logits of a prompt in two passes, with keys and values in f32."""
    model = ref.Model(engine, path)
    session = ref.Session(model, n_batch=len(ids), cache_type=1)
    out = np.concatenate([session.rows(ids[:3]), session.rows(ids[3:])])
    session.close(), model.close()
    return out


# ---- tokens ---------------------------------------------------------------------------


def test_tokens(engine, folder, count=10000):
    """10,000 random texts and id lists against SentencePiece with the vocabulary of
    tokenizer.bin.  First that vocabulary must be Gemma's."""
    import sentencepiece
    path = os.path.join(ref.ROOT, "tokenizer.bin")
    ids, pieces = ref.Bin(path).vocabulary()
    check(ref.vocabulary_digest(pieces) == ref.GEMMA_VOCABULARY, "tokenizer.bin is not Gemma's")
    check(ids == dict(bos=2, eos=1, pad=0, unk=3, start_of_turn=106, end_of_turn=107),
          f"ids of tokenizer.bin: {ids}")
    check_markers(pieces)
    sp = sentencepiece.SentencePieceProcessor(model_proto=ref.sentencepiece_model(pieces))
    every, plain = ref.Bpe(pieces), ref.Bpe(pieces, plain=True)
    model, rng = ref.Model(engine, path), random.Random(SEED)
    wrong = {"encode": [], "reference": [], "plain": [], "decode": []}
    for _ in range(count):
        text, out = ref.random_text(rng, pieces), ref.random_ids(rng, pieces)
        want = sp.encode(text)
        for name, a, b in (("encode", model.encode(text), want),
                           ("reference", every.encode(text), want),
                           ("plain", model.encode(text, 2), plain.encode(text))):
            if a != b:
                wrong[name].append((text, a, b))
        if model.decode(out) != sp.decode(out).encode():
            wrong["decode"].append((out, model.decode(out), sp.decode(out).encode()))
    model.close()
    for name, cases in wrong.items():
        check(not cases, f"tokens, {name}: {len(cases)} of {count} differ, first {cases[:1]}")
    print(f"tokens: {count} texts and id lists")


def check_markers(pieces):
    """Markers are the control strings that a stranger's text must not form, not tags or runs."""
    want = {b"<mask>", b"<start_of_turn>", b"<end_of_turn>"}
    want |= {f"<unused{i}>".encode() for i in range(100)}
    have = {t for t, _, k in pieces if k == ref.MARKER}
    check(want <= have, f"no markers: {sorted(want - have)[:5]}")
    extra = have - want - {b"<2mass>", b"[@BOS@]", b"[toxicity=0]"}
    check(not extra, f"markers: {sorted(extra)[:5]}")


# ---- the demo model -------------------------------------------------------------------


def test_story(engine, folder):
    """The greedy text of the demo model that `make test` expects.  With the dequantised weights
    transformers must score each token highest, or within rounding of the highest."""
    path = os.path.join(ref.ROOT, "tests", "demo", "story-q8.bin")
    with open(os.path.join(ref.GOLDEN, "story.txt")) as f:
        prompt, ids = ([int(t) for t in line.split()[3:]] for line in f)
    prompt = [2] + prompt
    hf = ref.hf_from_bin(ref.Bin(path))
    logits = ref.hf_logits(hf, prompt + ids[:-1])[len(prompt) - 1:]
    gaps = logits.max(-1) - logits[np.arange(len(ids)), ids]
    check(gaps.max() <= 0.02, f"story: a token trails by {gaps.max():.3f}")
    print(f"story: {int((gaps == 0).sum())} of {len(ids)} greedy tokens are transformers' own, "
          f"the others trail by {gaps.max():.2g}")


def test_trace(engine, folder):
    """Every class, member and function that `run --trace` names exists in transformers."""
    from transformers.models.gemma2 import modeling_gemma2
    path = os.path.join(ref.GOLDEN, "both.bin")
    owners = {type(m).__name__: m for m in ref.hf_from_bin(ref.Bin(path)).modules()}
    text = subprocess.run([os.path.join(ref.ROOT, "run"), path, "--trace", "--ids", "2 7"],
                          capture_output=True, text=True).stdout
    steps = re.findall(r"^(\w+) +\[.*\((.*)\)$", text, re.M)
    check(len({step for step, _ in steps}) == 16, f"trace: {len(steps)} lines name a source")
    names = {name for _, source in steps for name in source.split(", ") if "report" not in name}
    for name in names:
        owner, _, member = name.partition(".")
        known = hasattr(owners.get(owner), member) if member else hasattr(modeling_gemma2, owner)
        check(known, f"trace: transformers has no {name}")
    print(f"trace: {len(names)} names")


# ---------------------------------------------------------------------------------------

SECTIONS = {"models": test_models, "sessions": test_sessions, "formats": test_formats,
            "tokens": test_tokens, "story": test_story, "export": oracle_export.test_export,
            "gguf": oracle_gguf.test_gguf, "sbs": oracle_sbs.test_sbs,
            "arrays": oracle_arrays.test_arrays, "lora": oracle_lora.test_lora,
            "memory": oracle_memory.test_memory, "packed": oracle_packed.test_packed,
            "quality": oracle_quality.test_quality, "chat": oracle_chat.test_chat,
            "schema": oracle_schema.test_schema, "trace": test_trace,
            "spark": oracle_spark.test_spark,
            "states": oracle_states.test_states, "traps": oracle_traps.test_traps}


def main():
    import torch
    import transformers
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        engine = ref.build_engine(folder)
        for name in sys.argv[1:] or SECTIONS:
            began = time.time()
            SECTIONS[name](engine, folder)
            print(f"({name}: {time.time() - began:.0f} s)", flush=True)
    print(f"{check.passed} passed, {check.failed} failed")
    return check.failed > 0


if __name__ == "__main__":
    sys.exit(main())
