"""The exporter's readers of PyTorch, Keras and Flax checkpoints: the tensors of one random
model, written in every layout of these libraries, come out bit for bit.  Hostile files are
refused in one sentence.

torch writes the PyTorch files.  Orbax and tensorstore write Flax's, tensorstore the odd and bad
files.  h5py writes Keras's in the layout of keras-hub 0.32 (Keras 3.15).  That package needs
TensorFlow, which is too large for every test.  Its own files were converted once, with the same
result."""
import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import struct
import sys
import zipfile

import numpy as np

import make_golden
import reference as ref
from oracle_export import apart, check_exact
from reference import check

import export

NORMS = {"attn_norm": "pre_attention_norm", "post_attn_norm": "post_attention_norm",
         "ffn_norm": "pre_ffw_norm", "post_ffn_norm": "post_ffw_norm"}
TYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


class Source:
    """A random model: source[the exporter's name] is a tensor."""

    def __init__(self, dtype="float32", **facts):
        import torch
        facts = {"layers": "LG", "intermediate_size": 40, "query_pre_attn_scalar": 10,
                 "sliding_window": 4096, **facts}
        self.hf = ref.hf_model(ref.hf_config(**facts), seed=5).to(getattr(torch, dtype))
        self.facts, self.dtype, c = self.hf.config, dtype, self.hf.config
        self.N, self.K, self.H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.D, self.F, self.L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
        self.state = self.hf.state_dict()  # the model's own tensors: an edit changes the model

    def __getitem__(self, name):
        layer, _, role = name.rpartition(".")
        hf = {"embedding": "model.embed_tokens", "final_norm": "model.norm"}.get(
            role) or f"model.{layer}.{ref.HF_NAMES[role]}"
        return self.state[hf + ".weight"]

    def heads(self, name):
        """[heads, D, H] of q, k or v [heads * H, D]."""
        return self[name].reshape(-1, self.H, self.D).transpose(1, 2).contiguous()

    def out_heads(self, layer):
        """[N, H, D] of o [D, N * H]."""
        return self[f"layers.{layer}.o"].t().reshape(self.N, self.H, self.D).contiguous()


def plain(tensor):
    """A tensor as a numpy array, bf16 as its bits."""
    import torch
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.contiguous().numpy()


def typed(tensor):
    """A tensor as a numpy array, bf16 in ml_dtypes' type."""
    import ml_dtypes
    data = plain(tensor)
    return data.view(ml_dtypes.bfloat16) if data.dtype == np.uint16 else data


def fresh(folder, name="checkpoint", tokenizer=True):
    """A new directory with nothing but the tests' tokenizer."""
    path = os.path.join(folder, name)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    if tokenizer:
        with open(os.path.join(path, "tokenizer.model"), "wb") as f:
            f.write(make_golden.tiny_tokenizer())
    return path


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f)


# Each conversion runs in its own process, forked from a server that has imported the libraries.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "export", "h5py", "tensorstore"])


def run_export(arguments, log):
    """export.py's main in this process, with all output in the file log."""
    with open(log, "w") as f, contextlib.redirect_stderr(f), contextlib.redirect_stdout(f):
        sys.exit(export.main(arguments))


def converted(*arguments):
    """(exit status, output) of export.py."""
    log = arguments[0].rstrip("/") + ".log"
    process = FORKS.Process(target=run_export, args=(list(arguments), log))
    process.start()
    process.join(600)
    with open(log) as f:
        return process.exitcode, f.read()


def exact(path, source, what, engine=None, expect=(), warns=""):
    """Converts to f32: every weight is the source's and, with an engine, so are the logits."""
    out = path.rstrip("/") + ".out.bin"
    status, said = converted(path, out, "--type", "f32", "-q")
    if not check(status == 0, f"{what}: exit {status}: {said.strip()}"):
        return
    f = check_exact(source, out, what)
    for key, value in dict(expect).items():
        check(f.header[key] == value, f"{what}: {key} is {f.header[key]}, not {value}")
    check(warns in said, f"{what}: no warning of {warns!r} in {said!r}")
    if engine:
        ids = [2, 17, 300, 5, 46, 200, 11, 98, 7]
        model = ref.Model(engine, out)
        session = ref.Session(model, n_batch=len(ids), cache_type=1)
        off = abs(session.rows(ids) - ref.hf_logits(source.hf, ids)).max()
        session.close(), model.close()
        check(off <= 1e-4, f"{what}: logits off by {off:.2g}")
    os.remove(out)


def refused(path, what, *words):
    """A conversion that must fail: status 1, one sentence that holds the words, no file."""
    place = fresh(os.path.dirname(path.rstrip("/")), "place", tokenizer=False)
    check_refusal(*converted(path, os.path.join(place, "out.bin")), place, what, words)


def refused_without(path, library, *words, text="raise ImportError('not here')\n"):
    """The same where a library is missing, or is a module of this text."""
    folder = os.path.dirname(path.rstrip("/"))
    place, stubs = (fresh(folder, n, tokenizer=False) for n in ("place", "stubs"))
    with open(os.path.join(stubs, library + ".py"), "w") as f:
        f.write(text)
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = stubs
    run = apart(path, os.path.join(place, "out.bin"))
    os.environ.pop("PYTHONPATH") if kept is None else os.environ.update(PYTHONPATH=kept)
    check_refusal(run.returncode, run.stderr, place, "no " + library, words)


def check_refusal(status, said, place, what, words):
    lines = said.strip().split("\n")
    check(status == 1, f"{what}: exit {status}: {said[-300:]}")
    check("Traceback" not in said and lines[-1].startswith("export.py: "),
          f"{what}: says {said[-300:]!r}")
    check(all(w in lines[-1] for w in words), f"{what}: {words} not in {lines[-1]!r}")
    check(not os.listdir(place), f"{what}: leaves {os.listdir(place)}")


# ---- PyTorch ------------------------------------------------------------------------------


def gemma_pytorch(source, angles=True):
    """A state dict as gemma_pytorch names and fuses it."""
    import torch
    out = {"embedder.weight": source["embedding"], "model.norm.weight": source["final_norm"]}
    for i in range(source.L):
        at = f"model.layers.{i}."
        out[at + "self_attn.qkv_proj.weight"] = torch.cat(
            [source[f"layers.{i}.{c}"] for c in "qkv"])
        for role in ("o", "gate", "up", "down", *NORMS):
            out[f"{at}{ref.HF_NAMES[role]}.weight"] = source[f"layers.{i}.{role}"]
    if angles:
        out["freqs_cis"] = torch.polar(torch.ones(64, source.H // 2), torch.ones(64, source.H // 2))
    return out


def quantised(source):
    """The same state dict in int8, a scale for each row; source takes the dequantised weights."""
    import torch
    for name, w in source.state.items():
        if w.ndim == 2 and name != "lm_head.weight":  # lm_head is embed_tokens
            scale = w.abs().amax(1, keepdim=True) / 127
            w.copy_(torch.round(w / scale) * scale)
    out = {}
    for name, w in gemma_pytorch(source).items():
        if w.ndim == 2 and name != "freqs_cis":
            scale = w.abs().amax(1, keepdim=True) / 127
            q = torch.round(w / scale)
            out[name], out[name + "_scaler"] = q.to(torch.int8), scale[:, 0]
        else:
            out[name] = w
    return out


def save(folder, state, name="model.ckpt", wrap=True, **how):
    """A directory with one file; returns the directory."""
    import torch
    path = fresh(folder)
    torch.save({"model_state_dict": state} if wrap else state, os.path.join(path, name), **how)
    return path


def save_parts(folder, state, names):
    """A directory with the state cut into files of these names, without an index."""
    import torch
    path = fresh(folder)
    for i, name in enumerate(names):
        torch.save({n: state[n] for n in sorted(state)[i::len(names)]}, os.path.join(path, name))
    return path


def save_shards(folder, state, count=3, ending=".bin"):
    import torch
    path, where = fresh(folder), {}
    for i in range(count):
        names = sorted(state)[i::count]
        shard = f"pytorch_model-{i + 1:05}-of-{count:05}{ending}"
        torch.save({n: state[n] for n in names}, os.path.join(path, shard))
        where.update({n: shard for n in names})
    write_json(os.path.join(path, "pytorch_model.bin.index.json"), {"weight_map": where})
    return path


def test_torch_good(engine, folder):
    for dtype in TYPES:
        source = Source(dtype)
        path = save(folder, gemma_pytorch(source))
        exact(path, source, f"gemma_pytorch {dtype}", engine if dtype == "float32" else None,
              dict(W=4096, attn_softcap=50, final_softcap=30, context=8192))
    source = Source()
    exact(os.path.join(path, "model.ckpt"), Source("float16"), "one .ckpt")
    exact(save_shards(folder, gemma_pytorch(source)), source, "gemma_pytorch in shards")
    state = quantised(source)
    exact(save(folder, state), source, "gemma_pytorch int8")
    source = Source(tie_word_embeddings=False)
    for path in save(folder, source.state, "pytorch_model.bin", wrap=False), save_shards(
            folder, source.state):
        write_json(os.path.join(path, "config.json"), source.facts.to_dict())
        exact(path, source, "Hugging Face names")
    source = Source(sliding_window=8)
    path = save(folder, gemma_pytorch(source, angles=False))
    refused(path, "no head_dim", "hidden size 42", "2B, 9B or 27B", "config.json")
    write_json(os.path.join(path, "config.json"), source.facts.to_dict())
    exact(path, source, "config.json beside", expect=dict(W=8))
    test_torch_kaggle(folder)
    test_torch_parts(folder)
    test_torch_wrapped(folder)
    test_head_dim()
    test_one_file(folder)


PARTS = [  # names by torchtune, old and new, and by other programs
    ["hf_model_0001_0.pt", "hf_model_0002_0.pt"],
    ["ft-model-00001-of-00003.bin", "ft-model-00002-of-00003.bin", "ft-model-00003-of-00003.bin"],
    ["model-1-of-2.pth", "model-2-of-2.pth"], ["pytorch_model-00001-of-00001.bin"]]


def test_torch_parts(folder):
    """Numbered files without an index.  The argument is their directory or any of the files, and
    a trainer's other files lie beside them."""
    import torch
    source = Source(tie_word_embeddings=False)
    for names in PARTS:
        path = save_parts(folder, source.state, names)
        write_json(os.path.join(path, "config.json"), source.facts.to_dict())
        for n in ("recipe_state.pt", "optimizer.pt", "training_args.bin", "adapter_0.pt",
                  "adapter_model.safetensors"):
            torch.save({"seed": 1}, os.path.join(path, n))
        exact(path, source, f"parts {names[0]}")
        exact(os.path.join(path, names[-1]), source, f"a part {names[-1]}")
        if len(names) > 1:
            os.remove(os.path.join(path, names[0]))
            refused(path, f"parts without {names[0]}", "fetch the others")
    path = save_parts(folder, source.state, PARTS[0])
    write_json(os.path.join(path, "config.json"), source.facts.to_dict())
    for n in PARTS[0]:
        torch.save({"norm.weight": torch.ones(3)}, os.path.join(path, n.replace("_0.", "_1.")))
    refused(path, "two epochs", "several", "hf_model_0001_0.pt", "hf_model_0001_1.pt")
    exact(os.path.join(path, PARTS[0][0]), source, "one epoch of two")


def test_torch_wrapped(folder):
    """State dicts of wrapped models, among what Lightning keeps beside them."""
    import torch
    source = Source()
    state = {k: v for k, v in source.state.items() if k != "lm_head.weight"}
    for what, made in (
            ("Lightning", {"state_dict": {"model." + k: v for k, v in state.items()}, "epoch": 3,
                           "loops": {"fit": [1.5, None, True]}, "lr_schedulers": [],
                           "hyper_parameters": argparse.Namespace(lr=np.float64(1), p={1, "x"})}),
            ("parameters", {k: torch.nn.Parameter(v) for k, v in state.items()}),
            ("DeepSpeed", {"module": {"_orig_mod." + k: v for k, v in state.items()}}),
            ("DDP", {"module." + k: v for k, v in state.items()}),
            ("PEFT", {"base_model.model." + k: v for k, v in state.items()})):
        for protocol in 2, 5:
            path = save(folder, made, "last.ckpt", wrap=False, pickle_protocol=protocol)
            write_json(os.path.join(path, "config.json"), source.facts.to_dict())
            exact(path, source, f"a state dict of {what}, protocol {protocol}")
    state = gemma_pytorch(source)
    exact(save(folder, {"_orig_mod." + k: v for k, v in state.items()}), source, "fused, compiled",
          expect=dict(W=4096))
    head = Source(tie_word_embeddings=False)
    path = save(folder, head.state, "pytorch_model.bin", wrap=False)
    write_json(os.path.join(path, "config.json"), {**head.facts.to_dict(),
                                                   "tie_word_embeddings": True})
    exact(path, head, "a head of its own, tied", warns="is kept")


def test_torch_kaggle(folder):
    """Directories as Kaggle has them: named by a version, with a config.json that says next to
    nothing, or with shards that end in .ckpt."""
    source = Source()
    path = save(folder, gemma_pytorch(source))
    for little in ({"model_type": "gemma2"}, {"architectures": ["GemmaForCausalLM"]}, {}):
        write_json(os.path.join(path, "config.json"), little)
        write_json(os.path.join(path, "generation_config.json"), {"eos_token_id": [1, 7]})
        exact(path, source, f"config.json {little}", expect=dict(W=4096, stop=[1, 7, 5]))
    write_json(os.path.join(path, "config.json"), {"model_type": "gemma"})
    refused(path, "config.json of Gemma 1", '"gemma", but', "only Gemma 2")
    path = save_shards(folder, gemma_pytorch(source), ending=".ckpt")
    exact(path, source, "shards that end in .ckpt")
    exact(os.path.join(path, "pytorch_model-00002-of-00003.ckpt"), source, "one shard for all")
    version = fresh(folder, "gemma-2-2b-it", tokenizer=False) + "/1"
    os.rename(path, version)
    out = os.path.join(folder, "named.bin")
    status, said = converted(version, out)
    if check(status == 0, f"a version's directory: {said}"):
        name = ref.Bin(out).facts()["name"]
        check(name == "gemma-2-2b-it", f"a version's directory is named {name}")
    for ending in (".tar.gz", ".zip", ".keras"):
        path = fresh(folder)
        archive = os.path.join(path, "archive" + ending)
        with open(archive, "wb") as f:
            f.write(b"\x1f\x8b or PK")
        refused(archive, "an archive", "archive" + ending, "of an archive")
        refused(path, "an archive in a directory", "of an archive")


def released(folder, D, N, K, H, F, L):
    """A file as ComfyUI has it: the tokenizer is a tensor, and there is no config.json.  The
    weights are zeros that take no room."""
    import oracle_memory  # here, because it imports this file
    path = fresh(folder, tokenizer=False)
    widths = dict(D=D, N=N, K=K, H=H, F=F)
    shapes = {"model.embed_tokens.weight": [256000, D], "model.norm.weight": [D]}
    for i in range(L):
        at = f"model.layers.{i}."
        shapes.update({at + n + ".weight": s for n, s in oracle_memory.matrices(**widths).items()})
        shapes.update({at + ref.HF_NAMES[n] + ".weight": [D] for n in NORMS})
    text = make_golden.tiny_tokenizer()
    file = os.path.join(path, "gemma_2_fp16.safetensors")
    oracle_memory.sparse_safetensors(file, "BF16", shapes, {"spiece_model": text})
    return file, text


def test_one_file(folder):
    """In one file shapes tell the released size, and a tensor is the tokenizer."""
    for D, N, K, H, F, L, scale in ((2304, 8, 4, 256, 9216, 26, 1 / 16),
                                    (3584, 16, 8, 256, 14336, 42, 1 / 16),
                                    (4608, 32, 16, 128, 36864, 46, 1 / 12)):
        file, text = released(folder, D, N, K, H, F, L)
        for given in file, os.path.dirname(file):
            reader = export.open_checkpoint(given)
            export.check_shapes(reader)
            m = reader.model
            check((m.L, m.N, m.K, m.H, m.F, m.V) == (L, N, K, H, F, 256000),
                  f"one file of {D}: {vars(m)}")
            check(m.query_scale == np.float32(scale) and m.window == 4096, f"one file of {D}")
            path, tokenizer = reader.tokenizer()
            check(path == file and tokenizer.pieces == export.sentencepiece_tokenizer(
                text, "x").pieces, f"one file of {D}: tokenizer")
        export.handles.clear()
    os.remove(file)


def test_head_dim():
    """The sizes of the released models from the shapes of their checkpoints alone."""
    for D, N, K, H, F, scalar in ((2304, 8, 4, 256, 9216, 256), (3584, 16, 8, 256, 14336, 256),
                                  (4608, 32, 16, 128, 36864, 144)):
        def shape(*dims):
            return export.Stored("x", "BF16", dims, 0)
        stored = {"layers.0.o": shape(D, N * H), "layers.0.qkv": shape((N + 2 * K) * H, D),
                  "layers.0.gate": shape(F, D), "layers.0.post_ffn_norm": shape(D)}
        reader = export.PyTorch.__new__(export.PyTorch)
        reader.files, reader.tensors = ["x"], stored
        m = reader.model_of_shapes([])
        check((m.D, m.N, m.K, m.H, m.F) == (D, N, K, H, F), f"sizes of {D}: {vars(m)}")
        check(m.query_scale == np.float32(scalar ** -0.5), f"query scale of {D}: {m.query_scale}")


PICKLES = [  # what, bytes, words of the refusal
    ("a gigabyte asked for", b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0@\x85R.", "bytearray"),
    ("a large memo", b"\x80\x02Nr\xff\xff\xff\xff.", "no dictionary"),
    ("a large text", b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "pickle"),
    ("a call of no function", b"\x80\x02N)R.", "pickle"), ("no mark", b"\x80\x02t.", "pickle"),
    ("nothing", b"\x80\x02.", "pickle"), ("an extension", b"\x80\x02\x82\x01.", "extension"),
    ("a memo never written", b"\x80\x02h\x05.", "pickle"),
    ("a storage of numbers", b"\x80\x02K\x01K\x02K\x03\x87Q.", "pickle"),
    ("a storage made by hand", b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((]"
     b"X\x01\0\0\0000tK\0K\1\x85K\1\x85\x89}tRs.", "no plain tensor"),
    ("tuples in tuples", b"\x80\x02)" + b"\x85" * 200000 + b"}N.", "no dictionary"),
    ("a key of tuples", b"\x80\x02})" + b"\x85" * 200000 + b"Ns.", "lacks"),
]


class Evil:
    """An object that leaves a file behind when a careless reader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Replaces each member of a .ckpt by change(name, bytes)."""
    with zipfile.ZipFile(path) as z:
        members = [(i.filename, change(i.filename, z.read(i))) for i in z.infolist()]
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in members:
            z.writestr(name, data)


def test_torch_bad(folder):
    import torch
    source = Source()
    state = gemma_pytorch(source)
    qkv, o = ("model.layers.1.self_attn." + n for n in ("qkv_proj.weight", "o_proj.weight"))

    def spoilt(what, change, *words):
        edited = {k: v.clone() for k, v in state.items()}
        change(edited)
        refused(save(folder, edited), what, *words)

    def put(name, value):
        return lambda s: s.__setitem__(name, value)
    spoilt("NaN", lambda s: s[o].view(-1).__setitem__(3, float("nan")), "layers.1.o")
    spoilt("unknown tensor", put("surprise", torch.ones(3)), "surprise")
    spoilt("missing tensor", lambda s: s.pop(o), "layers.1.o")
    spoilt("missing first layer", lambda s: s.pop(o.replace("1", "0")), "layers.0.o")
    spoilt("wrong shape", put(o, torch.ones(42, 50)), "layers.1.o", "shape")
    spoilt("wrong qkv", put(qkv, torch.ones(90, 42)), "layers.1.qkv", "shape")
    spoilt("a column too few", put(qkv, torch.ones(100, 41)), "layers.1.qkv", "shape")
    spoilt("fused and not", put(qkv.replace("qkv", "q"), torch.ones(60, 42)), "twice")
    spoilt("f64", put(o, torch.ones(42, 60).double()), "F64")
    spoilt("int8 without scale", put(o, torch.ones(42, 60, dtype=torch.int8)), "I8", "scales")
    spoilt("scale without int8", put(o + "_scaler", torch.ones(42)), "o_proj", "not I8")
    spoilt("stray scale", put("x.weight_scaler", torch.ones(42)), "x is", "part weight")
    spoilt("short scale", lambda s: s.update({o: s[o].to(torch.int8), o + "_scaler":
                                              torch.ones(41)}), "weight_scaler")
    spoilt("columns first", put(o, torch.ones(60, 42).t()), "row by row", "contiguous")
    spoilt("negated when read", put(o, torch._neg_view(state[o])), o, "no plain tensor")
    spoilt("sparse", put(o, torch.ones(42, 60).to_sparse()), o, "no plain tensor")
    spoilt("odd angles", put("freqs_cis", torch.ones(4, 7)), "hidden size 42")
    spoilt("no norms after", lambda s: [s.pop(n) for n in list(s) if "feedforward" in n], "Gemma 1")
    spoilt("no tensor", put("epoch", 3), "epoch")
    refused(save(folder, state | {"norm.weight": state["model.norm.weight"]}), "two names", "twice",
            "final_norm")
    refused(save(folder, [torch.ones(3)], wrap=False), "a list", "state_dict")
    refused(save(folder, {1: torch.ones(3)}), "numbers as names", "state_dict")
    test_torch_pickles(folder, state)
    test_torch_files(folder, state)


def test_torch_pickles(folder, state):
    """Code in a pickle is refused by name and never run."""
    import torch
    mark = os.path.join(folder, "mark")
    path = save(folder, {**state, "evil": Evil(mark)})
    refused(path, "evil pickle", "open", "nothing was run")
    path = save_shards(folder, state)
    torch.save(Evil(mark), os.path.join(path, "pytorch_model-00002-of-00003.bin"))
    refused(path, "evil shard", "open", "nothing was run")
    torch.save({"model_state_dict": Evil(mark)}, os.path.join(path, "pytorch_model.bin"),
               _use_new_zipfile_serialization=False)
    refused(path, "evil pickle of old", "zip")
    check(not os.path.exists(mark), "a pickle was run")
    torch.save(torch.nn.Linear(2, 2), os.path.join(path, "pytorch_model.bin"))
    refused(path, "a whole module", "torch.nn", "nothing was run")


def test_torch_files(folder, state):
    """Files that are not what they should be."""
    import torch
    path = save(folder, state)
    file = os.path.join(path, "model.ckpt")
    size = os.path.getsize(file)
    rewritten(file, lambda n, d: d[:-8] if n.endswith("data/3") else d)
    refused(path, "a short record", "model.ckpt")
    save(folder, state)
    rewritten(file, lambda n, d: b"big" if n.endswith("byteorder") else d)
    refused(path, "big-endian", "big-endian")
    save(folder, state)
    rewritten(file, lambda n, d: d[:50] if n.endswith("data.pkl") else d)
    refused(path, "half a pickle", "model.ckpt")
    for what, data, words in PICKLES:
        save(folder, state)
        rewritten(file, lambda n, d: data if n.endswith("data.pkl") else d)
        refused(path, what, "model.ckpt", words)
    test_torch_bytes(save(folder, state))
    save(folder, state)
    rewritten(file, lambda n, d: d + b"\0" * (1 << 26) if n.endswith("data.pkl") else d)
    refused(path, "a long pickle", "too long")
    save(folder, state)
    rewritten(file, lambda n, d: d, zipfile.ZIP_DEFLATED)
    refused(path, "compressed", "compressed")
    for keep in (0, 100, size // 2, size - 30):
        save(folder, state)
        os.truncate(file, keep)
        refused(path, f"{keep} of {size} bytes", "model.ckpt")
    save(folder, state)
    with open(file, "r+b") as f:  # claims a directory 1 MiB later: members before the file
        data = f.read()
        at = data.rindex(b"PK\6\6") + 48
        f.seek(at), f.write(struct.pack("<Q", struct.unpack_from("<Q", data, at)[0] + (1 << 20)))
    refused(path, "members before the file", "damaged")
    shutil.copy(os.path.join(ref.ROOT, "tokenizer.bin"), file)
    refused(path, "a file of ours", "no zip archive")
    path = save(folder, state)
    shutil.copy(file, os.path.join(path, "other.ckpt"))
    refused(path, "two files", "several")
    path = save_shards(folder, state)
    os.remove(os.path.join(path, "pytorch_model-00002-of-00003.bin"))
    refused(path, "missing shard", "missing")
    path = save_shards(folder, state)
    shutil.copy(*(os.path.join(path, f"pytorch_model-0000{i}-of-00003.bin") for i in (1, 2)))
    refused(path, "a shard twice", "twice")
    path = save(folder, state)
    stubs = fresh(folder, "stubs", tokenizer=False)
    with open(os.path.join(stubs, "torch.py"), "w") as f:
        f.write("raise ImportError('not here')\n")
    run = apart(path, path + ".bin", env={**os.environ, "PYTHONPATH": stubs})
    check(run.returncode == 0, f"without torch: {run.stderr}")
    os.remove(os.path.join(path, "model.ckpt"))
    torch.save({}, os.path.join(path, "optimizer.pt"))
    refused(path, "an optimizer alone", "holds no")


def test_torch_bytes(path, times=1000):
    """Any byte of the pickle changed: the reader finds tensors that lie in the file, or refuses in
    one sentence."""
    path, rng = os.path.join(path, "model.ckpt"), np.random.default_rng(4)
    at, size = next(v for n, v in export.stored_members(path).items() if n.endswith("/data.pkl"))
    ends, most = {True: 0, False: 0}, os.path.getsize(path)
    with open(path, "rb") as f:
        whole = f.read()
    for _ in range(times):
        i, n = at + rng.integers(0, size), rng.integers(1, 3)
        with open(path, "r+b") as f:
            f.seek(i), f.write(rng.bytes(n)), f.seek(at + size), f.write(whole[at + size:][:2])
        try:
            found = export.torch_tensors(path)
            fits = all(t.offset + np.prod(t.dims, dtype=object) * export.WIDTHS[t.dtype] <= most
                       for t in found.values())
            check(fits, f"byte {i - at} of a pickle: tensors beyond the file")
            ends[True] += 1
        except export.ExportError as e:
            check(len(str(e)) < 600 and "\n" not in str(e), f"a pickle: says {str(e)[:300]!r}")
            ends[False] += 1
        with open(path, "r+b") as f:
            f.seek(at), f.write(whole[at:at + size])
    check(min(ends.values()) > times // 20, f"bytes of a pickle: {ends}")


# ---- Keras ----------------------------------------------------------------------------------


def keras_arrays(source, prefix="layers/", inner="layers/"):
    """{path: tensor} of the datasets that keras-hub's GemmaBackbone saves."""
    out = {prefix + "reversible_embedding": source["embedding"],
           prefix + "rms_normalization": source["final_norm"]}
    for i in range(source.L):
        at, of = f"{prefix}gemma_decoder_block{f'_{i}' if i else ''}/", f"layers.{i}."
        out.update({at + f"attention/{n}_dense": source.heads(of + n[0])
                    for n in ("query", "key", "value")})
        out[at + "attention/output_dense"] = source.out_heads(i)
        out[at + "gating_ffw"] = source[of + "gate"].t()
        out[at + "gating_ffw_2"] = source[of + "up"].t()
        out[at + "ffw_linear"] = source[of + "down"].t()
        out.update({at + k: source[of + n] for n, k in NORMS.items()})
    return {k + "/vars/0": v for k, v in out.items()}


def write_h5(path, arrays):
    """Writes as keras.saving.saving_lib.H5IOStore: bf16 as two opaque bytes and an attribute."""
    import h5py
    with h5py.File(path, "w") as f:
        for name, tensor in arrays.items():
            data = plain(tensor)
            if data.dtype == np.uint16:
                f.create_dataset(name, data=data.view("V2")).attrs["dtype"] = "bfloat16"
            else:
                f[name] = data
        f["layers/input_layer/vars"] = h5py.Empty("f4")
        del f["layers/input_layer/vars"]
        f.create_group("layers/input_layer/vars").attrs["name"] = "token_ids"


def keras_config(source, **changes):
    c = source.facts
    facts = dict(
        vocabulary_size=c.vocab_size, num_layers=source.L, num_query_heads=source.N,
        num_key_value_heads=source.K, hidden_dim=source.D, intermediate_dim=2 * source.F,
        head_dim=source.H, layer_norm_epsilon=1e-6, dropout=0, query_head_dim_normalize=True,
        use_post_ffw_norm=True, use_post_attention_norm=True, final_logit_soft_cap=30,
        attention_logit_soft_cap=50, sliding_window_size=c.sliding_window,
        use_sliding_window_attention=True)
    facts.update(changes)
    return {"module": "keras_hub.src.models.gemma.gemma_backbone", "class_name": "GemmaBackbone",
            "config": facts, "registered_name": "keras_hub>GemmaBackbone"}


def preset(folder, source, arrays=None, shards=1, **changes):
    """A keras-hub preset.  Its tokenizer.json is Keras's own and holds no vocabulary."""
    path = fresh(folder, tokenizer=False)
    place = os.path.join(path, "assets", "tokenizer")
    os.makedirs(place)
    with open(os.path.join(place, "vocabulary.spm"), "wb") as f:
        f.write(make_golden.tiny_tokenizer())
    write_json(os.path.join(path, "tokenizer.json"), {"class_name": "GemmaTokenizer", "config": {}})
    write_json(os.path.join(path, "config.json"), keras_config(source, **changes))
    arrays = arrays or keras_arrays(source)
    if shards == 1:
        write_h5(os.path.join(path, "model.weights.h5"), arrays)
        return path
    where = {}
    for i in range(shards):
        names, file = sorted(arrays)[i::shards], f"model_{i:05}.weights.h5"
        write_h5(os.path.join(path, file), {n: arrays[n] for n in names})
        where.update({f"/{n[:-2]}": file if i else [file] for n in names})
    write_json(os.path.join(path, "model.weights.json"), {"weight_map": where})
    return path


def test_keras_good(engine, folder):
    import torch
    source = Source(layers="LGL")
    exact(preset(folder, source), source, "Keras preset", engine, dict(W=4096, local=[1, 0, 1]))
    for dtype in ("bfloat16", "float16"):
        half = Source(dtype, layers="LGL")
        exact(preset(folder, half, shards=3), half, f"Keras preset {dtype} in shards")
    arrays = keras_arrays(source, "_layer_checkpoint_dependencies/")
    exact(preset(folder, source, arrays), source, "Keras's older paths")
    arrays = keras_arrays(source, "layers/gemma_backbone/layers/")
    arrays["optimizer/vars/0"] = torch.zeros(3, dtype=torch.int32)
    exact(preset(folder, source, arrays), source, "Keras task with optimizer")
    exact(preset(folder, source, query_head_dim_normalize=False), source, "Keras, scale by D / N",
          expect=dict(query_scale=float(np.float32(7 ** -0.5)), final_softcap=30))
    path = preset(folder, source, arrays)
    write_json(os.path.join(path, "config.json"), {
        "class_name": "GemmaCausalLM", "config": {"backbone": keras_config(source)}})
    exact(path, source, "an unpacked .keras archive")
    path = os.path.join(fresh(folder), "mine.weights.h5")
    write_h5(path, keras_arrays(source))
    exact(path, source, "weights alone", expect=dict(W=4096))


def test_keras_bad(folder):
    import h5py
    import torch
    source = Source()
    good = keras_arrays(source)
    query = "layers/gemma_decoder_block_1/attention/query_dense/vars/0"

    def spoilt(what, change, *words, **changes):
        arrays = {k: v.clone() for k, v in good.items()}
        change(arrays)
        refused(preset(folder, source, arrays, **changes), what, *words)

    def put(name, value):
        return lambda a: a.__setitem__(name, value)

    def nothing(arrays):
        pass
    spoilt("NaN", lambda a: a[query].view(-1).__setitem__(7, float("nan")), "layers.1.q")
    spoilt("unknown variable", put("layers/dense/vars/0", torch.ones(3)), "layers/dense")
    spoilt("a second variable", put(query[:-1] + "1", torch.ones(3)), "query_dense/vars/1")
    spoilt("missing variable", lambda a: a.pop(query), "layers.1.q")
    spoilt("wrong shape", put(query, torch.ones(6, 41, 10)), "D 41", "42")
    spoilt("wrong axes", put(query, torch.ones(60, 42)), "3 axes")
    spoilt("f64", put(query, torch.ones(6, 42, 10).double()), "<f8")
    spoilt("bool", put(query, torch.ones(6, 42, 10).bool()), "type")
    spoilt("two paths", put(query.replace("layers", "_layer_checkpoint_dependencies", 1),
                            good[query]), "twice")
    spoilt("Gemma 1", nothing, "Gemma 1", use_post_ffw_norm=False)
    spoilt("another soft-cap", nothing, "final_logit_soft_cap", final_logit_soft_cap=None)
    spoilt("another window", nothing, "sliding_window_size", sliding_window_size=8)
    path = preset(folder, source)
    write_json(os.path.join(path, "config.json"), {"class_name": "Lambda", "config": {
        "function": "__import__('os').system('false')"}})
    refused(path, "a Lambda", "GemmaBackbone")
    file = os.path.join(preset(folder, source), "model.weights.h5")
    size = os.path.getsize(file)
    for keep in (0, 1000, size // 2, size - 100):
        preset(folder, source)
        os.truncate(file, keep)
        refused(path, f"{keep} of {size} bytes of HDF5", "model.weights.h5")
    for what, edit in {
            "a chunked variable": lambda f: f.create_dataset(query, data=good[query], chunks=True),
            "a variable elsewhere": lambda f: f.create_dataset(
                query, (6, 42, 10), "f4", external=[("/etc/passwd", 0, 10080)]),
            "a variable without bytes": lambda f: f.create_dataset(query, (1 << 20, 1 << 20), "f4"),
            "a name of noise": lambda f: f.__setitem__(b"\xff one piece", good[query]),
            "a link": lambda f: f.__setitem__(query, h5py.ExternalLink("other.h5", "/x"))}.items():
        preset(folder, source)
        with h5py.File(file, "a") as f:
            del f[query]
            edit(f)
        refused(path, what, "layers.1.q" if "link" in what else "one piece")
    test_keras_files(folder, source)


def test_keras_files(folder, source):
    path = preset(folder, source, shards=3)
    os.remove(os.path.join(path, "model_00001.weights.h5"))
    refused(path, "missing shard", "missing")
    path = preset(folder, source, shards=2)
    shutil.copy(os.path.join(path, "model_00000.weights.h5"),
                os.path.join(path, "model_00001.weights.h5"))
    refused(path, "a shard twice", "twice")
    write_json(os.path.join(path, "model.weights.json"), {"weight_map": {"/x": "../a.weights.h5"}})
    refused(path, "a shard elsewhere", "which is no file name")
    path = preset(folder, source)
    refused_without(path, "h5py", "pip install h5py")


# ---- Flax -----------------------------------------------------------------------------------


def flax_arrays(source, layout="flat", first="2DF"):
    """{key: tensor}, with a tree's keys joined as Orbax joins them.  layout is flat (gemma's old
    names with slashes), nested, or trainer (nested in a trainer's state)."""
    import torch
    out = {"embedder.input_embedding": source["embedding"],
           "final_norm.scale": source["final_norm"]}
    for i in range(source.L):
        of = f"layers.{i}."
        gating = torch.stack([source[of + "gate"], source[of + "up"]])
        out.update({f"layer_{i}.{k}": v for k, v in {
            "attn.q_einsum.w": source.heads(of + "q"),
            "attn.kv_einsum.w": torch.stack([source.heads(of + "k"), source.heads(of + "v")]),
            "attn.attn_vec_einsum.w": source.out_heads(i),
            "mlp.gating_einsum": gating.transpose(1, 2) if first == "2DF" else gating,
            "mlp.linear": source[of + "down"].t(),
            **{k + ".scale": source[of + n] for n, k in NORMS.items()}}.items()})
    if layout == "trainer":
        return {"step": torch.tensor(3), **{"params." + k: v for k, v in out.items()}}
    if layout == "nested":
        return out
    return {flat_name(k): v for k, v in out.items()}


def flat_name(key):
    """A key of a flat tree is a path and a last name, which is w in the MLP."""
    path, _, last = key.rpartition(".")
    if last in ("gating_einsum", "linear"):
        path, last = key, "w"
    return "transformer/" + path.replace(".", "/") + "." + last


def write_orbax(path, arrays, ocdbt=True, driver="zarr", rows=None):
    """Writes arrays as Orbax does: zstd, no fill value, one chunk unless rows cuts the first
    axis."""
    import tensorstore
    os.makedirs(path, exist_ok=True)
    base = {"driver": "file", "path": path + "/"}
    store = {"driver": "ocdbt", "base": base} if ocdbt else base
    for name, tensor in arrays.items():
        data = typed(tensor)
        chunks = [min(rows or n, n) if i == 0 else n for i, n in enumerate(data.shape)]
        place = {**store, "path": store.get("path", "") + name + "/"}
        if driver == "zarr":
            how = {"metadata": {"chunks": chunks, "compressor": {"id": "zstd", "level": 1}}}
        else:
            how = {"metadata": {"chunk_grid": {"name": "regular", "configuration": {
                "chunk_shape": chunks}}, "codecs": [{"name": "sharding_indexed", "configuration": {
                    "chunk_shape": chunks, "codecs": [{"name": "zstd"}]}}]}}
        tensorstore.open({"driver": driver, "kvstore": place, **how}, create=True,
                         shape=data.shape, dtype=data.dtype.name).result().write(data).result()
    write_json(os.path.join(path, "_METADATA"), {"tree_metadata": {}})
    return path


def kaggle(folder, arrays, **how):
    """tokenizer.model beside the checkpoint's directory."""
    path = fresh(folder)
    write_orbax(os.path.join(path, "gemma2-2b-it"), arrays, **how)
    return path


def test_flax_good(engine, folder):
    source = Source(layers="LGLG")
    for what, how, options in (
            ("flat, OCDBT", dict(), dict()),
            ("flat, a directory an array, [2, F, D]", dict(first="2FD"), dict(ocdbt=False)),
            ("nested, zarr 3", dict(layout="nested"), dict(driver="zarr3")),
            ("nested, zarr 3 in files", dict(layout="nested"), dict(driver="zarr3", ocdbt=False)),
            ("a trainer's state", dict(layout="trainer"), dict(rows=3))):
        path = kaggle(folder, flax_arrays(source, **how), **options)
        exact(path, source, f"Flax, {what}", engine if what == "nested, zarr 3" else None,
              dict(W=4096, query_scale=float(np.float32(10 ** -0.5))))
    exact(os.path.join(path, "gemma2-2b-it"), source, "Flax, the inner directory")
    half = Source("bfloat16")
    exact(kaggle(folder, flax_arrays(half), rows=5), half, "Flax bf16, in chunks")
    test_padded(folder)
    test_orbax(folder)


def save_by_orbax(jobs):
    """Runs in its own process, because jax starts threads.  A job is a path, a tree and the
    handler's options (None: the checkpointer that the gemma library uses)."""
    import logging
    import jax
    import orbax.checkpoint as ocp
    logging.getLogger("absl").setLevel(logging.ERROR)
    for path, tree, options in jobs:
        tree = jax.tree.map(jax.numpy.asarray, tree)
        if options is None:
            with ocp.StandardCheckpointer() as saver:
                saver.save(path, tree)
        else:
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(path, tree)


def tree_of(arrays, is_flat):
    """The saved tree, from Orbax's joined keys."""
    tree = {}
    for key, tensor in arrays.items():
        *path, last = key.rsplit(".", 1) if is_flat else key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = typed(tensor)
    return tree


def test_orbax(folder):
    """Directories that Orbax itself wrote."""
    source, jobs = Source("bfloat16", layers="LGLG"), []
    for i, (layout, first, options) in enumerate((
            ("flat", "2DF", None), ("flat", "2FD", {"use_ocdbt": False}),
            ("nested", "2FD", {"use_zarr3": True}),
            ("trainer", "2DF", {"use_ocdbt": False, "use_zarr3": True}))):
        tree = tree_of(flax_arrays(source, layout, first), layout == "flat")
        jobs.append((os.path.join(fresh(folder, f"orbax{i}"), "saved"), tree, options))
    process = FORKS.Process(target=save_by_orbax, args=(jobs,))
    process.start()
    process.join(600)
    check(process.exitcode == 0, f"Orbax: exit {process.exitcode}")
    for path, _, options in jobs:
        exact(os.path.dirname(path), source, f"Orbax, {options}", expect=dict(W=4096))


def test_padded(folder):
    """A vocabulary of 256,128 rows keeps 256,000.  Any other keeps all."""
    import torch
    source = Source(vocab_size=256128, hidden_size=6)
    path = kaggle(folder, flax_arrays(source), rows=30000)
    os.remove(os.path.join(path, "tokenizer.model"))
    rows = source.state["model.embed_tokens.weight"]
    source.hf.config.vocab_size = 256000
    source.hf.model.embed_tokens.weight = torch.nn.Parameter(rows[:256000])
    exact(path, source, "Flax, padded vocabulary", expect=dict(V=256000), warns="tokenizer.bin")


def test_flax_bad(folder):
    import torch
    source = Source()
    good = flax_arrays(source)
    q, gating = ("transformer/layer_1/" + n for n in ("attn/q_einsum.w", "mlp/gating_einsum.w"))

    def spoilt(what, change, *words, **how):
        arrays = {k: v.clone() for k, v in good.items()}
        change(arrays)
        path = kaggle(folder, arrays, **how)
        refused(path, what, *words)
        return path

    def put(name, value):
        return lambda a: a.__setitem__(name, value)

    def nothing(arrays):
        pass
    spoilt("NaN", lambda a: a[q].view(-1).__setitem__(7, float("nan")), "layers.1.q")
    spoilt("unknown array", put("transformer/layer_1/attn/_key_norm.scale", torch.ones(10)),
           "_key_norm")
    spoilt("layers in a stack", put("stacked_layers.attention_type_0.attn.q_einsum.w",
                                    torch.ones(2, 6, 42, 10)), "stacked_layers")
    spoilt("a vision tower", put("SigLiPFromPatches_0/x.w", torch.ones(10)), "SigLiP")
    spoilt("missing array", lambda a: a.pop(q), "layers.1.q")
    spoilt("wrong shape", put(q, torch.ones(6, 41, 10)), "D 41", "42")
    spoilt("wrong axes", put(q, torch.ones(60, 42)), "3 axes")
    spoilt("a third gate", put(gating, torch.ones(3, 42, 40)), "gate and up")
    spoilt("int8", put(q, torch.ones(6, 42, 10).to(torch.int8)), "int8")
    spoilt("two trees", put("params." + q.replace("/", "."), good[q]), "twice")
    spoilt("no norms after", lambda a: [a.pop(n) for n in list(a) if "post" in n], "Gemma 1")
    square = Source(intermediate_size=42)
    refused(kaggle(folder, flax_arrays(square)), "D = F", "either way")
    path = kaggle(folder, good, ocdbt=False, rows=4)
    inner = os.path.join(path, "gemma2-2b-it")
    os.remove(os.path.join(inner, q, "0.0.0"))
    refused(path, "missing chunk", "q_einsum")
    for name, keep in ((".zarray", 20), ("1.0.0", 5), ("1.0.0", 0)):
        kaggle(folder, good, ocdbt=False, rows=4)
        os.truncate(os.path.join(inner, q, name), keep)
        refused(path, f"{keep} bytes of {name}", "q_einsum")
    for what, shape, chunks, word in (
            ("a huge array", [6, 42, 1 << 40], [6, 42, 1 << 40], "makes H"),
            ("a huge chunk", [6, 42, 10], [1 << 20, 1 << 20, 10], "waste memory"),
            ("a number", [], [], "3 axes")):
        kaggle(folder, good, ocdbt=False)
        with open(os.path.join(inner, q, ".zarray"), "r+") as f:
            doc = json.load(f) | {"shape": shape, "chunks": chunks}
            f.seek(0), f.truncate(), json.dump(doc, f)
        refused(path, what, "q_einsum", word)
    test_flax_files(folder, good)


def test_flax_files(folder, good):
    path = kaggle(folder, good)
    inner = os.path.join(path, "gemma2-2b-it")
    os.truncate(os.path.join(inner, "manifest.ocdbt"), 30)
    refused(path, "half a manifest", "gemma2-2b-it")
    kaggle(folder, good)
    data = os.path.join(inner, "d")
    for name in os.listdir(data):
        os.truncate(os.path.join(data, name), 10)
    refused(path, "truncated data", "gemma2-2b-it")
    shutil.rmtree(data)
    refused(path, "no data", "gemma2-2b-it")
    kaggle(folder, {})
    refused(path, "no arrays", "no arrays")
    kaggle(folder, good)
    shutil.copytree(inner, inner + "-2")
    refused(path, "two checkpoints", "several")
    kaggle(folder, good)
    refused_without(path, "tensorstore", "pip install tensorstore")


# ---- many workers ---------------------------------------------------------------------------


def test_workers(folder):
    """Models large enough for a pool of processes, and a failure in one of them."""
    source = Source("bfloat16", hidden_size=512, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=64, intermediate_size=6144, query_pre_attn_scalar=64)
    out = os.path.join(folder, "place", "out.bin")
    for what, write in {"PyTorch": lambda: save(folder, gemma_pytorch(source)),
                        "Keras": lambda: preset(folder, source),
                        "Flax": lambda: kaggle(folder, flax_arrays(source), rows=100)}.items():
        source["layers.0.k"][127, 511] = 1
        fresh(folder, "place", tokenizer=False)
        run = apart(write(), out, "--type", "bf16", "-j", "2")
        if check(run.returncode == 0, f"{what}, two workers: {run.stderr.strip()}"):
            check_exact(source, out, f"{what}, two workers")
            os.remove(out)
        source["layers.0.k"][127, 511] = float("inf")
        run = apart(write(), out, "-j", "2")
        check_refusal(run.returncode, run.stderr, os.path.dirname(out), f"{what}, infinity in a "
                      "worker", ["layers.0.k", "holds NaN or infinity"])


def test_arrays(engine, folder):
    test_torch_good(engine, folder)
    test_torch_bad(folder)
    test_keras_good(engine, folder)
    test_keras_bad(folder)
    test_flax_good(engine, folder)
    test_flax_bad(folder)
    test_workers(folder)
