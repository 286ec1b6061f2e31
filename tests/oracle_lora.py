"""Adapters, for oracle.py: what export.py --lora makes of everything that PEFT saves.

PEFT wraps a random model and all that it could train is drawn at random.  The file made from
the model and the saved adapter must then hold the weights of PEFT's merge_and_unload(), and
the engine must give the logits of PEFT's model as it is trained, unmerged."""
import contextlib
import json
import os
import shutil
import warnings

import numpy as np

import reference as ref
from oracle_export import Checkpoint, convert
from reference import check

U = 2.0 ** -24   # what one rounding to f32 loses, relatively
LOGITS = 1e-4    # of float32 logits, as for every model
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
        """Factors that change weights by about their own size; lengths near the true ones."""
        g = self.torch.Generator().manual_seed(100 + number)
        with self.torch.no_grad():
            for name, p in self.trained():
                noise = self.torch.randn(p.shape, generator=g)
                if "magnitude" in name:
                    p.mul_(1 + 0.3 * noise)
                elif "lora_" in name:
                    p.copy_(noise * 0.3)
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
        """As PEFT advises before merging: else adding to the one adds to the other, too."""
        emb, head = map(innermost, (self.hf.model.embed_tokens, self.hf.lm_head))
        if emb.weight is head.weight:
            head.weight = self.torch.nn.Parameter(head.weight.detach().clone())


def innermost(module):
    """The plain layer inside PEFT's wrappers."""
    for name in ("token_adapter", "original_module", "base_layer"):
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

    Both round a sum of r products, in an order of their own, and multiply by s: each is off
    by (r + 1) U s |B||A| at most.  DoRA divides by a length that PEFT sums in f32, over n
    numbers in at least 8 parts: (n / 8 + 8) U of the weight, as (1 + x)^1/2 halves it."""
    from peft.tuners.lora.layer import Embedding, LoraLayer
    found = {}
    for name, module in adapter.hf.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for key in module.active_adapters:
            if isinstance(module, Embedding):
                a, b = module.lora_embedding_A[key].T, module.lora_embedding_B[key].T
            else:
                a, b = module.lora_B[key].weight, module.lora_A[key].weight
            size = (a.abs() @ b.abs()).detach().numpy() * abs(module.scaling[key])
            bound = 2 * (b.shape[0] + 1) * U * size
            if key in module.lora_magnitude_vector:
                along = 0 if isinstance(module, Embedding) else 1
                full = (innermost(module).weight + module.get_delta_weight(key)).detach().numpy()
                m = np.expand_dims(module.lora_magnitude_vector[key].weight.detach().numpy(), along)
                f = m / np.linalg.norm(full.astype(float), axis=along, keepdims=True)
                bound = abs(f) * (bound + (full.shape[along] / 8 + 8) * U * abs(full))
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
        worst = max(worst, float((off / np.maximum(abs(want), 1e-3)).max() / U / 2))
    return worst


# ---- what PEFT saves --------------------------------------------------------------------

TIED, UNTIED = {}, {"tie_word_embeddings": False}
# what, does the file get a head of its own, the base model, settings
GOOD = [
    ("plain", False, TIED, {}),
    ("rsLoRA", False, TIED, dict(use_rslora=True)),
    ("DoRA", False, TIED, dict(use_dora=True)),
    ("rsLoRA and DoRA, untied", True, UNTIED, dict(use_dora=True, use_rslora=True)),
    ("patterns", False, TIED, dict(
        rank_pattern={"proj": 9, "1.self_attn.q_proj": 6, "q_proj": 3, r"model\.layers\.\d\.mlp.*": 5,
                      "mlp.up_proj": 2, "^model.layers.0.self_attn.k_proj": 8},
        alpha_pattern={"(k|v)_proj": 3, "o_pro": 90, "layers.0.self_attn.o_proj": 20.5})),
    ("patterns, rsLoRA, DoRA", False, TIED, dict(
        use_rslora=True, use_dora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 1})),
    ("some layers", False, TIED, dict(layers_to_transform=[1], exclude_modules=["v_proj"])),
    ("fan_in_fan_out, biases, all silent", False, TIED, dict(
        fan_in_fan_out=True, bias="all", lora_dropout=0.1, init_lora_weights="gaussian")),
    ("orthogonal", False, TIED, dict(init_lora_weights="orthogonal")),
    ("MiCA", False, TIED, dict(init_lora_weights="mica")),
    ("rank 1", False, TIED, dict(r=1)),
    ("rank above the width", False, TIED, dict(r=64, lora_alpha=3)),
    ("embedding", True, TIED, dict(target_modules=["q_proj", "embed_tokens"])),
    ("embedding, untied", True, UNTIED, dict(target_modules=["embed_tokens"])),
    ("embedding, kept tied", False, TIED, dict(
        target_modules=["embed_tokens"], ensure_weight_tying=True)),
    ("embedding, DoRA", True, TIED, dict(target_modules=["embed_tokens"], use_dora=True)),
    ("head", True, TIED, dict(target_modules=["q_proj", "lm_head"])),
    ("head, DoRA", True, TIED, dict(target_modules=["lm_head"], use_dora=True)),
    ("head, untied", True, UNTIED, dict(target_modules=["lm_head"])),
    ("embedding and head", True, TIED, dict(target_modules=["embed_tokens", "lm_head"])),
    ("norms whole", False, TIED, dict(modules_to_save=["input_layernorm", "norm"])),
    ("a matrix whole", False, TIED, dict(
        target_modules=["q_proj"], modules_to_save=["down_proj"])),
    ("embedding whole", True, TIED, dict(modules_to_save=["embed_tokens"])),
    ("embedding whole, untied", True, UNTIED, dict(modules_to_save=["embed_tokens"])),
    ("embedding whole, kept tied", False, TIED, dict(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ("head whole", True, TIED, dict(modules_to_save=["lm_head"])),
    ("both whole", True, TIED, dict(modules_to_save=["embed_tokens", "lm_head"])),
    ("tokens", False, TIED, dict(trainable_token_indices=[300, 7, 19])),
    ("tokens, untied", True, UNTIED, dict(trainable_token_indices=[300, 7, 19])),
    ("tokens, of both", True, TIED, dict(
        trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [5]})),
    ("resized", False, TIED, dict(resize=360)),
    ("resized, untied", True, UNTIED, dict(resize=360)),
    ("resized, embedding", True, TIED, dict(resize=360, target_modules=["embed_tokens"])),
    ("resized, embedding whole", True, TIED, dict(resize=360, modules_to_save=["embed_tokens"])),
    ("resized, both whole", True, TIED, dict(
        resize=360, modules_to_save=["embed_tokens", "lm_head"])),
    ("resized, tokens", False, TIED, dict(resize=360, trainable_token_indices=[350, 2])),
    ("of the inner model", False, TIED, dict(inner=True)),
    ("bf16", False, TIED, dict(dtype="bfloat16")),
    ("f16", False, TIED, dict(dtype="float16", modules_to_save=["norm"])),
    ("pickled", False, TIED, dict(save=dict(safe_serialization=False))),
]


def good(engine, folder, what, has_head, adapter, options=None):
    """Converts the adapter's model with it; weights and logits."""
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


def test_lora(engine, folder):
    worst = []
    for what, has_head, facts, config in GOOD:
        worst.append(good(engine, folder, what, has_head, Adapter(folder, facts, **config)))
    print("lora: logits off by %.2g, weights by %.3g of their last places"
          % tuple(max(w[i] for w in worst if w) for i in (0, 1)))
