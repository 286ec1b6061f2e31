"""The part of oracle.py about quantised Hugging Face directories, hub names and derivatives.

The library that writes a quantised matrix (bitsandbytes, mlx, compressed-tensors) decodes it
in float32, and the values must be equal to the bit.  The libraries of GPTQ and AWQ want a GPU,
so the writers below take their place.  AutoGPTQ's QuantLinear.pack and AutoAWQ's
dequantize_gemm were run beside the writers once and agreed."""
import contextlib
import http.server
import io
import json
import math
import os
import pickle
import shutil
import threading

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would compile for seconds

import numpy as np

import oracle_export
import oracle_lora
import reference as ref
from oracle_export import Checkpoint, apart, bad, check_exact, convert, drop, good, spoil
from reference import check

import export

# Every width is a multiple of 32, because GPTQ's packing wants it
WIDTHS = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
              head_dim=16)
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SEED = int(os.environ.get("ORACLE_SEED", "1"))
STATE = Q + ".weight.quant_state.bitsandbytes__nf4"


# ---- what each method makes of a matrix: its parts, and the f32 values they mean -------


def by_group(w, group):
    return w.reshape(len(w), -1, group)


def affine(w, bits, group, rng):
    """Codes, scales and zeros [out, groups], asymmetric: some zeros are 0 or the largest code."""
    x = by_group(w.numpy(), group)
    scale = ((x.max(2) - x.min(2)) / (2 ** bits - 1)).astype(np.float16)
    zero = np.clip(np.rint(-x.min(2) / scale), 0, 2 ** bits - 1).astype(np.uint32)
    ends = rng.random(zero.shape)
    zero[ends < 0.05], zero[ends > 0.95] = 0, 2 ** bits - 1
    q = np.clip(np.rint(x / scale[..., None]) + zero[..., None], 0, 2 ** bits - 1)
    return q.astype(np.uint32).reshape(w.shape), scale, zero


def bit_stream(q, bits):
    """q [n, codes] to words [n, codes * bits / 32] by way of single bits."""
    single = q[..., None] >> np.arange(bits) & 1
    return np.packbits(single.astype(np.uint8).reshape(len(q), -1), axis=1,
                       bitorder="little").view("<i4")


def gptq(w, module, rng, bits=4, group=32, order=False, dtype="float16"):
    """order shuffles the columns' groups, as desc_act does.  Each zero is stored minus 1."""
    import torch
    g_idx = np.arange(w.shape[1]) // group
    if order:
        g_idx = rng.permutation(g_idx)
    sorted_w = w[:, np.argsort(g_idx, kind="stable")]
    q, scale, zero = affine(sorted_w, bits, group, rng)
    q = q[:, np.argsort(np.argsort(g_idx, kind="stable"))]
    scale = torch.tensor(scale).to(getattr(torch, dtype))
    scale32 = scale.float().numpy()
    back = (q.astype(np.float32) - zero[:, g_idx]) * scale32[:, g_idx]
    return {"qweight": torch.tensor(np.ascontiguousarray(bit_stream(q, bits).T)),
            "qzeros": torch.tensor(bit_stream((zero - 1).T % 2 ** bits, bits)),
            "scales": scale.T.contiguous(), "g_idx": torch.tensor(g_idx.astype(np.int32))}, back


AWQ_SHUFFLE = [0, 2, 4, 6, 1, 3, 5, 7]  # column of each nibble


def awq(w, module, rng, group=32):
    import torch
    q, scale, zero = affine(w, 4, group, rng)
    back = (by_group(q.astype(np.float32), group) - zero[..., None]) * scale.astype(
        np.float32)[..., None]

    def pack(a):
        a = a.T.reshape(a.shape[1], -1, 8)[:, :, AWQ_SHUFFLE]
        return torch.tensor(bit_stream(a.reshape(len(a), -1), 4))
    return {"qweight": pack(q), "qzeros": pack(zero),
            "scales": torch.tensor(scale.T.copy())}, back.reshape(w.shape)


def mlx(w, module, rng, bits=4, group=32, dtype="float32", own=None):
    """own: {module: (bits, group)} of modules that differ."""
    import mlx.core as mx
    import torch
    bits, group = (own or {}).get(module, (bits, group))
    given = mx.array(w.numpy()).astype(getattr(mx, dtype))
    codes, scales, biases = mx.quantize(given, group_size=group, bits=bits)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    back = mx.dequantize(codes, *wide, group_size=group, bits=bits)
    kind = getattr(torch, dtype)
    scales, biases = (torch.tensor(np.array(a)).to(kind) for a in wide)
    return {"weight": torch.tensor(np.array(codes)), "scales": scales, "biases": biases}, np.array(
        back)


def bnb4(w, module, rng, kind="nf4", nested=False, run=64, storage="uint8"):
    import bitsandbytes as bnb
    import torch
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False)
    layer.weight = bnb.nn.Params4bit(
        w, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=run,
        quant_storage=getattr(torch, storage))
    layer = layer.to("cpu")
    return dict(layer.state_dict()), bnb4_values(layer.weight.data, layer.weight.quant_state)


def bnb4_values(codes, state):
    """Decodes by the library's definition for all devices.  Its faster kernel for CPUs mixes up
    the scales where a row is no multiple of a run."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.backends.default import ops
    absmax, cols = state.absmax, state.shape[1]
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    back = ops._dequantize_4bit_compute(codes.view(torch.uint8).reshape(-1), absmax, state.code,
                                        state.blocksize, state.shape, torch.float32)
    if cols % state.blocksize == 0:
        check(torch.equal(back, functional.dequantize_4bit(codes, state)),
              "bitsandbytes contradicts itself")
    return back.numpy()


def bnb8(w, module, rng):
    import bitsandbytes as bnb
    import torch
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w.to(torch.float16))
    back = bnb.functional.int8_vectorwise_dequant(codes, scales)
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, (
        back.numpy())


def compressed(w, module, rng, form="pack-quantized", dtype="float32", **weights):
    """Scales from the greatest weight of each block, random zeros, packed by the library."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    args = scheme.weights
    tall, wide = args.block_structure or {
        "tensor": w.shape, "channel": (1, w.shape[1])}.get(args.strategy, (1, args.group_size))
    grid = -(-w.shape[0] // tall), -(-w.shape[1] // wide)
    full = torch.nn.functional.pad(w, (0, grid[1] * wide - w.shape[1],
                                       0, grid[0] * tall - w.shape[0]))
    x = full.reshape(grid[0], tall, grid[1], wide)
    top = 448.0 if args.type == "float" else 2.0 ** (args.num_bits - 1) - 1
    scale = (x.abs().amax((1, 3)) / top).to(getattr(torch, dtype))
    parts = {"weight": w.to(scale.dtype), "weight_scale": scale}
    if args.strategy == "tensor":
        parts["weight_scale"] = scale.reshape(1)
    if not args.symmetric:
        parts["weight_zero_point"] = torch.tensor(
            rng.integers(-2 ** (args.num_bits - 1), 2 ** (args.num_bits - 1), scale.shape)
            // 2).to(torch.int8)
    packer = BaseCompressor.get_value_from_registry(form)
    parts = packer.compress(parts, scheme)
    back = packer.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, scheme)
    return parts, back["weight"].float().numpy()


def fp8(w, module, rng, name="weight_scale", by_row=True, kind="float8_e4m3fn"):
    """As AutoFP8 packs: a scale for each row, or one scale for the matrix."""
    import torch
    top = w.abs().amax(1, keepdim=True) if by_row else w.abs().max()
    scale = (top / torch.finfo(getattr(torch, kind)).max).float()
    codes = (w / scale).to(getattr(torch, kind))
    return {"weight": codes, name: scale, "input_scale": torch.tensor(0.25)}, (
        codes.float() * scale).numpy()


# ---- whole checkpoints ----------------------------------------------------------------


def quantised(make, settings, loss=1.0, also=(), key="quantization_config", **options):
    """An edit of a checkpoint that packs every projection (and the modules named in also)
    and gives the model the decoded values.  loss is the largest relative loss allowed."""
    def edit(c):
        rng = np.random.default_rng(7)
        state, c.lost = c.hf.state_dict(), 0.0
        for name in [n for n in c.tensors if "_proj" in n or n in also]:
            module, w = name[:-len(".weight")], c.tensors.pop(name)
            parts, back = make(w.clone(), module, rng, **options)
            c.tensors.update({f"{module}.{k}": v.contiguous() for k, v in parts.items()})
            state[name].copy_(c.torch.tensor(np.ascontiguousarray(back)))
            lost = (state[name] - w).norm() / w.norm()
            check(lost <= loss, f"{settings} {options}: {name} loses {lost:.3f} of its norm")
        c.config[key] = dict(settings)
    return edit


def compressed_settings(form, **weights):
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def gptq_settings(**more):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False,
            **more}


def test_gptq(folder):
    for bits, loss in ((4, 0.4), (8, 0.3)):
        good(folder, f"GPTQ {bits} bits", quantised(
            gptq, gptq_settings(bits=bits, checkpoint_format="gptq"), loss, bits=bits), **WIDTHS)
    meta = {"quantizer": ["gptqmodel:7.7.0"]}
    good(folder, "GPTQModel", quantised(gptq, gptq_settings(meta=meta, sym=True), 0.4), **WIDTHS)
    bad(folder, "GPTQModel's zeros", quantised(gptq, gptq_settings(meta=meta)), "GPTQModel",
        "sym is false", **WIDTHS)
    for bits in (2, 3):
        bad(folder, f"GPTQ {bits} bits", quantised(gptq, gptq_settings(bits=bits), bits=bits),
            f"{bits} bits", **WIDTHS)
    good(folder, "GPTQ desc_act", quantised(gptq, gptq_settings(desc_act=True), 0.4, order=True),
         **WIDTHS)
    good(folder, "GPTQ bf16 scales", quantised(gptq, gptq_settings(), 0.4, dtype="bfloat16"),
         **WIDTHS)
    test_gptq_leftovers(folder)


def test_gptq_leftovers(folder):
    """g_idx missing or all zeros, biases of zeros, sizes that only some layers have."""
    def without(c):
        quantised(gptq, gptq_settings(), 0.4)(c)
        for name in [n for n in c.tensors if n.endswith("g_idx")]:
            del c.tensors[name]
    good(folder, "GPTQ without g_idx", without, **WIDTHS)

    def zeros(c):
        quantised(gptq, gptq_settings(), 0.4)(c)
        for name in [n for n in c.tensors if n.endswith("g_idx")]:
            c.tensors[name] *= 0
            c.tensors[name.replace("g_idx", "bias")] = c.torch.zeros(
                c.tensors[name.replace("g_idx", "scales")].shape[1])
    good(folder, "GPTQ with g_idx and biases of zeros", zeros, **WIDTHS)

    c = Checkpoint(folder, **WIDTHS)
    quantised(gptq, gptq_settings(), 0.4)(c)
    c.write()
    c.torch.save(c.tensors, c.file("pytorch_model.bin"))
    os.remove(c.file("model.safetensors"))
    run = convert(c.path, c.path + ".bin", "--type", "f32")
    if check(run.returncode == 0, f"GPTQ as .bin: {run.stderr}"):
        check_exact(c, c.path + ".bin", "GPTQ as .bin")

    def mixed(w, module, rng):
        return gptq(w, module, rng, **(dict(bits=8, group=16) if "down" in module else {}))
    good(folder, "GPTQ with layers of other sizes", quantised(mixed, gptq_settings(), 0.4),
         **WIDTHS)


def test_awq(folder):
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}

    def with_head(c):
        quantised(awq, {**settings, "version": "gemm"}, 0.4)(c)
        c.tensors["lm_head.weight"] = c.tensors["model.embed_tokens.weight"].clone()
    good(folder, "AWQ with a copied head", with_head, **WIDTHS)


def test_mlx(folder):
    every = ["model.embed_tokens.weight"]
    for bits, loss in ((1, 1.5), (2, 0.6), (3, 0.3), (4, 0.15), (5, 0.08), (6, 0.04), (8, 0.01)):
        good(folder, f"MLX {bits} bits", quantised(
            mlx, {"group_size": 32, "bits": bits}, loss, every, "quantization", bits=bits),
            **WIDTHS)
    for dtype in ("float16", "bfloat16"):
        good(folder, f"MLX {dtype}", quantised(mlx, {"group_size": 64, "bits": 4}, 0.2, every,
                                               "quantization", group=64, dtype=dtype),
             **{**WIDTHS, "intermediate_size": 128})
    good(folder, "MLX with a head of its own, tied", spoilt(quantised(
        mlx, {"group_size": 32, "bits": 4}, 0.2, every + ["lm_head.weight"], "quantization"),
        lambda c: (c.config.update(tie_word_embeddings=True), setattr(
            c.facts, "tie_word_embeddings", False))), tie_word_embeddings=False, **WIDTHS)
    own = {DOWN: (8, 32), Q: (6, 64)}
    good(folder, "MLX with layers of their own", quantised(
        mlx, {"group_size": 32, "bits": 4, "mode": "affine", "lm_head": False, **{
            m: {"group_size": g, "bits": b} for m, (b, g) in own.items()}},
        0.15, every, "quantization", own=own), **WIDTHS)


def test_bitsandbytes(folder):
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            good(folder, f"{kind}, nested {nested}", quantised(
                bnb4, four, 0.3, kind=kind, nested=nested), **WIDTHS)
    good(folder, "nf4, odd widths", quantised(bnb4, four, 0.25, nested=True), hidden_size=45,
         num_attention_heads=3, num_key_value_heads=1, head_dim=14, intermediate_size=37)
    good(folder, "nf4, long runs, as bf16", quantised(bnb4, {"load_in_4bit": True}, 0.25, run=4096,
                                                      storage="bfloat16"), **WIDTHS)
    good(folder, "int8", quantised(bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True},
                                   0.02))


def test_compressed(folder):
    def one(what, form, loss, dtype="float32", **weights):
        good(folder, f"compressed-tensors {what}", quantised(
            compressed, compressed_settings(form, **weights), loss, form=form, dtype=dtype,
            **weights), **WIDTHS)
    for bits, loss in ((2, 1), (3, 0.5), (4, 0.2), (5, 0.1), (6, 0.05), (7, 0.03), (8, 0.02)):
        one(f"{bits} bits by group", "pack-quantized", loss, num_bits=bits, strategy="group",
            group_size=32)
    one("4 bits by row, bf16", "pack-quantized", 0.3, "bfloat16", num_bits=4, strategy="channel")
    one("int8 by row", "int-quantized", 0.02, num_bits=8, strategy="channel")
    one("int8 in one", "naive-quantized", 0.02, num_bits=8, strategy="tensor")
    one("float8 by row", "float-quantized", 0.05, num_bits=8, type="float", strategy="channel")
    one("float8 in one", "float-quantized", 0.05, "bfloat16", num_bits=8, type="float",
        strategy="tensor")
    test_ordered(folder)
    test_zeros(folder)


def test_zeros(folder):
    """Older symmetric files have zero points of 0, and some a scale of cached keys and values.
    Other zero points, and scales for blocks, are refused."""
    def older(w, module, rng, **weights):
        import torch
        parts, back = compressed(w, module, rng, **weights)
        parts["weight_zero_point"] = torch.zeros(parts["weight_scale"].shape, dtype=torch.int8)
        if "k_proj" in module:
            parts["kv_scale"] = torch.ones(1)
        return parts, back
    weights = dict(num_bits=4, strategy="group", group_size=32)
    form = quantised(older, compressed_settings("pack-quantized", **weights), **weights)
    good(folder, "zero points of 0", form, **WIDTHS)
    bad(folder, "a zero point", spoilt(form, spoil(Q + ".weight_zero_point", 3, 1)), "zero points",
        **WIDTHS)
    for form, weights in (
            ("pack-quantized", dict(num_bits=4, strategy="group", group_size=32, symmetric=False)),
            ("int-quantized", dict(num_bits=8, strategy="channel", symmetric=False))):
        bad(folder, f"{form} uneven", quantised(compressed, compressed_settings(form, **weights),
                                                form=form, **weights), "symmetric", **WIDTHS)
    block = dict(num_bits=8, type="float", strategy="block", block_structure=[16, 32])
    bad(folder, "float8 by block", quantised(compressed, compressed_settings(
        "float-quantized", **block), form="float-quantized", **block), "scales of shape", **WIDTHS)


def test_ordered(folder):
    """Older compressed-tensors files name each column's group, or -1 for no name."""
    settings = compressed_settings("pack-quantized", num_bits=4, strategy="group", group_size=32,
                                   actorder="group")

    def ordered(w, module, rng, named):
        g_idx = rng.permutation(np.arange(w.shape[1]) // 32)
        turn = np.argsort(g_idx, kind="stable") if named else np.arange(w.shape[1])
        parts, back = compressed(w[:, turn], module, rng, num_bits=4, strategy="group",
                                 group_size=32)
        import torch
        words = parts["weight_packed"].numpy().view(np.uint8)
        codes = np.stack((words & 15, words >> 4), 2).reshape(len(w), -1).astype(np.uint32)
        codes[:, turn], back[:, turn] = codes.copy(), back.copy()
        parts["weight_packed"] = torch.tensor(bit_stream(codes, 4))
        parts["weight_g_idx"] = torch.tensor((g_idx if named else 0 * g_idx - 1).astype(np.int32))
        return parts, back
    for named in (True, False):
        good(folder, f"compressed-tensors actorder {named}", quantised(
            ordered, settings, 0.2, named=named), **WIDTHS)


def test_fp8(folder):
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    good(folder, "FP8 by row", quantised(fp8, settings, 0.05), **WIDTHS)
    good(folder, "FP8 in one", quantised(fp8, settings, 0.05, by_row=False), **WIDTHS)
    bad(folder, "FP8 e5m2", quantised(fp8, settings, kind="float8_e5m2"), "F8_E5M2", **WIDTHS)
    bad(folder, "FP8 with its scales elsewhere", quantised(fp8, settings, name="weight_scale_inv"),
        "weight_scale_inv", **WIDTHS)


def test_engine(engine, folder):
    """One quantised checkpoint all the way: the engine gives transformers' logits for the same
    weights, and they are near the original model's."""
    c = Checkpoint(folder, **WIDTHS)
    ids = [2] + [int(i) for i in np.random.default_rng(3).integers(0, 347, 30)]
    original = ref.hf_logits(c.hf, ids)
    quantised(bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 0.02)(c)
    c.write()
    out = os.path.join(folder, "out.bin")
    run = convert(c.path, out, "--type", "f32")
    if check(run.returncode == 0, f"int8 to the engine: {run.stderr}"):
        model = ref.Model(engine, out)
        session = ref.Session(model, n_batch=64)
        logits = session.rows(ids)
        off = abs(logits - ref.hf_logits(c.hf, ids)).max()
        check(off <= 1e-4, f"int8 to the engine: logits off by {off:.2g}")
        far = abs(logits - original).max()
        check(1e-3 < far < 1, f"int8 to the engine: {far:.2g} from the original's logits")
        session.close(), model.close()
        os.remove(out)


# ---- spoilt ones ----------------------------------------------------------------------


def spoilt(edit, change):
    def both(c):
        edit(c)
        change(c)
    return both


def put(name, make):
    """Replaces a tensor by what make(torch, old) returns."""
    def change(c):
        c.tensors[name] = make(c.torch, c.tensors.get(name))
    return change


def state_of(**changes):
    """Edits the JSON beside a bitsandbytes matrix."""
    def change(c):
        doc = {**json.loads(bytes(c.tensors[STATE].tolist())), **changes}
        c.tensors[STATE] = c.torch.tensor(list(json.dumps(doc).encode()), dtype=c.torch.uint8)
    return change


def test_bad_methods(folder):
    """Methods and forms that cannot be read are refused by name."""
    for method in ("hqq", "torchao", "quanto", "aqlm", "exl2", "fbgemm_fp8", "auto-round", ["gptq"],
                   None, 5):
        settings = {"quant_method": method}
        words = [] if method is None else ["quantised", json.dumps(method)]
        if method is not None:
            bad(folder, f"method {method}", lambda c: c.config.update(
                quantization_config=settings), *words)
    bad(folder, "quantization_config no object", lambda c: c.config.update(
        quantization_config=[1]), "quantization_config")
    forms = [("marlin", gptq_settings(checkpoint_format="marlin")),
             ("gptq_v2", gptq_settings(checkpoint_format="gptq_v2")),
             ("gemv_fast", {"quant_method": "awq", "version": "gemv_fast"}),
             ("gemv", {"quant_method": "awq", "version": "gemv"}),
             ("weight_block_size", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
             ("weight_scale_semantics", {"quant_method": "fp8",
                                         "weight_scale_semantics": "inverse"}),
             ("nvfp4-pack-quantized", compressed_settings("nvfp4-pack-quantized")),
             ("marlin-24", compressed_settings("marlin-24"))]
    forms += [(key, {**compressed_settings("pack-quantized"), key: value}) for key, value in (
        ("transform_config", {"config_groups": {"v": {"type": "hadamard"}}}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}))]
    for form, settings in forms:
        bad(folder, f"form {form}", lambda c: c.config.update(quantization_config=settings), form)
    for mode in "mxfp4", "mxfp8", "nvfp4":
        bad(folder, f"form {mode}", lambda c: c.config.update(
            quantization={"mode": mode, "bits": 4, "group_size": 32}), "MLX", mode)
    for part in "q_weight", "q_scale_max", "trellis":  # also without a quantization_config
        bad(folder, f"EXL2's {part}", lambda c: c.tensors.update({
            f"{Q}.{part}": c.tensors.pop(Q + ".weight")}), "EXL2", "safetensors or GGUF")


def test_bad_parts(folder):
    four = quantised(bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    nested = quantised(bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, nested=True)
    eight = quantised(bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    g4 = quantised(gptq, gptq_settings())
    ordered = quantised(gptq, gptq_settings(desc_act=True), order=True)
    a4 = quantised(awq, {"quant_method": "awq", "version": "gemm"})
    m4 = quantised(mlx, {"group_size": 32, "bits": 4}, key="quantization")
    c4 = quantised(compressed, compressed_settings("pack-quantized", num_bits=4),
                   num_bits=4, strategy="group", group_size=32)
    f8 = quantised(fp8, {"quant_method": "fp8"})
    nan = float("nan")
    cases = [
        ("GPTQ without zeros", g4, drop(Q + ".qzeros"), "qzeros"),
        ("GPTQ without scales", g4, drop(Q + ".scales"), "scales"),
        ("GPTQ without codes", g4, drop(Q + ".qweight"), "other parts are missing"),
        ("GPTQ with a bias", g4, put(Q + ".bias", lambda t, _: t.ones(64)), "bias"),
        ("GPTQ group 2 of 2", g4, spoil(Q + ".g_idx", 5, 2), "group 2"),
        ("GPTQ group below", g4, spoil(Q + ".g_idx", 5, -2147483648), "group -2147483648"),
        ("GPTQ short g_idx", g4, put(Q + ".g_idx", lambda t, a: a[1:].clone()), "g_idx"),
        ("GPTQ shapes", g4, put(Q + ".qweight", lambda t, a: a[:-1].clone()), "shape"),
        ("GPTQ scales of no columns", g4, put(Q + ".scales", lambda t, a: a[:, :0].clone()),
         "no matrix"),
        ("GPTQ int64", g4, put(Q + ".qweight", lambda t, a: a.long()), "I64"),
        ("GPTQ desc_act, no g_idx", ordered, drop(Q + ".g_idx"), "g_idx"),
        ("GPTQ desc_act, g_idx of zeros", ordered, put(Q + ".g_idx", lambda t, a: a * 0), "g_idx"),
        ("GPTQ infinity", g4, spoil(Q + ".scales", 3, float("inf")), "NaN"),
        ("GPTQ NaN", g4, spoil(Q + ".scales", 3, nan), "NaN"),
        ("GPTQ and plain", g4, put(Q + ".weight", lambda t, _: t.ones(64, 64)), "twice"),
        ("AWQ shapes", a4, put(Q + ".qzeros", lambda t, a: a[:, 1:].clone()), "qzeros"),
        ("AWQ groups", a4, put(Q + ".scales", lambda t, a: t.ones(3, 64)), "shape [2, 8]"),
        ("MLX without biases", m4, drop(Q + ".biases"), "biases"),
        ("MLX bits", m4, lambda c: c.config["quantization"].update(bits=9), "bits"),
        ("MLX other bits", m4, lambda c: c.config["quantization"].update(bits=8), "8 bits"),
        ("MLX group", m4, lambda c: c.config["quantization"].update(group_size=2 ** 63),
         "group_size"),
        ("MLX layer's mode", m4, lambda c: c.config.update(quantization={
            "group_size": 32, "bits": 4, Q: {"mode": "nvfp5"}}), "nvfp5"),
        ("MLX no settings", m4, lambda c: c.config.pop("quantization"), "quantization_config"),
        ("4 bits, no absmax", four, drop(Q + ".weight.absmax"), "quant"),
        ("4 bits, no map", four, drop(Q + ".weight.quant_map"), "quant_map"),
        ("4 bits, no state", four, drop(STATE), "quant_state"),
        ("4 bits, bad JSON", four, spoil(STATE, 0, 0), "JSON"),
        ("4 bits, huge shape", four, state_of(shape=[2 ** 63, 64]), "shape"),
        ("4 bits, other shape", four, state_of(shape=[64, 65]), "shape"),
        ("4 bits, shape of another", four, state_of(shape=[32, 128]), "shape"),
        ("4 bits, run 0", four, state_of(blocksize=0), "blocksize"),
        ("4 bits, run -1", four, state_of(blocksize=-1), "blocksize"),
        ("4 bits, huge run", four, lambda c: (state_of(blocksize=1 << 30)(c), c.tensors.update(
            {Q + ".weight.absmax": c.torch.full((1,), nan)})), "NaN"),
        ("4 bits, other run", four, state_of(blocksize=32), "scales"),
        ("4 bits, short map", four, put(Q + ".weight.quant_map", lambda t, a: a[1:].clone()),
         "quant_map"),
        ("4 bits, NaN", four, spoil(Q + ".weight.absmax", 1, nan), "NaN"),
        ("nested, no scales", nested, drop(Q + ".weight.nested_absmax"), "nested_absmax"),
        ("nested, offset", nested, state_of(nested_offset="x"), "nested_offset"),
        ("nested, run", nested, state_of(nested_blocksize=8), "runs"),
        ("nested, map", nested, put(Q + ".weight.nested_quant_map", lambda t, a: a[1:].clone()),
         "nested_quant_map"),
        ("int8 without scales", eight, drop(Q + ".SCB"), "I8"),
        ("int8 for a GPU", eight, put(Q + ".weight_format", lambda t, a: a + 2), "weight_format"),
        ("int8 scales", eight, put(Q + ".SCB", lambda t, a: a[1:].clone()), "SCB"),
        ("packed, no shape", c4, drop(Q + ".weight_shape"), "weight_shape"),
        ("packed, huge shape", c4, put(Q + ".weight_shape", lambda t, a: t.tensor(
            [64, 2 ** 62])), "shape"),
        ("packed, negative shape", c4, put(Q + ".weight_shape", lambda t, a: t.tensor(
            [-1, -1])), "shape"),
        ("packed, other bits", c4, lambda c: c.config["quantization_config"].update(
            compressed_settings("pack-quantized", num_bits=3)), "3 bits"),
        ("packed, no bits", c4, lambda c: c.config["quantization_config"].pop("config_groups"),
         "unknown"),
        ("packed, bits no number", c4, lambda c: c.config["quantization_config"].update(
            compressed_settings("pack-quantized", num_bits=[4])), "bits"),
        ("packed, no scale", c4, drop(Q + ".weight_scale"), "other parts are missing"),
        ("packed and plain", c4, put(Q + ".weight", lambda t, _: t.ones(64, 64)), "plain"),
        ("FP8 scales", f8, put(Q + ".weight_scale", lambda t, a: t.ones(3, 7)), "scales"),
        ("FP8 without scales", f8, drop(Q + ".weight_scale"), "F8_E4M3"),
        ("FP8 empty scales", f8, put(Q + ".weight_scale", lambda t, a: t.ones(0, 0)), "scales"),
        ("FP8 infinite scales", f8, spoil(Q + ".weight_scale", 2, float("inf")), "NaN"),
        ("FP8 codes not finite", f8, put(Q + ".weight", lambda t, a: (a.float() * 0 + nan).to(
            t.float8_e4m3fn)), "NaN"),
    ]
    for what, edit, change, *words in cases:
        bad(folder, what, spoilt(edit, change), *words, **WIDTHS)


# ---- anything at all in settings and headers ------------------------------------------

JUNK = [None, True, False, 0, -1, 1, 3, 64, 2 ** 31, 2 ** 63, -2 ** 63, 0.5, 1e308, "", "4", "gptq",
        [], [0, 0], [1, 2 ** 49], [-1, 5], {}, {"weights": 1}, {"g": {"weights": {"num_bits": 4}}}]


def leaves(doc):
    """(container, key) of everything in a JSON value."""
    for key in list(doc) if isinstance(doc, dict) else range(len(doc)):
        yield doc, key
        if isinstance(doc[key], (dict, list)):
            yield from leaves(doc[key])


def shuffle_header(path, rng):
    """Gives a tensor another type of the same width, another shape of the same size, or the
    name of another tensor."""
    with open(path, "rb") as f:
        data = f.read()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    name, other = (list(header)[i] for i in rng.integers(0, len(header), 2))
    entry, kind = header[name], rng.integers(0, 4)
    size, start, stop = math.prod(entry["shape"]), *entry["data_offsets"]
    if kind == 0:
        same = [t for t in export.WIDTHS if export.WIDTHS[t] * size == stop - start]
        entry["dtype"] = str(rng.choice(same))
    elif kind == 1:
        entry["shape"] = [[size], [size, 1], [1, size], entry["shape"][::-1], [1, 1, size]][
            rng.integers(0, 5)]
    elif kind == 2:
        header[name], header[other] = header[other], header[name]
    else:
        header[name + "." + other.rsplit(".", 1)[1]] = header.pop(name)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data[8 + n:])


def one_of_each():
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    group = dict(num_bits=4, strategy="group", group_size=32)
    whole = dict(num_bits=8, type="float", strategy="tensor")
    row = dict(num_bits=8, strategy="channel")
    return [quantised(gptq, gptq_settings(), order=True),
            quantised(awq, {"quant_method": "awq"}),
            quantised(mlx, {"group_size": 32, "bits": 4}, key="quantization"),
            quantised(bnb4, four), quantised(bnb4, four, nested=True),
            quantised(bnb8, {"quant_method": "bitsandbytes"}),
            *(quantised(compressed, compressed_settings(form, **w), form=form, **w) for form, w in (
                ("pack-quantized", group), ("float-quantized", whole), ("int-quantized", row))),
            quantised(fp8, {"quant_method": "fp8"})]


def test_ranges(folder):
    """Any range of rows equals the same rows of the whole tensor, in another process too."""
    rng = np.random.default_rng(SEED)
    for number, edit in enumerate(one_of_each()):
        c = Checkpoint(folder, **WIDTHS)
        edit(c)
        c.write()
        with contextlib.redirect_stderr(io.StringIO()):
            reader = export.open_checkpoint(c.path)
        for name, tensor in reader.tensors.items():
            whole, copy = tensor.rows(0, tensor.shape[0]), pickle.loads(pickle.dumps(tensor))
            for start, stop in np.sort(rng.integers(0, tensor.shape[0], (6, 2))):
                part = copy.rows(int(start), int(stop) + 1)
                check(np.array_equal(part, whole[start:stop + 1]) and part.dtype == np.float32,
                      f"rows {start} to {stop} of {name}, format {number}")
        convert(c.path, os.devnull)  # closes the files


def test_junk(folder, times=20):
    rng, ends = np.random.default_rng(SEED), {0: 0, 1: 0}
    for number, edit in enumerate(one_of_each()):
        c = Checkpoint(folder, **WIDTHS)
        edit(c)
        key = "quantization" if "quantization" in c.config else "quantization_config"
        settings = json.dumps(c.config[key])
        c.write()
        shutil.copy(c.file("model.safetensors"), c.file("kept"))
        for turn in range(times):
            c.config[key] = json.loads(settings)
            shutil.copy(c.file("kept"), c.file("model.safetensors"))
            if turn % 3:
                shuffle_header(c.file("model.safetensors"), rng)
            else:
                places = list(leaves(c.config[key]))
                place, at = places[rng.integers(0, len(places))]
                place[at] = JUNK[rng.integers(0, len(JUNK))]
            with open(c.file("config.json"), "w") as f:
                json.dump(c.config, f)
            ends[fails_well(folder, c, f"junk {number}.{turn}")] += 1
    check(min(ends.values()) > 5, f"junk: {ends} ended well and badly")


def fails_well(folder, c, what):
    """Whether a conversion fails.  A failure must give one sentence and leave no output."""
    out = os.path.join(folder, "out.bin")
    run = convert(c.path, out, "--type", "bf16")
    lines = [line for line in run.stderr.strip().split("\n") if "warning" not in line]
    check(run.returncode in (0, 1) and "Traceback" not in run.stderr,
          f"{what}: exit {run.returncode}: {run.stderr[-400:]}")
    check(run.returncode == 0 or len(lines) == 1 and len(lines[0]) < 600,
          f"{what}: says {run.stderr[:900]!r}")
    check(os.path.exists(out) == (run.returncode == 0), f"{what}: the output")
    if os.path.exists(out):
        os.remove(out)
    return int(run.returncode != 0)


# ---- hub names ------------------------------------------------------------------------


def fake_cache(folder, name, source, commit="0123456789abcdef0123456789abcdef01234567"):
    """HF_HOME with one model in it, as huggingface_hub lays it out."""
    home = os.path.join(folder, "home")
    shutil.rmtree(home, ignore_errors=True)
    place = os.path.join(home, "hub", "models--" + name.replace("/", "--"))
    os.makedirs(os.path.join(place, "refs"))
    for ref_name in ("main", "v1"):
        with open(os.path.join(place, "refs", ref_name), "w") as f:
            f.write(commit)
    shutil.copytree(source, os.path.join(place, "snapshots", commit))
    return home


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as a download asks for: listing, facts of files, files."""
    source, fetched, commit = "", [], "89abcdef0123456789abcdef0123456789abcdef"
    refusals = {  # all may list a gated model
        "/org/gated": (401, "GatedRepo"), "/api/models/org/closed": (403, "GatedRepo"),
        "/api/models/org/missing": (404, "RepoNotFound"),
        "/api/models/org/hidden": (401, "RepoNotFound"), "/api/models/org/broken": (400, "Oops")}

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        for start, (status, code) in self.refusals.items():
            if path.startswith(start):
                return self.answer(status, X_Error_Code=code, X_Error_Message=code)
        if "/nowhere" in path:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if path.startswith("/api/"):
            return self.answer(200, json.dumps(self.listing(path)).encode(),
                               Content_Type="application/json")
        with open(os.path.join(self.source, os.path.basename(path)), "rb") as f:
            body = f.read()
        if self.command == "GET":
            self.fetched.append(os.path.basename(path))
        self.answer(200, body, ETag='"%s"' % os.path.basename(path), X_Repo_Commit=self.commit)

    do_HEAD = do_GET

    def listing(self, path):
        names = sorted(os.listdir(self.source)) + ["original/model.safetensors"]
        files = [{"type": "file", "path": n, "rfilename": n, "size": 1, "oid": "0" * 40}
                 for n in names]
        return files if "/tree/" in path else {"id": "org/model", "sha": self.commit,
                                               "siblings": files}

    do_POST = do_GET


def from_hub(name, folder, home, options=("--type", "f32"), **env):
    """export.py with a hub name, in an environment of its own."""
    env = {**os.environ, "HF_HOME": home, "NO_PROXY": "127.0.0.1", **env}
    return apart(name, os.path.join(folder, "out.bin"), *options, env=env)


def hub_refuses(folder, name, *words, home="empty", **env):
    run = from_hub(name, folder, os.path.join(folder, home), **env)
    check(run.returncode == 1, f"hub {name}: exit {run.returncode}")
    text = run.stderr.strip().split("\n")[-1]
    check("Traceback" not in run.stderr and all(w in text for w in (name.split("@")[0], *words)),
          f"hub {name}: {words} not in {run.stderr[-600:]!r}")
    check(not os.path.exists(os.path.join(folder, "out.bin")), f"hub {name}: leaves a file")


def hub_serves(folder, c, what, name, home, **env):
    out = os.path.join(folder, "out.bin")
    run = from_hub(name, folder, home, **env)
    if check(run.returncode == 0, f"hub {what}: {run.stderr[-600:]}"):
        f = check_exact(c, out, f"hub {what}")
        check(f.facts()["name"] == name.split("@")[0], f"hub {what}: name {f.facts()['name']}")
        os.remove(out)


def test_hub(folder):
    c = Checkpoint(folder).write(shards=3)
    home = fake_cache(folder, "org/model", c.path)
    for name in ("org/model", "org/model@v1", "org/model@0123456789abcdef0123456789abcdef01234567"):
        hub_serves(folder, c, f"cache {name}", name, home, HF_HUB_OFFLINE="1")
    hub_refuses(folder, "org/other", "cache", "HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")
    hub_refuses(folder, "org/model@v2", "cache", home="home", HF_HUB_OFFLINE="1")
    hub_refuses(folder, "./org/model", "does not exist")
    hub_refuses(folder, "org/model/more", "does not exist")
    nowhere = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    hub_refuses(folder, "org/other", "does not give it", **nowhere)
    hub_serves(folder, c, "cache without network", "org/model", home, **nowhere)
    test_hub_missing_library(folder, c, home)
    test_hub_beside(folder, c, home)
    test_hub_gguf(folder)
    test_hub_download(folder, c)


def test_hub_missing_library(folder, c, home):
    stub = os.path.join(folder, "stub")
    os.makedirs(stub, exist_ok=True)
    with open(os.path.join(stub, "huggingface_hub.py"), "w") as f:
        f.write("raise ImportError('stub')\n")
    hub_refuses(folder, "org/model", "no path here", "pip install huggingface_hub", home="home",
                PYTHONPATH=stub)


def test_hub_beside(folder, c, home):
    """A tokenizer or an adapter gives the same by its hub name as by its directory."""
    out = os.path.join(folder, "out.bin")
    for options in (["--tokenizer-only"], ["--tokenizer", "org/model"]):
        made = []
        for name in ("org/model", c.path):
            run = from_hub(name, folder, home, [*options, "--name", "x", "--source", "x"],
                           HF_HUB_OFFLINE="1")
            check(run.returncode == 0, f"hub {options}: {run.stderr}")
            made.append(sections_of(out))
        check(made[0] == made[1], f"hub {options}: not what its directory gives")
    adapter = oracle_lora.Adapter(folder)
    home = fake_cache(folder, "org/adapter", adapter.path)
    made = []
    for name in ("org/adapter", adapter.path):
        run = from_hub(adapter.base, folder, home, ["--lora", name + "=0.5"], HF_HUB_OFFLINE="1")
        check(run.returncode == 0, f"hub adapter: {run.stderr}")
        made.append(sections_of(out))
    check(made[0] == made[1], "hub adapter: not what its directory gives")
    os.remove(out)
    for name, options in (("org/none", ["--tokenizer-only"]), (c.path, ["--lora", "org/none"])):
        run = from_hub(name, folder, home, options, HF_HUB_OFFLINE="1")
        check(run.returncode == 1 and "org/none" in run.stderr and "cache" in run.stderr,
              f"hub: {run.stderr}")


def sections_of(path):
    f = ref.Bin(path)
    return {key: f.bytes(*key) for key in f.sections if key != ("facts", 0)}


def test_hub_gguf(folder):
    """export.py reads a repository's only GGUF file."""
    source = os.path.join(folder, "source")
    os.makedirs(source)
    with open(os.path.join(source, "small.gguf"), "w") as f:
        f.write("GGUF, but no more")
    run = from_hub("org/gguf", folder, fake_cache(folder, "org/gguf", source), HF_HUB_OFFLINE="1")
    check(run.returncode == 1 and "small.gguf" in run.stderr and "Traceback" not in run.stderr,
          f"hub GGUF: {run.stderr[-300:]!r}")


def test_hub_download(folder, c):
    """A local server serves: only files that are needed are fetched, refusals become sentences."""
    for extra in ("pytorch_model.bin", "model.gguf", "README.md", "tokenizer.spm"):
        with open(c.file(extra), "w") as f:
            f.write("not to be fetched")
    Hub.source, Hub.fetched = c.path, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = dict(HF_ENDPOINT="http://127.0.0.1:%d" % server.server_port, HF_HUB_OFFLINE="0",
                HF_HUB_DISABLE_XET="1")
    try:
        hub_serves(folder, c, "download", "org/model", os.path.join(folder, "fetched"), **here)
        want = {n for n in os.listdir(c.path) if n.endswith(
            (".safetensors", ".json", ".model", ".spm"))}
        check(set(Hub.fetched) == want and len(Hub.fetched) == len(want),
              f"hub download: fetched {sorted(Hub.fetched)}, not {sorted(want)}")
        hub_serves(folder, c, "download, then offline", "org/model",
                   os.path.join(folder, "fetched"), HF_HUB_OFFLINE="1")
        for name in ("org/gated", "org/closed"):
            hub_refuses(folder, name, "licence", "hf auth login", **here)
        hub_refuses(folder, "org/missing", "spelling", **here)
        hub_refuses(folder, "org/hidden", "hf auth login", **here)
        hub_refuses(folder, "org/broken", "does not give it", "BadRequest", **here)
        hub_refuses(folder, "org/model@nowhere", "RevisionNotFound", **here)
        for n in os.listdir(c.path):
            if n.endswith(".safetensors"):
                os.remove(c.file(n))
        shutil.copy(c.file("model.gguf"), c.file("other.gguf"))
        hub_refuses(folder, "org/files", "2 GGUF files", **here)
    finally:
        server.shutdown()


# ---- derivatives ----------------------------------------------------------------------


def test_derivatives(folder):
    for layers in ("L", "LGL", "LGLGLGLG"):
        good(folder, f"{len(layers)} layers", layers=layers)
    good(folder, "the bare model", bare_model)
    good(folder, "the bare model's class", lambda c: c.config.update(architectures=["Gemma2Model"]))
    good(folder, "prefix-less, untied", lambda c: setattr(c, "tensors", {
        k.replace("model.", "", 1): v for k, v in c.tensors.items()}), tie_word_embeddings=False)
    bad(folder, "a classifier of tokens", lambda c: c.config.update(
        architectures=["Gemma2ForTokenClassification"]), "TokenClassification", "no text")
    bad(folder, "2,000 scores", lambda c: c.tensors.update({"score.weight": c.torch.ones(
        2000, 42)}), "2000 scores")
    for head in ("classifier", "v_head"):
        bad(folder, head, lambda c: c.tensors.update({head + ".weight": c.torch.ones(2, 42)}), head,
            "writes no text")
    bad(folder, "a PaliGemma's names", lambda c: setattr(c, "tensors", {
        "language_model." + k: v for k, v in c.tensors.items()}), "PaliGemma")
    bad(folder, "newer PaliGemma names", lambda c: setattr(c, "tensors", {
        k.replace("model.", "model.language_model."): v for k, v in c.tensors.items()}),
        "PaliGemma")
    for kind in ("gemma", "gemma3_text", "paligemma", "t5gemma2", "vaultgemma", "recurrent_gemma",
                 "shieldgemma2", "embedding_gemma2", "qwen2", 2):
        bad(folder, f"a {kind}", lambda c: c.config.update(model_type=kind), json.dumps(kind),
            "only Gemma 2")
    test_flags(folder)
    test_eos_token(folder)
    test_tokenizer_json(folder)
    test_one_shard(folder)


def test_one_shard(folder):
    """The path of any shard stands for the checkpoint."""
    c, out = Checkpoint(folder).write(shards=3), os.path.join(folder, "out.bin")
    for index in "there", "missing":
        run = convert(c.file("model-00002-of-00003.safetensors"), out, "--type", "f32")
        if check(run.returncode == 0, f"a shard, index {index}: {run.stderr}"):
            check_exact(c, out, f"a shard, index {index}")
            os.remove(out)
        if index == "there":
            os.remove(c.file("model.safetensors.index.json"))


def bare_model(c):
    """Saved from Gemma2Model by transformers itself."""
    c.hf.model.save_pretrained(c.path)
    with open(c.file("config.json")) as f:
        c.config = json.load(f)
    from safetensors.torch import load_file
    c.tensors = load_file(c.file("model.safetensors"))
    check(not any(n.startswith("model.") for n in c.tensors), "the bare model has a prefix")


def test_flags(folder):
    """A warning names added tokens whose flags SentencePiece's matching does not have."""
    def flagged(**flags):
        def edit(c):
            write_tokenizer_config(c, added_tokens_decoder={
                "347": {"content": "<tool>", "special": True, **flags}})
        return edit
    for flags in (dict(lstrip=True), dict(rstrip=True), dict(single_word=True), dict(lstrip=False)):
        f, run = good(folder, f"added token {flags}", flagged(**flags), vocab_size=348)
        if f:
            check(f.vocabulary()[1][347][0] == b"<tool>", f"added token {flags}: not there")
            named = "<tool>" in run.stderr and [*flags][0] in run.stderr
            check(named == any(flags.values()), f"added token {flags}: says {run.stderr!r}")


def test_eos_token(folder):
    """A fine-tune's eos_token ends a text even if config.json does not name it."""
    def named(eos, added):
        def edit(c):
            write_tokenizer_config(c, eos_token=eos, added_tokens_decoder={
                "347": {"content": added, "special": True}})
        return edit
    for eos, stop in (("<|im_end|>", [1, 347, 5]), ({"content": "<|im_end|>"}, [1, 347, 5]),
                      ("<eos>", [1, 5]), ("<end_of_turn>", [1, 5]), ("</s>", [1, 5]),
                      ("<nowhere>", [1, 5]), (None, [1, 5]), (7, [1, 5])):
        good(folder, f"eos_token {eos}", named(eos, "</s>" if eos == "</s>" else "<|im_end|>"),
             vocab_size=348, expect=dict(stop=stop))


def test_tokenizer_json(folder):
    """transformers' tokenizer.json, with a fine-tune's tokens added, gives the vocabulary of
    tokenizer.model.  Damaged files and files of another kind are refused."""
    want = ref.model_pieces(os.path.join(ref.GOLDEN, "tiny.model"))
    f, run = good(folder, "tokenizer.json", as_tokenizer_json, vocab_size=349,
                  expect=dict(stop=[1, 347, 5]))
    if f:
        pieces = f.vocabulary()[1]
        check(not run.stderr, f"tokenizer.json: says {run.stderr!r}")
        check([(t, k) for t, _, k in pieces[347:]] == [
            (b"<|im_end|>", ref.MARKER), ("<my\u2581tool>".encode(), ref.USER)],
            f"tokenizer.json: added {pieces[347:]}")
        same = [(t, ref.USER if k == ref.MARKER else k) for t, _, k in pieces[:347]]
        check(same == [(t, k) for t, _, k in want], "tokenizer.json: pieces")

    def damaged(what, change, *words):
        def edit(c):
            as_tokenizer_json(c)
            with open(c.file("tokenizer.json")) as f:
                doc = json.load(f)
            change(doc)
            with open(c.file("tokenizer.json"), "w") as f:
                json.dump(doc, f)
        bad(folder, what, edit, *words, vocab_size=349)
    for merge in ([["a", 3]], [[{}, "a"]], ["a"], [7], [["a", "b", "c"]]):
        damaged(f"merges {merge}", lambda doc: doc["model"].update(merges=merge), "makes no piece")
    damaged("unigram", lambda doc: doc["model"].update(type="Unigram"), "no BPE")
    damaged("a normaliser", lambda doc: doc.update(normalizer={"type": "NFKC"}), "normaliser")
    damaged("an id twice", lambda doc: doc["model"]["vocab"].update(a=9, b=9), "shared")
    damaged("a huge id", lambda doc: doc["added_tokens"][-1].update(id=1 << 40), "too large")
    for edit in (as_tokenizer_json, lambda c: write_tokenizer_config(
            c, eos_token="<tool>", added_tokens_decoder={"347": {"content": "<tool>"}})):
        f, run = good(folder, "a token without a row", edit, expect=dict(V=347, stop=[1, 5]))
        check("tool>" in run.stderr and "left out" in run.stderr, f"no row: {run.stderr!r}")
        check(f and len(f.vocabulary()[1]) == 347, "a token without a row: pieces")
    for i in ("\u00b2", "9" * 5000, "-1", "x"):
        good(folder, f"the id {i[:9]}", lambda c: write_tokenizer_config(c, added_tokens_decoder={
            i: {"content": "<x>"}}))


def write_tokenizer_config(c, **settings):
    with open(c.file("tokenizer_config.json"), "w") as f:
        json.dump(settings, f)


def as_tokenizer_json(c):
    """The vocabulary as transformers saves it, with two more tokens."""
    from transformers import AutoTokenizer
    write_tokenizer_config(c, tokenizer_class="GemmaTokenizer")
    tokenizer = AutoTokenizer.from_pretrained(c.path)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<my tool>"])
    tokenizer.save_pretrained(c.path)
    os.remove(c.file("tokenizer.model"))


def test_packed(engine, folder):
    for test in (test_gptq, test_awq, test_mlx, test_bitsandbytes, test_compressed, test_fp8,
                 test_ranges, test_bad_methods, test_bad_parts, test_junk, test_hub,
                 test_derivatives):
        test(folder)
    test_engine(engine, folder)
