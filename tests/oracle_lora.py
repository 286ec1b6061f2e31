"""Adapters, for oracle.py: what export.py --lora makes of everything that PEFT saves.

PEFT wraps a random model, and every trainable parameter is drawn at random.  The file made
from the model and the saved adapter must hold the weights of PEFT's merge_and_unload(), and
the engine must give the logits of PEFT's model before it is merged."""
import contextlib
import copy
import json
import os
import shutil
import warnings

import numpy as np

import oracle_gguf
import reference as ref
from oracle_export import Checkpoint, apart, convert
from reference import check

U = 2.0 ** -24   # the relative error of one rounding to f32
LOGITS = 1e-4    # the largest error of a logit, the same for every model
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter:
    """A model wrapped by PEFT, its adapter saved in .path; .facts are the base model's."""

    def __init__(self, folder, facts=None, resize=None, inner=False, number=0, dtype=None,
                 save=None, **config):
        import peft
        import torch
        self.folder, self.torch = folder, torch
        self.base = Checkpoint(folder, **(facts or {})).path
        hf = self.load(facts or {})
        with quiet():
            if resize:
                hf.resize_token_embeddings(resize)
                ref.set_embedding_scale(hf, float(ref.bf16_round(hf.config.hidden_size ** 0.5)))
            self.hf = hf
            config = {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, **config}
            self.peft = peft.get_peft_model(hf.model if inner else hf, peft.LoraConfig(**config))
            self.peft.eval()
            self.draw(number)
            if dtype:  # values that dtype holds, so that saving them loses nothing
                self.round_to(getattr(torch, dtype))
            self.path = os.path.join(folder, "adapter%d" % number)
            shutil.rmtree(self.path, ignore_errors=True)
            self.peft.save_pretrained(self.path, **(save or {}))
            if dtype:
                self.edit(lambda t: {k: v.to(getattr(torch, dtype)) for k, v in t.items()})

    def load(self, facts):
        from transformers import AutoModelForCausalLM
        with quiet():
            hf = AutoModelForCausalLM.from_pretrained(
                self.base, dtype=self.torch.float32, attn_implementation="eager").eval()
        ref.set_embedding_scale(hf, float(ref.bf16_round(hf.config.hidden_size ** 0.5)))
        return hf

    def trained(self):
        return [(n, p) for n, p in self.peft.named_parameters() if p.requires_grad]

    def draw(self, number):
        """Draws factors that change weights by half their size, and lengths near the true ones."""
        g = self.torch.Generator().manual_seed(100 + number)
        with self.torch.no_grad():
            for name, p in self.trained():
                noise = self.torch.randn(p.shape, generator=g)
                if "magnitude" in name:
                    p.mul_(1 + 0.3 * noise)
                elif "lora_" in name:
                    p.copy_(noise * 0.15)
                else:
                    p.add_(noise * 0.2)

    def round_to(self, dtype):
        with self.torch.no_grad():
            for _, p in self.trained():
                p.copy_(p.to(dtype))

    def edit(self, change):
        """Rewrites the saved tensors by a function of {key: tensor}."""
        from safetensors.torch import load_file, save_file
        path = os.path.join(self.path, "adapter_model.safetensors")
        save_file(change(load_file(path)), path)

    def configure(self, **changes):
        path = os.path.join(self.path, "adapter_config.json")
        with open(path) as f:
            doc = {**json.load(f), **changes}
        with open(path, "w") as f:
            json.dump(doc, f)

    def untie(self):
        """PEFT advises this before merging: a change of one tied matrix changes the other too."""
        emb, head = map(innermost, (self.hf.model.embed_tokens, self.hf.lm_head))
        if emb.weight is head.weight:
            head.weight = self.torch.nn.Parameter(head.weight.detach().clone())


def innermost(module):
    """The plain layer inside PEFT's wrappers."""
    for name in ("original_module", "base_layer"):
        inner = module._modules.get(name)
        if inner is not None:
            return innermost(inner)
    return module


@contextlib.contextmanager
def quiet():
    import logging
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


# ---- what may differ ------------------------------------------------------------------


def bounds(adapter):
    """{HF name: elementwise bound of |ours - PEFT's|}, beyond 4 U of the weight itself.

    Both sides round a sum of r products, each in its own order, and multiply by s: each is off
    by (r + 1) U s |B||A| at most.  DoRA divides by a length.  PEFT sums its n squares in f32,
    in at least 8 parts: (n / 8 + 8) U of the weight, because the square root halves an error."""
    from peft.tuners.lora.layer import LoraLayer
    found = {}
    for name, module in adapter.hf.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for key in module.active_adapters:
            if key not in module.scaling:
                continue
            a, b = module.lora_B[key].weight, module.lora_A[key].weight
            size = (a.abs() @ b.abs()).detach().numpy() * abs(module.scaling[key])
            bound = 2 * (b.shape[0] + 1) * U * size
            if key in module.lora_magnitude_vector:
                full = (innermost(module).weight + module.get_delta_weight(key)).detach().numpy()
                m = module.lora_magnitude_vector[key].weight.detach().numpy()[:, None]
                f = m / np.linalg.norm(full.astype(float), axis=1, keepdims=True)
                bound = abs(f) * (bound + (full.shape[1] / 8 + 8) * U * abs(full))
            found[name] = found.get(name, 0) + bound
    return found


def compare(what, f, adapter, limits, has_head):
    """Every tensor of an f32 file against PEFT's merged model."""
    adapter.untie()
    with quiet():
        merged = adapter.peft.merge_and_unload()
    state = {k if k.startswith(("model.", "lm_head")) else "model." + k: v
             for k, v in merged.state_dict().items()}
    worst, head = 0.0, ("head", 0) in f.sections
    check(head == has_head, f"{what}: the file has {'a' if head else 'no'} head of its own")
    names = {"embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}
    tensors = [(role, layer, s["rows"]) for (role, layer), s in f.sections.items()
               if s["type"] != "bytes"]
    for role, layer, rows in tensors + ([] if head else [("embedding", "tied", 0)]):
        name = names.get(role) or f"model.layers.{layer}.{ref.HF_NAMES[role]}"
        if layer == "tied":
            name = "lm_head"
        if name + ".weight" not in state:
            continue
        want = state[name + ".weight"].detach().numpy()
        have = f.tensor(role, 0 if layer == "tied" else layer).reshape(want.shape)
        off = abs(have - want)
        bound = limits[name] + 4 * U * abs(want) if name in limits else 0.0
        check((off <= bound).all(), f"{what}: {name} is off by {off.max():.3g}")
        worst = max(worst, float((off / np.maximum(bound, 1e-30)).max()))
    return worst


# ---- what PEFT saves --------------------------------------------------------------------

TIED, UNTIED = {}, {"tie_word_embeddings": False}
# name, whether the file gets a head of its own, facts of the base model, settings
GOOD = [
    ("plain", False, TIED, {}),
    ("rsLoRA", False, TIED, dict(use_rslora=True)),
    ("DoRA", False, TIED, dict(use_dora=True)),
    ("rsLoRA and DoRA, untied", True, UNTIED, dict(use_dora=True, use_rslora=True)),
    ("patterns", False, TIED, dict(
        # PEFT saves patterns sorted, and the first match counts
        rank_pattern={"1.self_attn.q_proj": 6, "^model.layers.0.self_attn.k_proj": 8,
                      "mlp.up_proj": 2, r"model\.layers\.\d\.mlp.*": 5, "proj": 9, "q_proj": 3},
        alpha_pattern={"(k|v)_proj": 3, "layers.0.self_attn.o_proj": 20.5, "o_pro": 90})),
    ("patterns, rsLoRA, DoRA", False, TIED, dict(
        use_rslora=True, use_dora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 1})),
    ("some layers", False, TIED, dict(layers_to_transform=[1], exclude_modules=["v_proj"])),
    ("fan_in_fan_out, biases, all silent", False, TIED, dict(
        fan_in_fan_out=True, bias="all", lora_dropout=0.1, init_lora_weights="Gaussian")),
    ("orthogonal", False, TIED, dict(init_lora_weights="orthogonal")),
    ("MiCA", False, TIED, dict(init_lora_weights="mica")),
    ("rank 1", False, TIED, dict(r=1)),
    ("rank above the width", False, TIED, dict(r=64, lora_alpha=3)),
    ("head", True, TIED, dict(target_modules=["q_proj", "lm_head"])),
    ("head, embedding whole", True, TIED, dict(
        target_modules=["lm_head"], modules_to_save=["embed_tokens"])),
    ("head, resized", True, TIED, dict(target_modules=["lm_head"], resize=360)),
    ("head, DoRA", True, TIED, dict(target_modules=["lm_head"], use_dora=True)),
    ("head, untied", True, UNTIED, dict(target_modules=["lm_head"])),
    ("norms whole", False, TIED, dict(modules_to_save=["input_layernorm", "norm"])),
    ("a matrix whole", False, TIED, dict(
        target_modules=["q_proj"], modules_to_save=["down_proj"])),
    ("embedding whole", True, TIED, dict(modules_to_save=["embed_tokens"])),
    ("embedding whole, untied", True, UNTIED, dict(modules_to_save=["embed_tokens"])),
    ("embedding whole, kept tied", False, TIED, dict(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ("head whole", True, TIED, dict(modules_to_save=["lm_head"])),
    ("both whole", True, TIED, dict(modules_to_save=["embed_tokens", "lm_head"])),
    ("resized", False, TIED, dict(resize=360)),
    ("resized, untied", True, UNTIED, dict(resize=360)),
    ("resized, embedding whole", True, TIED, dict(resize=360, modules_to_save=["embed_tokens"])),
    ("resized, both whole", True, TIED, dict(
        resize=360, modules_to_save=["embed_tokens", "lm_head"])),
    ("of the inner model", False, TIED, dict(inner=True)),
    ("bf16", False, TIED, dict(dtype="bfloat16")),
    ("f16", False, TIED, dict(dtype="float16", modules_to_save=["norm"])),
    ("pickled", False, TIED, dict(save=dict(safe_serialization=False))),
]


def good(engine, folder, what, has_head, adapter, options=None):
    """Converts the base model with the adapter, and checks weights and logits."""
    out = os.path.join(folder, "out.bin")
    options = options or ["--lora", adapter.path]
    run = convert(adapter.base, out, "--type", "f32", *options)
    if not check(run.returncode == 0, f"{what}: exit {run.returncode}: {run.stderr.strip()}"):
        return None
    ids = [2, 300, 7, 350 % adapter.hf.config.vocab_size, 19, 3, 4, 5, 211]
    want = ref.hf_logits(adapter.hf, ids)
    model = ref.Model(engine, out)
    session = ref.Session(model, n_batch=len(ids), cache_type=1)
    off = abs(session.rows(ids) - want).max()
    session.close(), model.close()
    check(off <= LOGITS, f"{what}: logits are off by {off:.3g}")
    f = ref.Bin(out)
    worst = compare(what, f, adapter, bounds(adapter), has_head)
    check(not f.digest_faults(), f"{what}: digests")
    os.remove(out)
    return off, worst


# ---- several adapters, scales, other files ------------------------------------------------


def second(adapter, number, scale=1.0, **config):
    """Adds another adapter, active together with the first, and returns its directory."""
    import peft
    with quiet():
        name = "default%d" % number
        adapter.peft.add_adapter(name, peft.LoraConfig(**{
            "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **config}))
        adapter.peft.set_adapter(name)
        adapter.draw(number)
        path = os.path.join(adapter.folder, "more")
        adapter.peft.save_pretrained(path, selected_adapters=[name])
        adapter.peft.base_model.set_adapter(["default", name])
    for module in adapter.hf.modules():
        if hasattr(module, "set_scale"):
            module.set_scale(name, scale)
    adapter.peft.eval()
    return os.path.join(path, name)


def test_several(engine, folder):
    a = Adapter(folder)
    b = second(a, 1, scale=-0.75, use_rslora=True)
    c = second(a, 2)
    for module in a.hf.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2.0)
    a.peft.base_model.set_adapter(["default", "default1", "default2"])
    good(engine, folder, "three adapters", False, a, [
        "--lora", a.path + "=2", "--lora", b + "=-0.75", "--lora", c, "--source", "here"])
    a = Adapter(folder, use_dora=True)
    for module in a.hf.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    good(engine, folder, "DoRA at half its scale", False, a, ["--lora", a.path + "=.5"])


def renamed(before, after):
    return lambda tensors: {k.replace(before, after): t for k, t in tensors.items()}


def test_spellings(engine, folder):
    """Other tools write other keys: with an adapter's name inside, or without the prefix."""
    dora = dict(use_dora=True, target_modules=["v_proj", "lm_head"], modules_to_save=["norm"])
    for what, change in (
            ("names of adapters", lambda t: {
                k.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")
                .replace("model.norm.", "model.norm.modules_to_save.mine.")
                .replace("vector", "vector.mine.weight"): v for k, v in t.items()}),
            ("no prefix", renamed("base_model.model.", ""))):
        a = Adapter(folder, **dora)
        a.edit(change)
        good(engine, folder, what, True, a)


def test_converted(engine, folder):
    """PiSSA subtracts its first factors from the base.  A converted adapter does so itself."""
    import peft
    a = Adapter(folder, target_modules=["q_proj"], init_lora_weights="pissa")
    base = a.load({})  # the original base; PEFT's is the changed base plus the adapter
    start = os.path.join(folder, "start")
    with quiet():
        hf = a.load({})
        p = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"],
                                                    init_lora_weights="pissa"))
        p.peft_config["default"].init_lora_weights = True
        p.save_pretrained(start)
        p.peft_config["default"].init_lora_weights = "pissa"
        a.hf, a.peft = hf, p.eval()
        a.draw(0)
        p.save_pretrained(a.path, path_initial_model_for_weight_conversion=start)
    limits = bounds(a)
    name = "model.layers.%d.self_attn.q_proj"
    for i in range(2):  # the subtraction rounds, and so does adding back
        w = base.state_dict()[name % i + ".weight"].abs().numpy()
        limits[name % i] = 4 * limits[name % i] + 8 * U * (w + w.max())
    out = os.path.join(folder, "out.bin")
    run = convert(a.base, out, "--type", "f32", "--lora", a.path)
    if check(run.returncode == 0, f"converted PiSSA: {run.stderr.strip()}"):
        compare("converted PiSSA", ref.Bin(out), a, limits, False)


def test_side_files(folder):
    """Pieces, template, name and options that come with an adapter."""
    a = Adapter(folder, resize=348, modules_to_save=["embed_tokens", "lm_head"])
    shutil.copy(os.path.join(a.base, "tokenizer.model"), a.path)
    with open(os.path.join(a.path, "added_tokens.json"), "w") as f:
        json.dump({"<tool>": 347}, f)
    with open(os.path.join(a.path, "chat_template.jinja"), "w") as f:
        f.write("{{ mine }}")
    with open(os.path.join(a.path, "tokenizer_config.json"), "w") as f:
        json.dump({"eos_token": "<tool>"}, f)
    out = os.path.join(folder, "out.bin")
    run = convert(a.base, out, "--lora", a.path + "=0.5")
    if not check(run.returncode == 0, f"side files: {run.stderr.strip()}"):
        return
    f = ref.Bin(out)
    facts, (_, pieces) = f.facts(), f.vocabulary()
    check(pieces[347][0] == b"<tool>", f"side files: piece {pieces[347]}")
    check(f.header["stop"] == [1, 347, 5], f"side files: ends at {f.header['stop']}")
    check(facts["chat_template"] == "{{ mine }}", "side files: chat template")
    check(facts["export"].endswith("--type q8 --lora adapter0=0.5"), f"options: {facts['export']}")
    check(facts["name"] == "checkpoint + adapter0", f"name: {facts['name']}")
    check("adapter0" in facts["source"], f"source: {facts['source']}")
    check("scale does not apply" in run.stderr, f"side files: says {run.stderr!r}")
    for name in ("adapter_model.safetensors", "adapter_config.json", "added_tokens.json"):
        path = os.path.join(a.path, name)
        before = open(path, "rb").read()
        run = convert(a.base, path, "--lora", a.path)
        check(run.returncode == 1 and "input" in run.stderr, f"overwriting {name}: {run.stderr}")
        check(open(path, "rb").read() == before, f"{name} was overwritten")


def test_eos_token(folder):
    """An adapter may rename a token with the embedding unchanged: that token ends its texts."""
    a = Adapter(folder)
    with open(os.path.join(a.path, "tokenizer_config.json"), "w") as f:
        json.dump({"eos_token": "<|im_end|>",
                   "added_tokens_decoder": {"9": {"content": "<|im_end|>", "special": True}}}, f)
    out = os.path.join(folder, "out.bin")
    run = convert(a.base, out, "--lora", a.path)
    if check(run.returncode == 0, f"an adapter's eos_token: {run.stderr.strip()}"):
        stop = ref.Bin(out).header["stop"]
        check(stop == [1, 9, 5], f"an adapter's eos_token: ends at {stop}")


def test_gguf_base(folder):
    """The base model's own format does not matter."""
    a = Adapter(folder, oracle_gguf.FACTS)
    model = oracle_gguf.Model(lambda role, layer: "F32")
    path = os.path.join(folder, "base.gguf")
    oracle_gguf.write_gguf(path, model)
    oracle_gguf.check_same(path, model, folder, "LoRA on GGUF", "--lora", a.path)


def test_workers(folder):
    """Three worker processes write the same file as one."""
    a = Adapter(folder, dict(hidden_size=1024, num_attention_heads=4, intermediate_size=3072,
                             num_key_value_heads=2, head_dim=256), use_dora=True)
    made = []
    for jobs in "1", "3":
        out = os.path.join(folder, "out.bin")
        run = apart(a.base, out, "--type", "bf16", "-j", jobs, "--lora", a.path)
        check(run.returncode == 0, f"{jobs} workers: {run.stderr.strip()}")
        with open(out, "rb") as f:
            made.append(f.read())
        os.remove(out)
    check(made[0] == made[1], "workers make another file")


# ---- what must be refused -----------------------------------------------------------------

Q = "base_model.model.model.layers.1.self_attn.q_proj."
EMB = "base_model.model.model.embed_tokens."


def without(key):
    return lambda a: a.edit(lambda t: {k: v for k, v in t.items() if k != key})


def add(key, *shape, dtype="float32"):
    return lambda a: a.edit(lambda t: {
        **t, key: a.torch.ones(shape, dtype=getattr(a.torch, dtype))})


def spoil(key, value):
    def change(tensors):
        tensors[key].view(-1)[3] = value
        return tensors
    return lambda a: a.edit(change)


def setting(**changes):
    return lambda a: a.configure(**changes)


def rewrite(name, data):
    def edit(a):
        with open(os.path.join(a.path, name), "wb") as f:
            f.write(data)
    return edit


def pickled(make):
    """The tensors as a pickle instead."""
    def edit(a):
        os.remove(os.path.join(a.path, "adapter_model.safetensors"))
        a.torch.save(make(a.torch), os.path.join(a.path, "adapter_model.bin"))
    return edit


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/gemma2-executed-a-pickle",)


# settings, an edit of the saved adapter, words of the error message
NAN = float("nan")
BAD = [
    ({}, without(Q + "lora_B.weight"), "lora_A", "neither"),
    ({}, without(Q + "lora_A.weight"), "lora_B", "neither"),
    ({}, add(Q + "lora_A.weight", 4, 41), "shape", "[4, 41]", "[4, 42]"),
    ({}, add(Q + "lora_B.weight", 61, 4), "[61, 4]"),
    ({}, add(Q + "lora_A.weight", 5, 42), "[5, 42]"),
    ({}, add(Q + "lora_A.weight", 4, 42, 1), "no matrix"),
    ({}, add(Q + "lora_A.weight", 0, 42), "no matrix"),
    ({}, add(Q + "lora_A.weight", 4, 42, dtype="int32"), "I32"),
    ({}, add(Q + "lora_A.other.weight", 4, 42), "twice"),
    ({}, add(Q + "lora_B.bias", 60), "bias"),
    ({}, add(Q + "lora_C.weight", 4, 42), "lora_C"),
    ({}, add(Q + "weight", 60, 42), "neither the whole of layers.1.q"),
    ({"modules_to_save": ["norm"]}, add("base_model.model.model.norm.weight", 41), "[41, 1]"),
    ({}, add("base_model.model.model.layers.1.input_layernorm.lora_A.weight", 4, 1), "neither"),
    ({}, add("base_model.model.score.weight", 2, 42), "score"),
    ({}, add("base_model.model.model.vision_tower.weight", 2, 42), "vision"),
    ({}, add("base_model.model.model.layers.2.self_attn.q_proj.weight", 60, 42), "2 layers"),
    ({}, spoil(Q + "lora_A.weight", NAN), "lora_A", "NaN"),
    ({}, spoil(Q + "lora_B.weight", NAN), "lora_B", "NaN"),
    ({"modules_to_save": ["norm"]}, spoil("base_model.model.model.norm.weight", NAN), "NaN"),
    ({"use_dora": True}, without(Q + "lora_magnitude_vector"), "layers.1.q", "magnitude"),
    ({"use_dora": True}, add(Q + "lora_magnitude_vector", 59), "[59, 1]"),
    ({"use_dora": True}, setting(use_dora=False), "lora_magnitude_vector", "neither"),
    ({"use_dora": True}, spoil(Q + "lora_magnitude_vector", NAN), "magnitude", "NaN"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, None, "lora_embedding_A", "merge_and_unload"),
    ({"trainable_token_indices": [3, 4]}, None, "trainable_token_indices", "merge_and_unload"),
    ({}, add(EMB + "token_adapter.trainable_tokens_delta", 2, 42), "trained tokens"),
    ({}, add(EMB + "lora_A.weight", 4, 42), "neither"),
    ({"modules_to_save": ["embed_tokens"]}, add(EMB + "weight", 360, 42), "360", "both"),
    ({"modules_to_save": ["embed_tokens"]}, add(EMB + "weight", 347, 41), "[347, 41]"),
    ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, None, "pissa", "original"),
    ({"init_lora_weights": "pissa_niter_2", "target_modules": ["q_proj"]}, None, "pissa_niter_2"),
    ({"init_lora_weights": "olora", "target_modules": ["q_proj"]}, None, "olora"),
    ({}, setting(init_lora_weights="corda"), "corda"),
    ({}, setting(init_lora_weights="loftq"), "loftq"),
    ({}, setting(init_lora_weights="lora_ga"), "lora_ga"),
    ({}, setting(init_lora_weights="novel"), "novel"),
    ({}, setting(peft_type="IA3"), "IA3"),
    ({}, setting(peft_type=None), "null"),
    ({}, rewrite("adapter_config.json", b'{"fine_tune_type": "lora", "num_layers": 16, '
                 b'"lora_parameters": {"rank": 8, "scale": 20.0}}'), "mlx_lm.fuse"),
    ({}, setting(use_novelty=True), "use_novelty"),
    *(({}, setting(**{name: value}), name) for name, value in [
        ("alora_invocation_tokens", [5]), ("arrow_config", {"top_k": 3}), ("lora_bias", True),
        ("kasa_config", {"beta": 1}), ("layer_replication", [[0, 1]]), ("use_qalora", True),
        ("megatron_config", {"x": 1}), ("monteclora_config", {"x": 1}),
        ("target_parameters", ["q_proj.weight"]), ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"scale": 2})]),
    ({}, setting(r=0), "r is 0"),
    ({}, setting(r=8), "[4, 40]", "[8, 40]"),
    ({}, setting(lora_alpha="much"), "lora_alpha"),
    ({}, setting(lora_alpha=NAN), "lora_alpha"),
    ({}, setting(rank_pattern=[1]), "rank_pattern"),
    ({}, setting(rank_pattern={"q_proj": True}), "q_proj"),
    ({}, setting(alpha_pattern={"(": 3}), "regular expression"),
    ({}, rewrite("adapter_config.json", b"{"), "JSON"),
    ({}, rewrite("adapter_model.safetensors", b"version https://git-lfs"), "git lfs"),
    ({}, lambda a: os.remove(os.path.join(a.path, "adapter_config.json")), "adapter_config.json"),
    ({}, lambda a: os.remove(os.path.join(a.path, "adapter_model.safetensors")), "fetch it"),
    ({}, lambda a: os.truncate(os.path.join(a.path, "adapter_model.safetensors"), 2000),
     "truncated"),
    ({}, lambda a: a.edit(lambda t: {}), "no tensors"),
    ({}, pickled(lambda torch: {"x": Hostile()}), "nothing was run"),
    ({}, pickled(lambda torch: [torch.ones(2)]), "dictionary"),
    ({}, pickled(lambda torch: {Q + "lora_A.weight": torch.ones(4, 42).char()}), "I8"),
]


def refused(what, run, place, *words):
    text = run.stderr.strip().split("\n")[-1]
    check(run.returncode == 1, f"{what}: exit {run.returncode}: {run.stderr[-300:]}")
    check("Traceback" not in run.stderr and "Warning" not in run.stderr and text,
          f"{what}: says {run.stderr[-400:]!r}")
    check(all(w in text for w in words), f"{what}: {words} not in {text!r}")
    check(not os.listdir(place), f"{what}: leaves {os.listdir(place)}")


def test_refused(folder):
    saved = {}
    for i, (config, edit, *words) in enumerate(BAD):
        if json.dumps(config) not in saved:
            saved[json.dumps(config)] = Adapter(folder, number=len(saved), **config)
        a = copy.copy(saved[json.dumps(config)])
        a.path = shutil.copytree(a.path, os.path.join(folder, "bad%d" % i))
        if edit:
            edit(a)
        place = os.path.join(folder, "place%d" % i)
        os.makedirs(place)
        run = convert(a.base, os.path.join(place, "out.bin"), "--lora", a.path)
        refused("bad adapter %d (%s)" % (i, ", ".join(words)), run, place, *words)
    check(not os.path.exists("/tmp/gemma2-executed-a-pickle"), "a pickle was executed")


def test_refused_together(folder):
    """Adapters that cannot be added, inputs of the wrong kind, and wrong usage."""
    place = os.path.join(folder, "together")
    os.makedirs(place)
    out = os.path.join(place, "out.bin")
    plain, dora = Adapter(folder), Adapter(folder, number=1, use_dora=True)
    whole = [Adapter(folder, number=i, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
             for i in (2, 3)]
    for what, paths, *words in [
            ("LoRA, DoRA", [plain.path, dora.path], "adapter1", "add up"),
            ("DoRA, LoRA", [dora.path, plain.path], "adapter0", "add up"),
            ("whole twice", [w.path for w in whole], "adapter3", "embedding", "add up"),
            ("not a directory", [plain.base], "adapter_config.json"),
            ("missing", [os.path.join(folder, "nowhere")], "does not exist")]:
        options = [word for p in paths for word in ("--lora", p)]
        refused(what, convert(plain.base, out, *options), place, *words)
    refused("an adapter as checkpoint", convert(plain.path, out), place, "--lora", "base model")
    for text in ("=2", plain.path + "=much", plain.path + "=nan", plain.path + "="):
        run = convert(plain.base, out, "--lora", text)
        check(run.returncode == 2 and "SCALE" in run.stderr, f"--lora {text}: {run.stderr}")
    run = convert(plain.base, out, "--tokenizer-only", "--lora", plain.path)
    check(run.returncode == 2, f"--tokenizer-only --lora: exit {run.returncode}")
    pickled(lambda torch: {})(plain)
    refused("no tensors", convert(plain.base, out, "--lora", plain.path), place, "no tensors")


def test_lora(engine, folder):
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for more threads
    worst = []
    for what, has_head, facts, config in GOOD:
        worst.append(good(engine, folder, what, has_head, Adapter(folder, facts, **config)))
    test_several(engine, folder)
    test_spellings(engine, folder)
    test_converted(engine, folder)
    test_side_files(folder)
    test_eos_token(folder)
    test_gguf_base(folder)
    test_workers(folder)
    test_refused(folder)
    test_refused_together(folder)
    torch.set_num_threads(threads)
    print("lora: logits off by %.2g, weights by %.2g of what rounding allows"
          % tuple(max(w[i] for w in worst if w) for i in (0, 1)))
