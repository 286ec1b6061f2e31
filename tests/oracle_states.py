"""A part of oracle.py: states after the final norm, scores of reward models, and a residual
stream that a hook reads and changes, against transformers and its hooks.  The checkpoints of
embedders and classifiers have no head for text."""
import ctypes as C
import json
import os
import subprocess

import numpy as np

import make_golden
import reference as ref
from reference import check

CLOSE = 1e-4  # largest difference with f32 weights, as for logits
RUN = os.path.join(ref.ROOT, "run")


class Activation(C.Structure):
    _fields_ = [("name", C.c_char_p), ("layer", C.c_int32), ("rows", C.c_size_t),
                ("cols", C.c_size_t), ("data", C.POINTER(C.c_float))]


HOOK = C.CFUNCTYPE(None, C.c_void_p, C.POINTER(Activation))


def converted(folder, name, model):
    path = os.path.join(folder, name)
    ref.save_checkpoint(model, path, make_golden.tiny_tokenizer())
    make_golden.export(path, path + ".bin", "--type", "f32")
    return path + ".bin"


def said(path, ids, *options):
    """The array that run prints."""
    p = subprocess.run([RUN, path, "--ids", " ".join(map(str, ids)), "-q", *options],
                       capture_output=True, text=True)
    check(p.returncode == 0 and not p.stderr, f"run {options}: {p.returncode} {p.stderr}")
    return np.array(json.loads(p.stdout))


def hf_states(model, ids, **options):
    import torch
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, **options)


def test_embedder(engine, folder, hf, ids):
    """A checkpoint without a head, like bge-multilingual-gemma2."""
    path = converted(folder, "embedder", hf.model)
    want = hf_states(hf.model, ids).last_hidden_state[0].numpy()
    model = ref.Model(engine, path)
    for n_batch in (7, 64):
        session = ref.Session(model, n_batch=n_batch)
        off = abs(session.states(ids) - want).max()
        check(off <= CLOSE, f"states in passes of {n_batch}: off by {off:.2g}")
        session.close()
    model.close()
    for kind, state in ("last", want[-1]), ("mean", want.mean(0)):
        off = abs(said(path, ids, "--embed", kind) - state).max()
        check(off <= CLOSE, f"--embed {kind}: off by {off:.2g}")
    p = subprocess.run([RUN, path, "--reward", "x"], capture_output=True, text=True)
    check(p.returncode == 2 and p.stderr.count("\n") == 1, f"--reward without scores: {p}")


def test_reward(engine, folder, ids):
    import torch
    from transformers import Gemma2ForSequenceClassification
    for labels in 1, 3, 17:
        config = ref.hf_config("LG", num_labels=labels)
        config._attn_implementation = "eager"
        hf = Gemma2ForSequenceClassification(config).float().eval()
        ref.fill_random(hf, labels)
        with torch.no_grad():
            hf.score.weight.normal_()
        ref.set_embedding_scale(hf, float(ref.bf16_round(config.hidden_size ** 0.5)))
        path = converted(folder, f"reward{labels}", hf)
        want = hf_states(hf, ids).logits[0].numpy()
        model = ref.Model(engine, path)
        session = ref.Session(model)
        off = abs(session.scores(session.states(ids)[-1], labels) - want).max()
        check(off <= CLOSE, f"{labels} scores: off by {off:.2g}")
        session.close(), model.close()
        off = abs(said(path, ids, "--reward") - want).max()
        check(off <= CLOSE, f"--reward, {labels} scores: off by {off:.2g}")


def test_steering(engine, folder, hf, ids):
    """A hook reads the residual stream after a layer and adds a vector to it."""
    path, layer = converted(folder, "steered", hf), 1
    vector = np.random.default_rng(5).normal(0, 3, hf.config.hidden_size).astype(np.float32)
    seen = []

    def add(_, activation):
        a = activation.contents
        if a.name == b"residual" and a.layer == layer:
            x = np.ctypeslib.as_array(a.data, (a.rows, a.cols))
            seen.append(x.copy())
            x += vector

    def add_hf(module, args, output):
        import torch
        first = output[0] if isinstance(output, tuple) else output
        first += torch.tensor(vector)

    want_seen = hf_states(hf, ids, output_hidden_states=True).hidden_states[layer + 1][0].numpy()
    handle = hf.model.layers[layer].register_forward_hook(add_hf)
    want = ref.hf_logits(hf, ids)[-1]
    handle.remove()
    model, hook = ref.Model(engine, path), HOOK(add)
    session = ref.Session(model)
    plain = session.append(ids)
    session.close()
    session = ref.Session(model)
    session.check(engine.lib.gemma2_set_hook(session.handle, C.cast(hook, C.c_void_p), None))
    got = session.append(ids)
    session.close(), model.close()
    off = abs(got - want).max()
    check(off <= CLOSE, f"steered logits: off by {off:.2g}")
    check(abs(got - plain).max() > 0.01, "a steered residual stream changes nothing")
    off = abs(np.concatenate(seen) - want_seen).max()
    check(off <= CLOSE, f"residual stream of layer {layer}: off by {off:.2g}")


def test_states(engine, folder):
    hf = ref.hf_model(ref.hf_config("LGLG"), seed=11)
    rng = np.random.default_rng(3)
    ids = [2] + [int(i) for i in rng.integers(0, hf.config.vocab_size, 40)]
    test_embedder(engine, folder, hf, ids)
    test_reward(engine, folder, ids)
    test_steering(engine, folder, hf, ids)
