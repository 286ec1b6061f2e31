"""The exporter's part of oracle.py: every kind of checkpoint converts, and a bad checkpoint
leaves nothing behind."""
import contextlib
import errno
import io
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import types
import unittest.mock
import warnings
from concurrent import futures

import numpy as np

import make_golden
import reference as ref
from reference import check

import export

EXPORT = [sys.executable, os.path.join(ref.ROOT, "export.py")]


def apart(checkpoint, out, *options, limit=None, env=None):
    """Runs export.py.  limit bounds the bytes of a file, as a full disk would."""
    def bound():
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(EXPORT + [checkpoint, out, *options], capture_output=True, text=True,
                          preexec_fn=bound, timeout=600, env=env)


def convert(*arguments):
    """The same in this process, which has imported the libraries already: a tenth of the time."""
    report, said = io.StringIO(), io.StringIO()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(n) for n in numbers]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(report), \
                warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # else numpy's warnings reach stderr
            status = export.main([*arguments, "-j", "1"])
    except SystemExit as e:  # of argparse
        status = e.code
    except Exception:
        status = -1
        said.write(traceback.format_exc())
    for n, handler in zip(numbers, handlers):
        signal.signal(n, handler)
    for f in export.handles.values():
        f.close()
    export.handles.clear()
    export.kept.clear()
    return subprocess.CompletedProcess(arguments, status, report.getvalue(), said.getvalue())


# ---- checkpoints written by hand ------------------------------------------------------


class Checkpoint:
    """A directory to spoil: .tensors {name: array or torch tensor}, .config."""

    def __init__(self, folder, **facts):
        import torch
        facts = {"layers": "LG", "intermediate_size": 40, **facts}
        self.hf = ref.hf_model(ref.hf_config(**facts), seed=5)
        self.path, self.facts = os.path.join(folder, "checkpoint"), self.hf.config
        shutil.rmtree(self.path, ignore_errors=True)
        ref.save_checkpoint(self.hf, self.path, make_golden.tiny_tokenizer())
        with open(os.path.join(self.path, "config.json")) as f:
            self.config = json.load(f)
        self.tensors = {k: v.clone() for k, v in self.hf.state_dict().items()
                        if k != "lm_head.weight" or not self.facts.tie_word_embeddings}
        self.torch = torch

    def file(self, name):
        return os.path.join(self.path, name)

    def write(self, shards=1):
        """Writes model.safetensors, or several shards and their index."""
        from safetensors.torch import save_file
        with open(self.file("config.json"), "w") as f:
            json.dump(self.config, f)
        os.remove(self.file("model.safetensors"))
        names = sorted(self.tensors)
        if shards == 1:
            save_file(self.tensors, self.file("model.safetensors"))
            return self
        where = {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({n: self.tensors[n] for n in names[i::shards]}, self.file(shard))
            where.update({n: shard for n in names[i::shards]})
        with open(self.file("model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {"total_size": 0}, "weight_map": where}, f)
        return self


def check_exact(checkpoint, out, what):
    """Every weight of an f32 file is the model's, bit for bit, and the layout keeps its rules."""
    f, state = ref.Bin(out), checkpoint.hf.state_dict()
    for (role, layer), s in f.sections.items():
        if s["type"] == "bytes":
            continue
        name = {"embedding": "model.embed_tokens", "head": "lm_head",
                "final_norm": "model.norm"}.get(role)
        name = (name or f"model.layers.{layer}.{ref.HF_NAMES[role]}") + ".weight"
        want = state[name].float().numpy().reshape(s["rows"], -1)
        have = f.tensor(role, layer)
        check(have.shape == want.shape and np.array_equal(have, want), f"{what}: {name}")
    check((("head", 0) in f.sections) == (not checkpoint.facts.tie_word_embeddings),
          f"{what}: a head of its own")
    check_layout(f, what)
    return f


def check_layout(f, what):
    """Sections in directory order, each on the next multiple of A, gaps zero."""
    at, A = f.at + 96 * f.count, f.header["alignment"]
    for (role, layer), s in f.sections.items():
        start = -(-at // A) * A
        check(s["offset"] == start, f"{what}: {role} {layer} is at {s['offset']}, not {start}")
        check(not any(f.data[at:start]), f"{what}: the gap before {role} {layer}")
        at = start + s["bytes"]
    check(at == len(f.data) == f.header["file_bytes"], f"{what}: bytes of the file")
    check(not f.digest_faults(), f"{what}: digests {f.digest_faults()}")
    order = [k[0] for k in f.sections]
    check(order[:2] == ["facts", "tokenizer"] and order.index("final_norm") > order.index("down")
          and order.index("embedding") > order.index("final_norm"), f"{what}: order {order}")


# ---- good checkpoints -----------------------------------------------------------------


def good(folder, what, edit=None, shards=1, dtype=None, expect=(), options=(), **facts):
    """Converts an edited checkpoint; expect holds header fields."""
    c = Checkpoint(folder, **facts)
    if dtype:
        c.hf = c.hf.to(getattr(c.torch, dtype))
        c.tensors = {k: v.to(getattr(c.torch, dtype)) for k, v in c.tensors.items()}
        c.config["dtype"] = dtype
    if edit:
        edit(c)
    c.write(shards)
    out = os.path.join(folder, "out.bin")
    run = convert(c.path, out, "--type", "f32", *options)
    if not check(run.returncode == 0, f"{what}: exit {run.returncode}: {run.stderr.strip()}"):
        return None, run
    f = check_exact(c, out, what)
    for key, value in dict(expect).items():
        check(f.header[key] == value, f"{what}: {key} is {f.header[key]}, not {value}")
    os.remove(out)
    return f, run


def legacy(c):
    """config.json as transformers 4.42 wrote it."""
    for key in ("layer_types", "rope_parameters", "hidden_activation", "dtype", "sliding_window"):
        c.config.pop(key, None)
    c.config.update(hidden_act="gelu", sliding_window_size=8, rope_theta=10000.0,
                    torch_dtype="float32", cache_implementation="hybrid",
                    use_bidirectional_attention=None)


def without_prefix(c):
    c.tensors = {k.replace("model.", "", 1): v for k, v in c.tensors.items()}


def buffers_and_copies(c):
    """What checkpoints carry along: a tied head, rotary buffers."""
    c.tensors["lm_head.weight"] = c.tensors["model.embed_tokens.weight"].clone()
    c.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = c.torch.ones(5)


def test_good(folder):
    for dtype in ("float32", "bfloat16", "float16"):
        for shards in (1, 3):
            good(folder, f"{dtype} in {shards} files", dtype=dtype, shards=shards)
    good(folder, "untied", tie_word_embeddings=False)
    good(folder, "legacy config", legacy, expect=dict(local=[1, 0], W=8, rope_theta=1e4))
    good(folder, "no prefix", without_prefix)
    good(folder, "copies", buffers_and_copies)
    good(folder, "soft-caps off", attn_logit_softcapping=None, final_logit_softcapping=None,
         expect=dict(attn_softcap=0, final_softcap=0))
    good(folder, "irregular layers", layers="GGL", expect=dict(local=[0, 0, 1]))
    good(folder, "eos list", lambda c: c.config.update(eos_token_id=[1, 7]),
         expect=dict(stop=[1, 7, 5]))
    good(folder, "eos 1 only", lambda c: c.config.update(eos_token_id=1), expect=dict(stop=[1, 5]))
    good(folder, "alignment", options=["--align", "4096"], expect=dict(alignment=4096))
    test_extended(folder)
    test_scalar_224(folder)
    test_heads(folder)
    test_kept(folder)
    test_wrapped(folder)


def own_head(c):
    """A head of its own, although config.json says that it is tied.  Merges of adapters leave such
    a head, and transformers keeps it, as checked here."""
    head = c.tensors["model.embed_tokens.weight"] * 0.5 + 0.25
    c.tensors["lm_head.weight"] = head
    c.facts.tie_word_embeddings = False
    c.hf.lm_head.weight = c.torch.nn.Parameter(head.clone())
    c.write()
    from transformers import AutoModelForCausalLM
    loaded = AutoModelForCausalLM.from_pretrained(c.path, dtype=head.dtype).state_dict()
    check(c.torch.equal(loaded["lm_head.weight"], head), "transformers drops a head of its own")


def test_heads(folder):
    """A head that differs from the embedding stays, even by one value.  An equal head goes."""
    def one_value(c):
        own_head(c)
        c.tensors["lm_head.weight"].copy_(c.tensors["model.embed_tokens.weight"])
        c.tensors["lm_head.weight"].view(-1)[-1] += 1
        c.hf.lm_head.weight.data.copy_(c.tensors["lm_head.weight"])
    for what, edit in (("its own", own_head), ("one value", one_value)):
        for shards in (1, 3):
            f, run = good(folder, f"a head of {what}, tied", edit, shards=shards)
            check(not f or f.header and "is kept" in run.stderr, f"a head, {what}: {run.stderr!r}")


def test_kept(folder):
    """--keep-vocab: the head has the rows of some pieces, and the embedding begins with them.  Each row
    is what it is without the option.  Other pieces get no logits, and run says so."""
    ids, out, whole = (os.path.join(folder, n) for n in ("ids.txt", "kept.bin", "whole.bin"))
    for tied, options in ((True, "--type f32"), (True, "--type q4 --tensor head=q3"),
                          (False, "--bits 32"), (False, "--type q6 --head q8")):
        c = Checkpoint(folder, tie_word_embeddings=tied).write()
        with open(ids, "w") as f:
            f.write("340 300,\n 340 312 301")
        options = options.split()
        runs = [convert(c.path, whole, *options),
                convert(c.path, out, *options, "--keep-vocab", ids)]
        what = f"--keep-vocab {' '.join(options)}"
        if not check(not any(r.returncode for r in runs), f"{what}: {runs[1].stderr}"):
            continue
        a, b = ref.Bin(whole), ref.Bin(out)
        kinds = [kind for _, _, kind in a.vocabulary()[1]]
        want = [i for i, kind in enumerate(kinds)
                if kind not in (ref.NORMAL, ref.UNUSED) or i in (300, 301, 312, 340)]
        order = want + [i for i in range(len(kinds)) if i not in want]
        check(np.frombuffer(b.bytes("kept"), "<u4").tolist() == want, f"{what}: ids")
        check(np.array_equal(b.tensor("embedding"), a.tensor("embedding")[order]), f"{what}: rows")
        check(("head", 0) not in a.sections or np.array_equal(
            b.tensor("head"), a.tensor("head")[want]), f"{what}: rows of the head")
        check_layout(b, what)
    other = next(i for i in range(300, 347) if i not in want)
    for options, said in ((["--info"], f"347 pieces, of which {len(want)} can be written"),
                          (["--score", "--ids", f"2 300 {other}"], f"{other}\t-inf\ntotal\t-inf\n"),
                          (["--json", "--score", "--ids", f"2 {other}"], '[null], "ids": ['),
                          (["--json", "--logits", "400", "x"], '"id": 340,')):
        run = subprocess.run([os.path.join(ref.ROOT, "run"), out, *options], capture_output=True,
                             text=True)
        check(run.returncode == 0 and said in run.stdout and f'"id": {other},' not in run.stdout,
              f"run {options} of kept ids: {run.stdout[:300]} {run.stderr}")
    os.remove(out)
    for text, words in (("12 x", "'x'"), ("347", "'347'"), ("-1", "'-1'"), (" ", "holds no ids")):
        with open(ids, "w") as f:
            f.write(text)
        run = convert(c.path, out, "--keep-vocab", ids)
        check(run.returncode == 1 and words in run.stderr and not os.path.exists(out),
              f"--keep-vocab with {text!r}: {run.stderr}")


# Prefixes that programs put before the names of tensors
PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "model.", "module._orig_mod.",
            "_forward_module.model.", "_orig_mod.base_model.model.", "model._orig_mod.module.")


def test_wrapped(folder):
    """Names as wrapped models save them, whole and layer by layer."""
    def renamed(change):
        def edit(c):
            c.tensors = {change(n): t for n, t in c.tensors.items()}
        return edit
    for prefix in PREFIXES:
        good(folder, f"names after {prefix}", renamed(lambda n: prefix + n))
    good(folder, "names after _orig_mod., untied", renamed(lambda n: "_orig_mod." + n),
         tie_word_embeddings=False)
    for part in "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.":
        good(folder, f"layers in {part}", renamed(
            lambda n: re.sub(r"(layers\.\d+\.)(\w+\.)", r"\1" + part + r"\2", n)))
    bad(folder, "plain and wrapped", lambda c: c.tensors.update({
        "_orig_mod.model.norm.weight": c.tensors["model.norm.weight"].clone()}), "twice",
        "_orig_mod.model.norm.weight")


def test_extended(folder):
    """Rows beyond the tokenizer's pieces become unused pieces, with a warning."""
    f, run = good(folder, "extended vocabulary", vocab_size=360, expect=dict(V=360))
    if f:
        ids, pieces = f.vocabulary()
        check(len(pieces) == 360 and all(k == ref.UNUSED for _, _, k in pieces[347:]),
              "extended vocabulary: kinds of the rest")
        check("347" in run.stderr and "360" in run.stderr, "extended vocabulary: no warning")
        want = ref.model_pieces(os.path.join(ref.GOLDEN, "tiny.model"))
        same = [(t, s, ref.USER if k == ref.MARKER else k) for t, s, k in pieces[:347]]
        check(same == want, "extended vocabulary: pieces")


def test_scalar_224(folder):
    """Trap 3: a stale query_pre_attn_scalar is kept, with a warning."""
    f, run = good(folder, "scalar 224", query_pre_attn_scalar=224,
                  expect=dict(query_scale=float(np.float32(224 ** -0.5))))
    check(f and "224" in run.stderr, "scalar 224: no warning")


# ---- bad checkpoints ------------------------------------------------------------------


def bad(folder, what, edit, *words, after=None, shards=1, options=(), limit=None, **facts):
    """A conversion that must fail: status 1, one sentence that holds the words, no file."""
    c = Checkpoint(folder, **facts)
    edit(c)
    c.write(shards)
    if after:
        after(c)
    place = os.path.join(folder, "place")
    os.makedirs(place, exist_ok=True)
    out = os.path.join(place, "out.bin")
    run = apart(c.path, out, *options, limit=limit) if limit else convert(c.path, out, *options)
    text = run.stderr.strip().split("\n")[-1]
    check(run.returncode == 1, f"{what}: exit {run.returncode}: {run.stderr[-300:]}")
    check("Traceback" not in run.stderr and text, f"{what}: says {run.stderr[-300:]!r}")
    check(all(w in text for w in words), f"{what}: {words} not in {text!r}")
    check(not os.listdir(place), f"{what}: leaves {os.listdir(place)}")
    shutil.rmtree(place)


def nothing(c):
    pass


def spoil(name, index, value):
    def edit(c):
        c.tensors[name].view(-1)[index] = value
    return edit


def truncate(c):
    path = c.file("model.safetensors")
    os.truncate(path, os.path.getsize(path) - 100)


def twice(c):
    """A tensor in two shards."""
    shards = sorted(n for n in os.listdir(c.path) if n.startswith("model-"))
    shutil.copy(c.file(shards[0]), c.file(shards[1]))


def overlong_header(c):
    with open(c.file("model.safetensors"), "r+b") as f:
        f.write(struct.pack("<Q", 1 << 40))


def pointer(c):
    """The pointer that git lfs leaves in the place of a large file."""
    with open(c.file("pointer"), "w") as f:
        f.write("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17525357\n")
    return c.file("pointer")


def drop(name):
    return lambda c: c.tensors.pop(name)


def test_bad(folder):
    q = "model.layers.1.self_attn.q_proj.weight"
    nan, inf = float("nan"), float("inf")
    bad(folder, "NaN", spoil(q, 17, nan), "q")
    bad(folder, "infinity in a norm", spoil("model.norm.weight", 3, inf), "norm")
    bad(folder, "NaN at the very end", spoil("model.embed_tokens.weight", -1, nan),
        "embedding", options=["--type", "f32"])
    bad(folder, "missing tensor", drop(q), "layers.1.q")
    bad(folder, "unknown tensor", lambda c: c.tensors.update(surprise=c.torch.ones(3)), "surprise")
    bad(folder, "a name that would clear the screen", lambda c: c.tensors.update({
        "x\n\x1b[2J": c.torch.ones(3)}), r"x\n\x1b[2J", "no tensor")
    bad(folder, "a name of pages", lambda c: c.tensors.update({"x" * 5000: c.torch.ones(3)}), "xxx",
        " ... ", "right checkpoint?")
    bad(folder, "too many layers", lambda c: c.config.update(num_hidden_layers=1, layer_types=[
        "full_attention"]), "layers")
    bad(folder, "wrong shape", lambda c: c.tensors.update({q: c.torch.ones(7, 42)}), "shape")
    bad(folder, "no head", lambda c: c.config.update(tie_word_embeddings=False), "lm_head")
    bad(folder, "another model", lambda c: c.config.update(model_type="llama"), "llama")
    bad(folder, "scaled rope", lambda c: c.config.update(rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope")
    for key, value in (("rope_theta", 1e29), ("attn_logit_softcapping", 0.01)):
        bad(folder, f"{key} {value}", lambda c: (
            c.config.pop("rope_parameters"), c.config.update({key: value})),
            key[:4], "can be")
    bad(folder, "quantised", lambda c: c.config.update(quantization_config={
        "quant_method": "hqq"}), "quantised")
    bad(folder, "a bias", lambda c: c.config.update(attention_bias=True), "bias")
    bad(folder, "truncated", nothing, "truncated", after=truncate)
    bad(folder, "header size", nothing, "model.safetensors", after=overlong_header)
    bad(folder, "missing shard", nothing, "missing", shards=3,
        after=lambda c: os.remove(c.file("model-00002-of-00003.safetensors")))
    bad(folder, "one of many files", nothing, "their numbers are not 1 to 99999999999", after=lambda
        c: os.rename(c.file("model.safetensors"), c.file("x-1-of-99999999999.safetensors")))
    bad(folder, "tensor in two shards", nothing, shards=2, after=twice)
    bad(folder, "no config", nothing, "config.json",
        after=lambda c: os.remove(c.file("config.json")))
    bad(folder, "no tokenizer", nothing, "tokenizer",
        after=lambda c: os.remove(c.file("tokenizer.model")))
    bad(folder, "broken tokenizer", nothing, "tokenizer",
        after=lambda c: os.truncate(c.file("tokenizer.model"), 1000))
    bad(folder, "a pointer", nothing, "tokenizer.json", "git lfs pull",
        after=lambda c: shutil.copy(pointer(c), c.file("tokenizer.json")))
    bad(folder, "tokenizer too large", nothing, "347", vocab_size=300)
    bad(folder, "full disk", nothing, limit=60000, options=["--type", "f32"])
    bad(folder, "full disk, many workers", nothing, limit=60000, options=["-j", "3"])


class Unreadable(io.FileIO):
    def readinto(self, _):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_disks(folder):
    """Disks that fill up at every place of the file, and disks that fail."""
    c = Checkpoint(folder).write()
    place = os.path.join(folder, "place")
    os.makedirs(place)
    out = os.path.join(place, "out.bin")
    check(convert(c.path, out, "--type", "f32").returncode == 0, "disks: no file")
    size = os.path.getsize(out)
    os.remove(out)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in range(0, size, size // 15):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            run = convert(c.path, out, "--type", "f32")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        check(run.returncode == 1 and "no file that large" in run.stderr and not os.listdir(place),
              f"a disk of {limit} bytes: {run.stderr!r} and {os.listdir(place)}")
    signal.signal(signal.SIGXFSZ, before)
    with unittest.mock.patch.object(export, "open", create=True, side_effect=lambda name, *a, **k: (
            Unreadable(name) if "buffering" in k else open(name, *a, **k))):
        run = convert(c.path, out, "--type", "f32")
    check(run.returncode == 1 and "model.safetensors: Input/output error" in run.stderr
          and not os.listdir(place), f"a disk that cannot be read: {run.stderr}")
    shutil.rmtree(place)


def test_instants(folder):
    """Signals once the temporary file is made, written and named, and an ignored SIGHUP."""
    c = Checkpoint(folder).write()
    place = os.path.join(folder, "place")
    os.makedirs(place)
    out, fsync, replace = os.path.join(place, "out.bin"), os.fsync, os.replace

    def then(step, number):
        def stepped(*arguments, **options):
            made = step(*arguments, **options)
            os.kill(os.getpid(), number)
            return made
        return stepped
    for what, holder, step, number, status in (
            ("made", export, export.lock, signal.SIGTERM, 143),
            ("written", os, fsync, signal.SIGINT, 130), ("named", os, replace, signal.SIGTERM, 0)):
        with unittest.mock.patch.object(holder, step.__name__, then(step, number)):
            run = convert(c.path, out)
        names = [] if status else ["out.bin"]
        check(run.returncode == status and os.listdir(place) == names,
              f"a signal once it is {what}: {run.returncode}, {run.stderr} {os.listdir(place)}")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with unittest.mock.patch.object(export, "lock", then(export.lock, signal.SIGHUP)):
        run = convert(c.path, out)
    signal.signal(signal.SIGHUP, before)
    check(run.returncode == 0, f"nohup: exit {run.returncode}")
    shutil.rmtree(place)


def test_no_process():
    """A system that gives no more processes or no more threads."""
    reader = types.SimpleNamespace(most_jobs=2, start_method=None)
    plan = [(types.SimpleNamespace(rows=1 << 12, cols=1 << 12), "")]
    for holder, name, error in ((os, "fork", BlockingIOError(errno.EAGAIN, "again")),
                                (futures.ProcessPoolExecutor, "submit", RuntimeError("no thread"))):
        with unittest.mock.patch.object(holder, name, side_effect=error):
            try:
                list(export.pack_all([()], plan, export.Job(reader, None), 2))
                said = "nothing"
            except Exception as e:
                said = repr(e)
        check("ExportError" in said and "could not start" in said, f"no {name}: {said}")


# Runs export.py, in which a function waits at each call until the file GATE is there.  At the
# first call it makes GATE.reached.
HELD = """import multiprocessing, os, sys, time
sys.path.insert(0, ROOT)
import export
multiprocessing.set_start_method("fork")
step = export.STEP
def held(*arguments):
    open(GATE + ".reached", "w").close()
    while not os.path.exists(GATE):
        time.sleep(0.01)
    return step(*arguments)
export.STEP = held
sys.exit(export.main(sys.argv[1:]))"""


def held(step, gate, *arguments):
    """The command of a conversion that waits in a step."""
    for path in gate, gate + ".reached":
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    program = HELD.replace("ROOT", repr(ref.ROOT)).replace("GATE", repr(gate)).replace("STEP", step)
    return [sys.executable, "-c", program, *arguments]


def start(gate, reached, checkpoint, out):
    """Starts a conversion that waits before it packs the first rows, until `reached` holds."""
    p = subprocess.Popen(held("pack_rows", gate, checkpoint, out, "--type", "q4"),
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not reached() and p.poll() is None:
        time.sleep(0.01)
    return p


def open_gate(gate):
    with open(gate, "w"):
        pass


def test_interrupt(folder):
    """A signal while workers start or work leaves no file and no process."""
    c = Checkpoint(folder, hidden_size=1024, num_attention_heads=4, intermediate_size=4096,
                   num_key_value_heads=2, head_dim=256).write()
    place, gate = (os.path.join(folder, name) for name in ("place", "gate"))
    os.makedirs(place)
    for number, pause in ((signal.SIGINT, None), (signal.SIGTERM, None),
                          *((signal.SIGTERM, 0.003 * i) for i in range(5))):
        p = start(gate, lambda: os.path.exists(gate + ".reached") if pause is None
                  else os.listdir(place), c.path, os.path.join(place, "out.bin"))
        time.sleep(pause or 0)
        p.send_signal(number)
        open_gate(gate)
        _, text = p.communicate(timeout=600)
        what = f"interrupt by {number}, pause {pause}"
        check(p.returncode == 128 + number, f"{what}: exit {p.returncode}")
        check("Traceback" not in text, f"{what}: {text[-300:]}")
        check(not os.listdir(place), f"{what}: leaves {os.listdir(place)}")
    shutil.rmtree(place)


def test_collisions(folder):
    """A second conversion to the same output succeeds before the first locks the temporary file.
    Before the first renames it, the second is refused."""
    path = shutil.move(Checkpoint(folder).write().path, os.path.join(folder, "small"))
    place = os.path.join(folder, "place")
    os.makedirs(place)
    out, lock, replace = os.path.join(place, "out.bin"), export.lock, os.replace
    runs = {}

    def between(step):
        def stepped(*arguments):
            if step not in runs:
                runs[step] = apart(path, out)
            return step(*arguments)
        return stepped

    with unittest.mock.patch.object(export, "lock", between(lock)), \
            unittest.mock.patch.object(os, "replace", between(replace)):
        run = convert(path, out)
    check(run.returncode == 0, f"collision: {run.stderr}")
    check(runs[lock].returncode == 0, f"collision: {runs[lock].stderr}")
    check(runs[replace].returncode == 1 and "by another process" in runs[replace].stderr,
          f"collision: {runs[replace].stderr}")
    check(os.listdir(place) == ["out.bin"], f"collision: leaves {os.listdir(place)}")
    check(not ref.Bin(out).digest_faults(), "collision: digests")
    shutil.rmtree(place)


def test_leftovers(folder):
    """A conversion takes over what a killed conversion to the same output left, but nothing of a
    conversion that lives."""
    path = Checkpoint(folder).write().path
    place = os.path.join(folder, "place")
    os.makedirs(place)
    gates = [os.path.join(folder, name) for name in ("live", "killed")]
    out, other = (os.path.join(place, name) for name in ("out.bin", "out.bin.d"))
    of_live = ".out.bin.d.tmp"
    live, killed = (start(gate, lambda: os.path.exists(gate + ".reached"), path, to)
                    for gate, to in zip(gates, (other, out)))
    killed.kill()
    killed.wait()
    check(set(os.listdir(place)) == {of_live, ".out.bin.tmp"}, f"leftovers: {os.listdir(place)}")
    for to, status in (out, 0), (other, 1):
        run = apart(path, to)
        check(run.returncode == status, f"leftovers: {run.stderr}")
        check(set(os.listdir(place)) == {of_live, "out.bin"}, f"leftovers: {os.listdir(place)}")
    check(not ref.Bin(out).digest_faults(), "leftovers: digests")
    live.send_signal(signal.SIGTERM)
    check(live.wait(600) == 128 + signal.SIGTERM, f"leftovers: exit {live.returncode}")
    check(os.listdir(place) == ["out.bin"], f"leftovers: {os.listdir(place)}")
    shutil.rmtree(place)


# ---- what is said while it runs ---------------------------------------------------------


def on_terminal(command, gate):
    """(status, what a command writes to a terminal on stderr).  The gate opens at its first byte."""
    ours, theirs = pty.openpty()
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    text = b""
    select.select([ours], [], [], 600)
    open_gate(gate)
    with contextlib.suppress(OSError):  # the end of a terminal
        while more := os.read(ours, 4096):
            text += more
    os.close(ours)
    return p.wait(), text


def test_progress(folder):
    """A terminal shows a bar before the checkpoint is opened, and nothing of it in the end.  A file
    gets the report."""
    c = Checkpoint(folder, vocab_size=400).write()
    out, gate = os.path.join(folder, "out.bin"), os.path.join(folder, "gate")
    status, text = on_terminal(held("open_checkpoint", gate, c.path, out), gate)
    check(status == 0, f"progress: exit {status}")
    check(text.startswith(b"\r[") and b"  0 %" in text[:70], f"progress: {text[:80]}")
    lines = text.replace(b"\r\x1b[K", b"\n").split(b"\n")
    check(sum(b"warning: the embedding has 400 rows" in line and not b"[" in line
              for line in lines) == 1, f"progress: the warning in {text}")
    check(lines[-1].strip() == b"", f"progress: leaves {text[-80:]}")
    text = on_terminal([*EXPORT, c.path, out, "-q"], gate)[1]
    check(text.count(b"\n") == 1, f"progress: not quiet: {text}")
    run = apart(c.path, out)
    report = run.stdout.split("\n")
    check(report[-2].startswith(out + ": ") and len(report) == 28, f"report: {run.stdout}")
    check(run.stderr.count("\n") == 1 and "\r" not in run.stderr, f"a file sees {run.stderr!r}")
    run = apart(c.path, out, "--quiet")
    check(run.stdout == "", f"quiet: {run.stdout}")
    os.remove(out)


def test_export(engine, folder):
    test_good(folder)
    test_bad(folder)
    test_disks(folder)
    test_instants(folder)
    test_no_process()
    test_interrupt(folder)
    test_leftovers(folder)
    test_collisions(folder)
    test_progress(folder)
