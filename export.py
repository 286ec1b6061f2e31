#!/usr/bin/env python3
"""Convert a Gemma 2 checkpoint into the one file that gemma2.c runs.

What the file looks like, byte for byte, is written at the top of gemma2.c (sections 2
and 3).  This script follows it and says here only how the numbers are chosen.

  1. Ground         command line, errors, warnings, signals, JSON
  2. Number formats f32 and bf16 tiles; q8, q6, q4, q3: search for scales, then packing
  3. The model      facts, roles of tensors and their shapes
  4. Checkpoints    the way of a weight on one page; safetensors and PyTorch, plain and quantised;
                    GGUF; gemma.cpp's .sbs; Keras and Flax; names on Hugging Face's hub; LoRA
                    adapters
  5. Tokenizers     tokenizer.model, tokenizer.json, tokenizer.bin; chat templates
  6. The file       sections, header, directory; written under a temporary name
  7. Conversion     which tensor gets which type; worker processes; the report
  8. Main

Notation, as in gemma2.c: D model width, N query heads, K key/value heads, H head_dim,
F feed-forward width, V vocabulary, L layers; w a weight, S its row's scale, s its
group's scale, v its value: w is stored as S * (s * v).
"""
import argparse
import collections
import contextlib
import copy
import errno
import fnmatch
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent import futures

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while libraries load: no traceback
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # processes share the work, not threads
VERSION = "0.1.0"

# =====================================================================================
# 1. Ground: the command line, which needs no numpy; errors, warnings, signals, JSON
# =====================================================================================

# As called: an installed copy is gemma2-export
NAME = os.path.basename(sys.argv[0]) if __name__ in ("__main__", "__mp_main__") else "export.py"
TYPE_NAMES = "f32", "bf16", "q8", "q6", "q4", "q3"

EPILOG = """
Checkpoints, with the package that each needs beside numpy:
  Hugging Face directory   *.safetensors; also quantised by MLX, GPTQ, AWQ, bitsandbytes,
                           compressed-tensors or to FP8
  GGUF                     the file, or the first of several                    gguf
  gemma.cpp                the .sbs file
  PyTorch                  .ckpt, .bin, .pth, .pt, or their directory
  Keras                    preset directory, .weights.h5                        h5py
  Flax, Orbax              the directory                                  tensorstore
  org/name[@revision]      from huggingface.co, or its cache when offline       huggingface_hub

Types, with bits a weight and typical loss:
  f32   32     exact          q8    8.25   none that can be noticed (the default)
  bf16  16     as released    q6    6.25   barely any
                              q4    4.25   little; embedding, head and v stay q6
                              q3    3.25   more; embedding, head and v stay q6

Names for --tensor: embedding, head, layers.N.q, .k, .v, .o, .gate, .up, .down, with * ? [].
The last --tensor that matches counts, before --head, before --type.  Norms are always f32.

A size instead: --size 11G, or --bits 3.6, measures what each matrix loses as q3, q4, q6 and q8,
gives each the type that loses least for its bytes, and prints them before the weights are
written.  --tensor and --head still say what a matrix must be.

The output head: Gemma 2 ties it to the embedding, one tensor serving both, and --head TYPE
is that tensor's type.  Where a checkpoint has a head of its own, --head is the type of that.
--tensor head=TYPE gives a tied model a second copy as its head, for instance a cheaper one
that makes decoding faster while the embedding stays precise.

A smaller head: with --keep-vocab FILE a reply can use only the pieces whose ids are in FILE, so the
rest of the head is not read for every token.  Prompts still use all pieces, and the logits of the
kept ones are the same.  Bytes, turns and other special pieces always stay: any text can be written,
if with more tokens.  The 64,000 pieces that are most frequent in a text of your kind:
  run tokenizer.bin --tokenize -f text.txt | tr ' ' '\n' | sort | uniq -c | sort -rn |
    head -n 64000 | awk '{print $2}' >ids.txt

LoRA adapters, also rsLoRA and DoRA, are added in f32 while the weights are converted.  Where an
adapter trained the embedding or the head alone, the two part and the file is larger.  The
tokenizer and chat template in an adapter's directory count before the checkpoint's.

Chat templates: the file keeps the texts that the checkpoint's template writes around messages.
Finding them takes the package jinja2 >= 3.1.6, but for Gemma's own template.

Examples:
  %(prog)s gemma-2-2b-it gemma-2-2b-it.bin
  %(prog)s google/gemma-2-2b-it gemma-2-2b-it.bin
  %(prog)s gemma-2-9b-it 9b-q4.bin --type q4
  %(prog)s gemma-2-9b-it 9b-q4.bin --type q4 --tensor 'layers.*.down=q6' --head q8
  %(prog)s gemma-2-2b-it 2b.bin --tensor head=q4
  %(prog)s gemma-2-2b 2b-mine.bin --lora my-adapter --lora style=0.5
  run 2b-q8.bin --importance 2b.imp --importance-block 256 -f some_text.txt
  %(prog)s gemma-2-2b-it 2b-q4.bin --type q4 --importance 2b.imp
  run 2b-q8.bin --tokenize -f some_text.txt > some.ids
  %(prog)s gemma-2-2b-it 2b-q4.bin --type q4 --importance 2b.imp --fisher some.ids
  %(prog)s gemma-2-27b-it 27b.bin --size 12G --importance 27b.imp
  %(prog)s gemma-2-2b-it 2b-q4.bin --type q4 --keep-vocab ids.txt
  %(prog)s --tokenizer-only gemma-2-2b-it/tokenizer.model tokenizer.bin

Exit codes: 0 done, 1 failed (no output is left behind), 2 wrong usage, 130 interrupted.
"""


def tensor_option(text):
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern or type_name not in TYPE_NAMES:
        raise argparse.ArgumentTypeError("%r is not PATTERN=TYPE with a type of %s"
                                         % (text, ", ".join(TYPE_NAMES)))
    return pattern, type_name


def lora_option(text):
    """DIR or DIR=SCALE to (DIR, scale)."""
    path, equals, scale = text.rpartition("=")
    if not equals or os.path.exists(text):
        return text, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise argparse.ArgumentTypeError("%r is not DIR=SCALE with a number for SCALE" % text)
    return path, number


def bytes_of(text):
    """Of "11G", "900M", "1.5GB" or a plain number; units are powers of 1000, as for files."""
    number, unit = re.fullmatch(r"([\d.]+)(\D?)", text.rstrip("B")).groups()
    return int(float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit])


def option(pattern, read, fits, what):
    """argparse's type for texts of a pattern that are read as values that fit."""
    def option_of(text):
        if not re.fullmatch(pattern, text) or not fits(read(text)):
            raise argparse.ArgumentTypeError("%r is not %s" % (text, what))
        return read(text)
    return option_of


def parse_options(arguments):
    p = argparse.ArgumentParser(
        prog=NAME, description="Convert a Gemma 2 checkpoint, in any form in which one was "
        "released, into one file that gemma2.c runs.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("input", metavar="CHECKPOINT",
                   help="directory or file of the checkpoint, or its name on huggingface.co: "
                   "org/name or org/name@revision")
    p.add_argument("output", metavar="OUT.bin",
                   help="file to write; an older one is replaced once all is well")
    p.add_argument("--type", choices=TYPE_NAMES, help="type of the matrices (default: q8)")
    p.add_argument("--size", metavar="BYTES", type=option(
        r"\d+(\.\d+)?[kMG]?B?", bytes_of, lambda n: 1 <= n < 1 << 62, "a size such as 11G or 900M"),
                   help="instead of --type: q3, q4, q6 or q8 for each matrix, so that the file has "
                   "at most that size (900M, 11G; powers of 1000) and loses least by it; best "
                   "with --importance")
    p.add_argument("--bits", metavar="N", help="the same for at most N bits a weight, such as 3.6",
                   type=option(r"\d+(\.\d+)?", float, lambda n: 1 <= n <= 32,
                               "a number of bits from 1 to 32"))
    p.add_argument("--head", choices=TYPE_NAMES, metavar="TYPE",
                   help="type of the output head, see below")
    p.add_argument("--tensor", type=tensor_option, action="append", default=[],
                   metavar="PATTERN=TYPE",
                   help="type of the matrices whose names match; may be repeated")
    p.add_argument("--lora", type=lora_option, action="append", default=[], metavar="DIR[=SCALE]",
                   help="add a LoRA adapter (PEFT's adapter_config.json and adapter_model.*), "
                   "or its name on huggingface.co, SCALE times as strongly as it was trained "
                   "(default: 1); may be repeated")
    p.add_argument("--importance", metavar="FILE",
                   help="what `run MODEL --importance FILE -f TEXT` wrote, MODEL being the same "
                   "checkpoint as bf16 or q8: quantised matrices then lose least in what they "
                   "multiply, and errors are weighted so")
    p.add_argument("--fisher", metavar="IDS",
                   help="with --importance in blocks: what `run MODEL --tokenize -f TEXT` printed, "
                   "some 17,000 tokens; errors that the next token's probabilities feel least are "
                   "preferred (needs torch, and for 2B about an hour)")
    p.add_argument("--keep-vocab", metavar="FILE",
                   help="only the pieces whose ids are in FILE can be written, which makes replies "
                   "faster, see below")
    p.add_argument("--tokenizer", metavar="FILE",
                   help="tokenizer.model, tokenizer.json, a file made by %(prog)s, a "
                   "directory, or a name on huggingface.co (default: the checkpoint's)")
    p.add_argument("--tokenizer-only", action="store_true",
                   help="CHECKPOINT is such a FILE; write only its tokenizer")
    p.add_argument("--name", help="name to note in the file (default: the directory's)")
    p.add_argument("--source", help="origin to note in the file")
    p.add_argument("--license", metavar="TEXT", help="licence to note in the file (default: the "
                   "Gemma terms for models with Gemma's vocabulary)")
    p.add_argument("--align", metavar="N", help="start sections at multiples of N bytes "
                   "(default: 4096; 64 for less than 1 MiB of weights)", type=option(
                       r"\d{1,9}", int, lambda n: 64 <= n <= 1 << 21 and not n & n - 1,
                       "a power of two from 64 to 2097152"))
    p.add_argument("-j", "--jobs", default=min(os.cpu_count() or 1, 64), metavar="N",
                   help="worker processes (default: one a processor)", type=option(
                       r"\d{1,9}", int, lambda n: 1 <= n <= 1024, "a number from 1 to 1024"))
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no report")
    p.add_argument("--version", action="version", version="%(prog)s " + VERSION)
    options = p.parse_args(arguments)
    if sum(o is not None for o in (options.type, options.size, options.bits)) > 1:
        p.error("--type, --size and --bits each say what types matrices get: give one of them")
    options.fits = options.size or options.bits
    weights = (options.fits, options.tokenizer, options.head, options.tensor, options.lora,
               options.importance, options.fisher, options.keep_vocab)
    if options.tokenizer_only and any(weights):
        p.error("--tokenizer-only writes no weights: --size, --bits, --tokenizer, --head, "
                "--tensor, --lora, --importance, --fisher and --keep-vocab do not go with it")
    if options.fisher and not options.importance:
        p.error("--fisher goes with --importance FILE, made with --importance-block 256 or so")
    options.type = options.type or "q8"
    return options


try:
    import numpy as np
except ImportError:
    if __name__ == "__main__":
        parse_options(sys.argv[1:])
    sys.exit(NAME + " needs numpy: python3 -m pip install numpy")


class ExportError(Exception):
    """One sentence that says what is wrong and what to do."""


class UsageError(ExportError):
    """The same, about the command line."""


class Stopped(BaseException):
    """A signal asked the program to end."""
    held, pending = False, None  # whether to wait with it, and its number meanwhile


class Progress:
    """A bar on standard error when that is a terminal."""
    current = None

    def __init__(self, wanted):
        self.wanted = wanted and sys.stderr.isatty()
        self.shown = -1
        Progress.current = self
        self.start(1)
        self.add(0)

    def start(self, total):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def add(self, n):
        self.done += n
        percent = self.done * 100 // self.total
        if self.wanted and percent != self.shown:
            self.shown = percent
            left = (time.monotonic() - self.began) * (100 / percent - 1) if percent else 0
            left = ", %.0f min left" % (left / 60) if left > 45 else ""
            print("\r[%-50s] %3d %%%s\x1b[K" % ("#" * (percent // 2), percent, left), end="",
                  file=sys.stderr, flush=True)

    def clear(self):
        """Makes room for a line of text; what comes next draws the bar again."""
        if self.wanted:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = -1

    def close(self):
        self.clear()
        Progress.current = None


def complain(text):
    """One line, without control sequences, whatever the names in a file hold."""
    if Progress.current:
        Progress.current.clear()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    print("%s: %s" % (NAME, text if len(text) < 1000 else text[:800] + " ... " + text[-150:]),
          file=sys.stderr)


def warn(text):
    complain("warning: " + text)


SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def ignore_signals():
    for n in SIGNALS:
        signal.signal(n, signal.SIG_IGN)


def stop_on_signals():
    """Lets a signal unwind the stack once, so that clean-up runs."""
    def handler(number, _frame):
        ignore_signals()
        if not Stopped.held:
            raise Stopped(number)
        Stopped.pending = number

    for n in SIGNALS:
        if signal.getsignal(n) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(n, handler)


@contextlib.contextmanager
def undisturbed():
    """A signal waits for the end: callbacks of a fork would swallow the exception."""
    Stopped.held = True
    try:
        yield
    finally:
        Stopped.held, number, Stopped.pending = False, Stopped.pending, None
    if number:
        raise Stopped(number)


def unique_keys(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def parse_json(data, path):
    """Bytes to a JSON object whose keys are unique."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as e:  # bad UTF-8 and bad JSON are ValueErrors
        pull = " (git lfs pull: it is a pointer)" if data[:19] == b"version https://git" else ""
        raise ExportError("%s is not valid JSON (%s): fetch it again%s" % (path, e, pull)) from None
    if not isinstance(found, dict):
        raise ExportError("%s holds no JSON object: fetch it again" % path)
    return found


def read_json(path):
    with open(path, "rb") as f:
        return parse_json(f.read(), path)


def optional_json(directory, name):
    path = os.path.join(directory, name)
    return read_json(path) if os.path.isfile(path) else {}


def round_up(n, to):
    return -(-n // to) * to


# =====================================================================================
# 2. Number formats
#
# A matrix is cut into tiles of 16 rows.  Packing works on a slab of a few tiles, small
# enough for the cache, in the shape x [32 inputs of a group, groups], where the groups
# run over [tile][group of the row][16 rows]: sums over a group then add whole vectors,
# and one scale per group broadcasts along the contiguous axis.
# =====================================================================================

TILE, BLOCK, GROUP = 16, 256, 32
SLAB = 1 << 17  # weights quantised at once: the f32 scratch of a slab is half a megabyte


def padded(w, col_multiple):
    """w [rows, cols] with rows rounded up to 16 and columns to col_multiple, by zeros."""
    rows, cols = w.shape
    shape = round_up(rows, TILE), round_up(cols, col_multiple)
    if shape == w.shape:
        return w
    out = np.zeros(shape, w.dtype)
    out[:rows, :cols] = w
    return out


def bf16_bits(w):
    """f32 to bf16, nearest, ties to even.  (w is finite.)"""
    bits = w.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_value(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_f32(w):
    """[input][16 rows] f32."""
    x = padded(w, 1)
    return x.reshape(-1, TILE, x.shape[1]).transpose(0, 2, 1).tobytes(), None


def pack_bf16(w):
    """[input pair][16 rows][2] bf16; a pair moves as one 32-bit word."""
    bits = bf16_bits(w)
    pairs = padded(bits, 2).view(np.uint32)
    return (pairs.reshape(-1, TILE, pairs.shape[1]).transpose(0, 2, 1).tobytes(),
            w - bf16_value(bits))


# ---- Importance: which errors matter -----------------------------------------------------
#
# A row of weights that is off by e moves its product by <e, x>, on average over a text by
# e M e^T, M holding the means of x_i x_j.  `run --importance` writes M's diagonal (block 1)
# or its square blocks on the diagonal, as moments [block, cols]: row r, column c holds the
# mean of x_c x_(c - c % block + r).  Without them M is the identity.

# Of the mean square, added to all: a text never shows everything; of T tokens, moments in
# blocks of B inputs are known to about B / T.
DAMPING = 0.01


def damped(moments, tokens):
    """The moments in units of the mean square, diagonal raised; None for inputs that are 0."""
    block, cols = moments.shape
    c = np.arange(cols)
    mean = float(moments[c % block, c].mean(dtype=np.float64))
    if mean < TINY:
        return None
    out = moments / np.float32(mean)
    out[c % block, c] += np.float32(DAMPING + block / tokens)
    return out


def blocks_of(moments, cols):
    """[blocks, block, block], zero for the padding up to cols."""
    block = len(moments)
    out = np.zeros((block, cols), np.float32)
    out[:, :moments.shape[1]] = moments
    return np.ascontiguousarray(out.reshape(block, -1, block).transpose(1, 0, 2))


def weighted_square(a, moments):
    """Sum over the rows of a [rows, cols] of a M a^T."""
    if moments is None:
        return float(np.vdot(a, a))
    if len(moments) == 1:
        return float(np.vdot(a * moments, a))
    rows, block = padded(a, len(moments)), len(moments)
    parts = np.ascontiguousarray(rows.reshape(len(rows), -1, block).transpose(1, 0, 2))
    return float(np.vdot(parts @ blocks_of(moments, rows.shape[1]), parts))


# ---- Values: which v lies nearest to t = w / (S s) ------------------------------------


def nearest_integer(lo, hi):
    def nearest(t, _):
        np.clip(t, lo, hi, out=t)
        return np.rint(t, out=t)  # ties to even
    return nearest


# The codebooks that a group's bit chooses from.
CODEBOOK = np.array([-31, -25, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 28], np.float32)
BOOKS_Q4 = np.stack((CODEBOOK, CODEBOOK + 4))
BOOKS_Q3 = np.array([[-31, -17, -9, -2, 4, 10, 17, 27],
                     [-31, -20, -12, -5, 0, 7, 14, 23]], np.float32)


def nearest_in(books):
    """A function of t and of the group bit, in place.

    The borders between values are multiples of 1/2, so 2t decides: the key floor(2t) +
    ceil(2t) + 128 is even where 2t is an integer and odd between two integers.  On a border
    the even index wins.
    """
    t = (np.arange(256) - 128) / 4.0
    distance = np.abs(t[:, None] - books[:, None])
    distance[:, :, 1::2] += 1e-3  # less than the 1/8 at least that separates other distances
    table = np.take_along_axis(books, distance.argmin(axis=2), axis=1).ravel()

    def nearest(t, book):
        t *= 2
        np.clip(t, -63.5, 63.5, out=t)
        key = np.ceil(t)
        key += np.floor(t, out=t)
        key += 128 + 256 * book
        return np.take(table, key.astype(np.uint16), mode="clip", out=t)
    return nearest


# ---- Packing of chosen values: v [32, T*G*16] int8 to bytes [T, G, of a group] --


def lanes_last(operands, tiles, groups):
    """[operand, 4 inputs, T * G * 16] to [T, G, operand, 16 rows, 4 inputs] bytes."""
    x = operands.reshape(-1, 4, tiles, groups, TILE).transpose(2, 3, 0, 4, 1)
    return x.reshape(tiles, groups, -1)


def nibbles(code):
    """Two steps to an operand: the first in the low nibbles, the second in the high."""
    steps = (code & 15).reshape(4, 2, 4, -1)
    return steps[:, 0] | steps[:, 1] << 4


def group_q8(v, _, tiles, groups):
    return lanes_last(v.view(np.uint8), tiles, groups)


def group_q6(v, _, tiles, groups):
    code = (v + 32).view(np.uint8)
    high = (code >> 4).reshape(2, 4, 4, -1)  # [operand, step of it, input, ...]
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return np.concatenate((lanes_last(nibbles(code), tiles, groups),
                           lanes_last(high, tiles, groups)), axis=2)


def index_in(books):
    """A function of values and group bits."""
    table = np.zeros((2, 64), np.uint8)  # by v + 31
    for book in 0, 1:
        table[book, books[book].astype(int) + 31] = np.arange(books.shape[1])
    return lambda v, book: np.take(table, v + 31 + 64 * book.astype(np.int16), mode="clip")


INDEX_Q4, INDEX_Q3 = index_in(BOOKS_Q4), index_in(BOOKS_Q3)


def group_q4(v, book, tiles, groups):
    return lanes_last(nibbles(INDEX_Q4(v, book)), tiles, groups)


def group_q3(v, book, tiles, groups):
    """Six steps as q4's, the last two in the fourth bits of their nibbles."""
    steps = INDEX_Q3(v, book).reshape(8, 4, -1)
    for operand in 0, 1, 2:
        steps[2 * operand:2 * operand + 2] |= (steps[6:] >> operand & 1) << 3
    return lanes_last(steps[0:6:2] | steps[1:6:2] << 4, tiles, groups)


# ---- Scales ---------------------------------------------------------------------------

# ends      lowest and highest value, for each of the group's bits that there are
# nearest   t and the group's bit to values, in place of t
# s_lo, s_hi  ends of s; 0 where only the positive sign exists
# steps     real scales tried, relative to the one that just covers the group
# tries     then the integers s tried, relative to floor(d / S)
# group     packs the values          group_bytes  of 32 x 16 values
# blank     the value whose bits are zero, for padding
Grid = collections.namedtuple(
    "Grid", "ends nearest s_lo s_hi steps tries group group_bytes blank")

# Why so many: with 32 weights a group, rounding is partly luck, and a choice among scales
# that lie close together turns it to advantage (a tenth of the error of q8).
Q8 = Grid(((-127, 127),), nearest_integer(-127, 127), 0, 255,
          (1.03,), range(-6, 5), group_q8, 512, 0)
Q6 = Grid(((-32, 31),), nearest_integer(-32, 31), -127, 127,
          (1.03, 1.01, 0.99, 0.97), range(-1, 3), group_q6, 384, -32)
Q4 = Grid(BOOKS_Q4[:, [0, -1]].tolist(), nearest_in(BOOKS_Q4), -64, 63,
          (1.02, 0.95, 0.89, 0.83, 0.77, 0.71), range(0, 2), group_q4, 256, -31)
Q3 = Grid(BOOKS_Q3[:, [0, -1]].tolist(), nearest_in(BOOKS_Q3), -64, 63,
          (1.03, 0.97, 0.92, 0.87, 0.82, 0.77, 0.72, 0.66, 0.6), range(0, 2), group_q3, 192, -31)

TINY = 1e-30   # a group whose weights are all smaller is zero
HUGE = 1e15    # beyond, the squares of the search leave f32


def values(x, d, book, grid, live):
    """The values v of x that quantise best with the scales d (0: all zero)."""
    v = grid.nearest(x / np.where(d == 0, np.float32(np.inf), d), book)
    if live is not None:
        v *= live
    return v


def dot(a, b, weight):
    """Weighted sums over each group: [32, groups] times [32, groups] to [groups]."""
    return np.einsum("ij,ij->j", a, b if weight is None else b * weight)


def best_scales(x, grid, live, weight, S=None):
    """For each group the scale d, real or a multiple of S, and the bit with the least squared
    error.

    With the values v of some scale, d = <w,v>/<v,v> is the best scale for those values.  A
    scale leaves <w,w> less its gain d (2 <w,v> - d <v,v>), and the candidate that gains most
    is kept.  Tried are both signs, both bits, and a few scales around the one that just covers
    the group.
    """
    top, bottom = x.max(axis=0), x.min(axis=0)
    gain, d, best_book = np.full_like(top, -1), np.zeros_like(top), np.zeros_like(top)
    for book, (lo, hi) in enumerate(grid.ends):
        covers = [np.maximum(top / hi, bottom / lo)]
        if grid.s_lo < 0:
            covers.append(np.minimum(top / lo, bottom / hi))
        for cover in covers:
            for step in grid.steps:
                v = values(x, cover * np.float32(step), book, grid, live)
                wv, vv = dot(x, v, weight), dot(v, v, weight)
                fit = wv / np.where(vv == 0, np.float32(1), vv)
                if S is not None:
                    fit = S * np.clip(np.rint(fit / S), grid.s_lo, grid.s_hi)
                gains = fit * (2 * wv - fit * vv)
                better = gains > gain
                np.copyto(gain, gains, where=better)
                np.copyto(d, fit, where=better)
                np.copyto(best_book, book, where=better)
    d[np.maximum(top, -bottom) < TINY] = 0
    return d, best_book


def row_scales(d, grid):
    """S [T, 1, 16], such that the row's largest group scale is an end of the range of s."""
    need = d / np.float32(grid.s_hi)
    if grid.s_lo < 0:
        need = np.maximum(need, d / np.float32(grid.s_lo))
    return need.max(axis=1, keepdims=True)


def group_scales(x, d, S, book, grid, live, weight):
    """s: of a few integers around d / S the one that leaves the least squared error."""
    below = np.floor(d / np.where(S == 0, np.float32(1), S))
    best, least = np.zeros_like(d), np.full_like(d, np.inf)
    for offset in grid.tries:
        s = np.clip(below + np.float32(offset), grid.s_lo, grid.s_hi)
        ds = (S * s).reshape(-1)
        v = values(x, ds, book, grid, live)
        error = ds * (ds * dot(v, v, weight) - 2 * dot(x, v, weight))  # less <w,w>
        error = error.reshape(d.shape)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(best, s, where=better)
    return np.where(d == 0, np.float32(0), best)


def feedback(moments, cols):
    """M [blocks, inputs, inputs].  U of that shape, upper: what the error of an input moves the
    later ones by, such that these make up for it as well as real numbers could (rows of the
    inverse's factor).  And cost [blocks, inputs]: what the error's square costs even so."""
    M = blocks_of(moments, round_up(cols, len(moments)))
    U, cost, i = np.empty_like(M), np.empty(M.shape[:2], np.float32), np.arange(M.shape[1])
    for block, u, c in zip(M, U, cost):
        m = block.astype(np.float64)
        m[i, i] += m[i, i] == 0  # padding
        try:
            factor = np.linalg.cholesky(np.linalg.inv(m)).T
        except np.linalg.LinAlgError:
            raise ExportError("the importance is damaged: its means of products contradict each "
                              "other; make it again") from None
        u[:], c[:] = factor / factor[i, i][:, None], factor[i, i] ** -2.0
    return M, U, cost


def round_in_turn(x, S, grid, live, U, cost):
    """s, bits and values of a group's inputs [blocks, 32, rows], the error of each moving the
    later ones; x becomes the errors."""
    def flat(a):
        return np.ascontiguousarray(a.transpose(1, 0, 2)).reshape(GROUP, -1)
    unit = np.where(S == 0, np.float32(1), S)
    d, book = best_scales(flat(x), grid, None if live is None else flat(live),
                          flat(np.broadcast_to(cost[:, :, None], x.shape)), np.tile(unit, len(x)))
    s, book, v = np.rint(d.reshape(len(x), -1) / unit), book.reshape(len(x), -1), np.empty_like(x)
    for k in range(GROUP):
        v[:, k] = values(x[:, k], S * s, book, grid, None if live is None else live[:, k])
        x[:, k] -= v[:, k] * (S * s)
        x[:, k + 1:] -= U[:, k, k + 1:, None] * x[:, None, k]
    return s, book, v


def settle(x, S, grid, live, moments):
    """Values, S, s and bits that leave less error in the products than the nearest values do.

    First each input is rounded in turn and the later ones of its block move to make up for its
    error; a group's scale is chosen when its turn comes.  Then S is the best for all values of its
    row, and SWEEPS times each group's s is the best for its values, and each value the best for
    all others as they stand (coordinate descent on e M e^T, which never rises).

    In blocks the shape is [blocks, inputs of one, rows]; zeros fill the last block.  pull = M e; the best real weight
    of input i, all others as they are, is q_i + pull_i / M_ii.
    """
    tiles, per_block = len(S), len(moments) // GROUP
    n_groups = x.shape[1] // (tiles * TILE)
    n_blocks = -(-n_groups // per_block)

    def in_blocks(a):
        out = np.zeros((n_blocks * per_block, GROUP, tiles, TILE), np.float32)
        out[:n_groups] = a.reshape(GROUP, tiles, n_groups, TILE).transpose(2, 0, 1, 3)
        return out.reshape(n_blocks, -1, tiles * TILE)
    M, U, cost, _ = keep("feedback", id(moments), lambda: (  # holds moments, so the id stays theirs
        *feedback(moments, n_blocks * len(moments)), moments))
    diagonal = np.einsum("bii->bi", M).copy()
    diagonal[diagonal == 0] = 1  # padding
    x, S = in_blocks(x), S.reshape(-1)
    live = None if live is None else in_blocks(live)
    s = np.empty((n_blocks, per_block, len(S)), np.float32)
    book, v, moved = np.empty_like(s), np.empty_like(x), x.copy()
    groups = [(g, slice(g * GROUP, (g + 1) * GROUP)) for g in range(per_block)]
    for g, group in groups:
        s[:, g], book[:, g], v[:, group] = round_in_turn(
            moved[:, group], S, grid, None if live is None else live[:, group],
            U[:, group, group], cost[:, group])
        moved[:, group.stop:] -= U[:, group, group.stop:].transpose(0, 2, 1) @ moved[:, group]
    q = v * np.repeat(S * s, GROUP, axis=1)
    near = M @ q
    size = np.einsum("bir,bir->r", q, near)
    more = np.where(size > 0, np.einsum("bir,bir->r", x, near) / np.where(size > 0, size, 1), 1)
    more = more.astype(np.float32)
    S, q = S * more, q * more
    pull = M @ (x - q)
    for g, group in groups * SWEEPS:
        near, old = pull[:, group].copy(), q[:, group].copy()
        u = M[:, group, group] @ v[:, group]
        size = S * np.einsum("bir,bir->br", v[:, group], u)
        more = np.einsum("bir,bir->br", v[:, group], near) / np.where(size > 0, size, np.inf)
        fit = np.clip(np.rint(s[:, g] + more), grid.s_lo, grid.s_hi)
        fit = np.where((fit == 0) | (s[:, g] == 0), s[:, g], fit)  # no group becomes or leaves 0
        change, s[:, g] = (fit - s[:, g]) * S, fit
        q[:, group] += v[:, group] * change[:, None]
        near -= u * change[:, None]
        d = S * s[:, g]
        for k, i in enumerate(range(group.start, group.stop)):
            best = q[:, i] + near[:, k] / diagonal[:, i, None]
            v[:, i] = values(best, d, book[:, g], grid, None if live is None else live[:, i])
            step = v[:, i] * d - q[:, i]
            near -= M[:, group, i, None] * step[:, None]
            q[:, i] += step
        pull -= M[:, :, group] @ (q[:, group] - old)

    def back(a):
        a = a.reshape(n_blocks * per_block, -1, tiles, TILE)[:n_groups].transpose(1, 2, 0, 3)
        return np.ascontiguousarray(a)
    return (back(v).reshape(GROUP, -1), S.reshape(tiles, 1, TILE),
            back(s).reshape(tiles, -1, TILE), back(book).reshape(-1))


SWEEPS = 3   # of settle; more gain less than a hundredth
ROOM = 1.05  # of S before settle, since errors of earlier groups may widen a group


def pack_quantised(w, grid, moments=None):
    """w [rows, cols] to tiles.  S and s come first; then every v is the one nearest to
    its weight under S * s as stored, unless moments tell a better one.  Returns the bytes
    and what they lack, [rows, cols]."""
    rows, cols = w.shape
    full = padded(w, BLOCK)
    tiles, groups = full.shape[0] // TILE, full.shape[1] // GROUP
    split = (tiles, TILE, groups, GROUP)

    def regroup(a):
        return np.ascontiguousarray(a.reshape(split).transpose(3, 0, 2, 1)).reshape(GROUP, -1)
    x = regroup(full)
    live = None if full is w else regroup(padded(np.ones_like(w), BLOCK))
    partly = live if cols % GROUP else None
    by_row = (tiles, groups, TILE)
    if moments is None or len(moments) == 1:
        weight = moments
        if moments is not None:
            weight = regroup(padded(np.ascontiguousarray(np.broadcast_to(moments, w.shape)), BLOCK))
        d, book = best_scales(x, grid, partly, weight)
        S = row_scales(d.reshape(by_row), grid)
        s = group_scales(x, d.reshape(by_row), S, book, grid, partly, weight)
        v = values(x, (S * s).reshape(-1), book, grid, partly)
    else:
        lo, hi = grid.ends[0]
        covers = np.maximum(x.max(axis=0) / hi, x.min(axis=0) / lo) * np.float32(ROOM)
        S = row_scales(covers.reshape(by_row), grid)
        v, S, s, book = settle(x, S, grid, partly, moments)
    ds = (S * s).reshape(-1)
    lost = (x - v * ds).reshape(GROUP, tiles, groups, TILE).transpose(1, 3, 2, 0)
    lost = lost.reshape(full.shape)[:rows, :cols]

    code = v.astype(np.int8)
    book[s.reshape(-1) == 0] = 0
    if live is not None:
        code[live == 0] = grid.blank
    body = grid.group(code, book, tiles, groups)
    return assemble(S, s, book.reshape(by_row), body, grid), lost


def assemble(S, s, book, body, grid):
    """Tiles: S of 16 rows, then blocks of group scales and groups."""
    tiles, groups, _ = s.shape
    scale = s.astype(np.int16)
    if len(grid.ends) > 1:
        scale = scale << 1 | (book != 0)
    blocks = groups * GROUP // BLOCK
    per_block = BLOCK // GROUP
    out = np.empty((tiles, tile_bytes_of(grid, groups * GROUP)), np.uint8)
    out[:, :64] = S.astype("<f4").reshape(tiles, TILE).view(np.uint8)
    rest = out[:, 64:].reshape(tiles, blocks, -1)
    rest[:, :, :128] = (scale & 255).astype(np.uint8).reshape(tiles, blocks, 128)
    rest[:, :, 128:] = body.reshape(tiles, blocks, per_block * grid.group_bytes)
    return out.tobytes()


def tile_bytes_of(grid, cols):
    return 64 + round_up(cols, BLOCK) // BLOCK * (128 + BLOCK // GROUP * grid.group_bytes)


# ---- The table of types ---------------------------------------------------------------


def float_type(number, pack, unit, bytes_of_unit):
    """unit inputs of 16 rows take bytes_of_unit."""
    return Type(number, lambda w, moments: pack(w),
                lambda cols: round_up(cols, unit) // unit * bytes_of_unit)


def quantised_type(number, grid):
    return Type(number, lambda w, moments: pack_quantised(w, grid, moments),
                lambda cols: tile_bytes_of(grid, cols))


# number in the file; slab of weights and moments to bytes and what these lack (None:
# nothing); columns to bytes of a tile
Type = collections.namedtuple("Type", "number pack tile_bytes")
TYPES = {
    "f32": float_type(1, pack_f32, 1, 64),
    "bf16": float_type(2, pack_bf16, 2, 64),
    "q8": quantised_type(3, Q8),
    "q6": quantised_type(4, Q6),
    "q4": quantised_type(5, Q4),
    "q3": quantised_type(6, Q3),
}


def packed_bytes(type_name, rows, cols):
    return round_up(rows, TILE) // TILE * TYPES[type_name].tile_bytes(cols)


# =====================================================================================
# 3. The model
# =====================================================================================

# name, role number, rows, cols; a dimension is a product of letters, "1" is one
ROLES = [
    ("embedding", 16, "V", "D"), ("head", 17, "V", "D"), ("final_norm", 18, "D", "1"),
]
SCORE = "score", 19, "S", "D"  # the head of a reward model or classifier, where there is one
LAYER_ROLES = [  # in the order in which a layer uses them
    ("attn_norm", 32, "D", "1"), ("q", 33, "NH", "D"), ("k", 34, "KH", "D"),
    ("v", 35, "KH", "D"), ("o", 36, "D", "NH"), ("post_attn_norm", 37, "D", "1"),
    ("ffn_norm", 40, "D", "1"), ("gate", 41, "F", "D"), ("up", 42, "F", "D"),
    ("down", 43, "D", "F"), ("post_ffn_norm", 44, "D", "1"),
]
FACTS, TOKENIZER, KEPT = 1, 2, 3

LIMITS = {  # of the file's header, as gemma2.c's section 2 has them; no soft-cap is 0
    "L": (1, 1024), "D": (1, 1 << 20), "N": (1, 4096), "K": (1, 4096), "H": (2, 1024),
    "F": (1, 1 << 22), "V": (1, (1 << 22) - 1), "window": (1, 1 << 30), "context": (1, 1 << 30),
    "eps": (0, 1), "rope_theta": (1e-3, 1e12), "attn_softcap": (0.01, 10000),
    "final_softcap": (0.01, 10000), "query_scale": (1e-9, 1e9)}


class Model:
    """What the file's header says, but for the vocabulary, which the embedding decides, and S, the
    scores that a reward model or classifier gives."""
    L = D = N = K = H = F = V = S = 0
    window = context = 0
    eps = attn_softcap = final_softcap = query_scale = embedding_scale = rope_theta = 0.0
    local = ()      # per layer: sees a sliding window only
    stop_ids = ()
    tied = None     # True, False, or None where the checkpoint does not say
    kept = None     # ids that the head has rows for, ascending; None: all

    def dimension(self, letters):
        return math.prod(1 if c == "1" else getattr(self, c) for c in letters)


def tensor_table(model):
    """Canonical name to (role number, layer, rows, cols), in order of use, head last."""
    table = {}
    for layer in range(model.L):
        for name, role, rows, cols in LAYER_ROLES:
            table["layers.%d.%s" % (layer, name)] = (
                role, layer, model.dimension(rows), model.dimension(cols))
    last = sorted(ROLES, key=lambda r: r[0] != "final_norm") + [SCORE] * bool(model.S)
    for name, role, rows, cols in last:
        table[name] = role, 0, model.dimension(rows), model.dimension(cols)
    return table


def is_norm(name):
    return name.endswith("norm")


# =====================================================================================
# 4. Checkpoints
#
# What happens to a weight, from the file it lies in to the file that the engine maps:
#
#   open     open_checkpoint() asks each of READERS whether a path suits it.  The reader that says
#            yes reads headers, indices and settings, no weights, and becomes a Checkpoint
#   names    canonical_name() and its like turn what a format calls a tensor into ours: embedding,
#            layers.3.q ...  check_shapes() holds names and shapes against tensor_table(), and
#            settle_head() sees whether the head is the embedding
#   rows     a tensor has
#              shape              (rows, cols); a norm is (D, 1)
#              rows(start, stop)  f32 [stop - start, cols], norms as trained (x is scaled by 1 + w)
#            Stored reads rows of a plain type, Scaled, Turned and Mapped those of quantised
#            matrices, Blocks those of GGUF and gemma.cpp, Rearranged those of arrays with more
#            axes.  Ranges, LowRank and others stand on top of another tensor
#   values   read_at() brings the bytes of these rows alone, numpy makes them f32, check_values()
#            refuses what is not finite
#   pack     pack_rows() in a worker process gives a slab of them to pack() of its type
#            (section 2): bytes of tiles, and how much they lost
#   write    Container (section 6) writes the slabs in order, with their digests
#
# So a conversion holds a few slabs of a few megabytes, whatever the model's size.  Two tensors are
# the exception: GPTQ's and AWQ's matrices, which lie transposed, are read whole, one at a time, and
# a Flax array is read by the chunks in which it was written.
#
# Checkpoints and tensors cross to the worker processes by pickling: they hold paths and offsets,
# but no open files and no closures.  What a process wants again, keep() keeps.
# =====================================================================================


class Tensors(dict):
    """Name to tensor; of each name there is one."""

    def __init__(self):
        super().__init__()
        self.origin = {}

    def add(self, name, tensor, where):
        """Where it was found is for messages."""
        if name in self:
            raise ExportError("the checkpoint holds %s twice (%s and %s): remove the stale one, or "
                              "fetch the file again" % (name, self.origin[name], where))
        self[name], self.origin[name] = tensor, where


class Checkpoint:
    """What a conversion needs to know of its input."""
    directory = ""   # where tokenizer and chat template lie
    facts_in = "config.json"  # what says the model's sizes, for messages
    files = ()       # paths of all that is read, so that the output never overwrites them
    source = ""      # one line for the file's facts
    model = None     # a Model with everything but V
    tensors = {}     # canonical name to tensor ("head" only where there is one)
    start_method = None  # of worker processes, where the platform's own does not do
    most_jobs = 1024     # more would need too much memory
    endings, magic = (), None  # of a file that can be given: its name's, or its first bytes
    pattern = None       # of names in a directory
    single = index = ""  # names of the file that may be all, and of the list of several

    @classmethod
    def suits(cls, path):
        if os.path.isdir(path):
            return bool(cls.files_of(path))
        with open(path, "rb") as f:
            return path.endswith(cls.endings) or f.read(4) == cls.magic

    @classmethod
    def files_of(cls, path):
        return weight_files(path, cls.pattern, cls.single, cls.index)

    def name(self):
        return directory_name(self.directory)

    def tokenizer(self):
        """(path, Tokenizer) that the checkpoint itself brings, (None, None) for none."""
        return tokenizer_of_directory(self.directory)

    def chat_template(self):
        return chat_template(self.directory)


def directory_name(path):
    """The directory's name; in Hugging Face's cache, the repository's.  Kaggle's directories
    are named by a version, and lie in one named by the model."""
    path = os.path.abspath(path)
    cached = re.search(r"models--(.+?)--(.+?)[/\\]snapshots[/\\]", path)
    if cached:
        return "/".join(cached.groups())
    parent, name = os.path.split(path)
    return os.path.basename(parent) or name if name.isdigit() else name


handles = {}  # open files of this process, by process and path


def read_at(path, offset, size):
    """Bytes of a file as a writable array of u8; fails where there are not as many."""
    f = handles.get((os.getpid(), path))
    if f is None:
        f = handles[os.getpid(), path] = open(path, "rb", buffering=0)
    f.seek(offset)
    raw = np.empty(size, np.uint8)
    view, got = memoryview(raw), 0
    while got < size:
        try:
            n = f.readinto(view[got:])
        except OSError as e:
            raise OSError(e.errno, e.strerror, path) from None
        if not n:
            raise ExportError("%s became shorter while it was read: is it still being fetched?"
                              % path)
        got += n
    return raw


class Ranges:
    """Ranges of another tensor's rows, one after the other, as in fused projections."""

    def __init__(self, tensor, *ranges):
        self.tensor, self.ranges = tensor, ranges
        self.shape = sum(b - a for a, b in ranges), tensor.shape[1]

    def rows(self, start, stop):
        parts = []
        for a, b in self.ranges:
            if start < b - a and stop > 0:
                parts.append(self.tensor.rows(a + max(start, 0), min(b, a + stop)))
            start, stop = start - (b - a), stop - (b - a)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Ordered:
    """Another tensor's rows in another order."""

    def __init__(self, tensor, order):
        self.tensor, self.order, self.shape = tensor, order, tensor.shape

    def rows(self, start, stop):
        wanted = self.order[start:stop]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        return np.concatenate([self.tensor.rows(int(r[0]), int(r[-1]) + 1) for r in runs])


kept = {}  # of this process, by place: a key and what was last made there


def keep(place, key, make):
    """What make() returns, or returned when this place was last asked, if with the same key: tasks
    come tensor by tensor and row by row."""
    if kept.get(place, (None,))[0] != key:
        kept.pop(place, None)  # not two at once
        kept[place] = key, make()
    return kept[place][1]


def attempt(where, action):
    """action(), and one sentence where a library fails, whatever hostile bytes make of it."""
    try:
        return action()
    except ExportError:
        raise
    except Exception as e:
        said = re.sub(r"\s*\[.*", "", (str(e).strip() or type(e).__name__).split("\n")[0])[:300]
        raise ExportError("%s cannot be read (%s): fetch the checkpoint again" % (where, said)
                          ) from None


def library(name, package, what):
    """Imports a library that only some formats need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError("%s needs %s: python3 -m pip install %s" % (what, package, package)
                          ) from None


# D of 2B, 9B and 27B: N, K, H, where nothing else tells them
RELEASED = {2304: (8, 4, 256), 3584: (16, 8, 256), 4608: (32, 16, 128)}


def model_of_sizes(sizes, where):
    """The Model of {"L": ... "F": ...} and the facts that all released models share, but that 27B
    scales queries by D / N instead of H.  What a format knows better is put in its place."""
    model = Model()
    for letter in "LDNKHF":
        least, most = LIMITS[letter]
        if not least <= sizes.get(letter, 0) <= most:
            raise ExportError("%s gives no usable %s (%s; %d to %d can be): fetch all files of the "
                              "checkpoint" % (where, SIZE_NAMES[letter], sizes.get(letter), least,
                                              most))
        setattr(model, letter, sizes[letter])
    if model.N % model.K or model.H % 2:
        raise ExportError("%s has %d heads of %d values and %d key/value heads, which do not go "
                          "together: fetch it again" % (where, model.N, model.H, model.K))
    model.window, model.context, model.eps, model.rope_theta = 4096, 8192, 1e-6, 10000.0
    model.attn_softcap, model.final_softcap = 50.0, 30.0
    model.local = tuple(i % 2 == 0 for i in range(model.L))
    is_27b = (model.D, model.N, model.H) == (4608, 32, 128)
    model.query_scale = scale_of(model.D // model.N if is_27b else model.H)
    model.embedding_scale = embedding_scale(model.D)
    return model


def scale_of(scalar):
    return float(np.float32(scalar ** -0.5))


def count_layers(names):
    return 1 + max((int(n.split(".")[1]) for n in names if n.startswith("layers.")), default=-1)


def stranger(name, kind="Gemma 2", holder="the checkpoint"):
    return ExportError("%s holds %s, which is no tensor of %s: is this the right checkpoint?"
                       % (holder, name, kind))


def embedding_scale(D):
    """sqrt(D) rounded to bf16, as the models were trained (9B: 59.75, not 59.87)."""
    root = np.array([math.sqrt(D)], np.float32)
    return float(bf16_value(bf16_bits(root))[0])


# ---- config.json ----------------------------------------------------------------------

ONLY = '"gemma2", as only Gemma 2 can be converted'
HEADS = re.compile(r".*ForTokenClassification|.*Reward.*|.*ForQuestionAnswering")

SIZE_NAMES = {  # as config.json has them
    "L": "num_hidden_layers", "D": "hidden_size", "N": "num_attention_heads",
    "K": "num_key_value_heads", "H": "head_dim", "F": "intermediate_size",
}
SOFTCAPS = [("attn_softcap", "attn_logit_softcapping", 50.0),
            ("final_softcap", "final_logit_softcapping", 30.0)]  # null or 0 is off


class Config:
    """A JSON file of settings that complains in sentences."""

    def __init__(self, path, doc=None):
        self.path, self.doc = path, read_json(path) if doc is None else doc

    def bad(self, key, value, want):
        return ExportError("%s: %s is %s, but must be %s"
                           % (self.path, key, json.dumps(value)[:80], want))

    def number(self, key, default, least, most, kinds=(int, float)):
        if default is None and key not in self.doc:
            raise ExportError("%s lacks %s: fetch the file again" % (self.path, key))
        return self.checked(key, self.doc.get(key, default), least, most, kinds)

    def checked(self, key, value, least, most, kinds=(int, float)):
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise self.bad(key, value, "a %snumber from %s to %s" % (
                "whole " if kinds is int else "", least, most))
        return value

    def softcap(self, key, default):
        value = self.doc.get(key, default)
        return self.number(key, default, 0.01, 10000) if value else 0.0


def model_of_config(config):
    """Every variant of Gemma 2's config.json to a Model; what it cannot mean is refused."""
    refuse_other_models(config)
    model = model_of_sizes({
        letter: config.number(key, 256 if letter == "H" else None, *LIMITS[letter], int)
        for letter, key in SIZE_NAMES.items()}, config.path)
    model.context = config.number("max_position_embeddings", 8192, *LIMITS["context"], int)
    for name, key, default in SOFTCAPS:
        setattr(model, name, config.softcap(key, default))
    model.eps = config.number("rms_norm_eps", 1e-6, 0, 1)
    model.rope_theta = rope_theta(config)
    model.local = local_layers(config, model.L)
    model.window = sliding_window(config, model)
    model.query_scale = query_scale(config, model)
    model.stop_ids = id_list(config, "eos_token_id")
    model.tied = config.doc.get("tie_word_embeddings")
    if model.tied not in (None, True, False):
        raise config.bad("tie_word_embeddings", model.tied, "true or false")
    return model


def refuse_other_models(config):
    doc = config.doc
    if doc.get("model_type") != "gemma2":
        raise config.bad("model_type", doc.get("model_type"), ONLY)
    named = doc.get("architectures")
    for name in named if isinstance(named, list) else []:
        if HEADS.fullmatch(str(name)):
            raise config.bad("architectures", name, "a language model: this classifier's or reward "
                             "model's head gives scores and no text")
    for key in ("attention_bias", "use_bidirectional_attention"):
        if doc.get(key):
            raise config.bad(key, doc[key], "false, as in Gemma 2 as released")
    # hidden_act is a leftover that the released models do not follow
    act = doc.get("hidden_activation")
    if act not in (None, "gelu_pytorch_tanh", "gelu_new", "gelu_fast"):
        raise config.bad("hidden_activation", act, '"gelu_pytorch_tanh"')


def rope_theta(config):
    """Both spellings: rope_theta and rope_scaling, or rope_parameters (maybe per layer type)."""
    doc = config.doc
    spelled = doc.get("rope_parameters") or {}
    if not isinstance(spelled, dict):
        raise config.bad("rope_parameters", spelled, "an object")
    groups = [p for p in spelled.values() if isinstance(p, dict)] or [spelled]
    scaling = doc.get("rope_scaling")
    for part in groups + ([scaling] if isinstance(scaling, dict) else []):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind not in (None, "default") or part.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise config.bad("rope type", kind, "\"default\", Gemma 2's plain rotary positions")
    thetas = {json.dumps(p.get("rope_theta", doc.get("rope_theta", 10000.0))) for p in groups}
    theta = json.loads(thetas.pop())
    is_number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
    if thetas or not is_number or not 0 < theta < 1e30:
        raise config.bad("rope_theta", theta, "one positive number for all layers")
    return float(theta)


def local_layers(config, n_layers):
    """layer_types where it is given, else even layers are local."""
    types = config.doc.get("layer_types")
    if types is None:
        return tuple(i % 2 == 0 for i in range(n_layers))
    names = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or len(types) != n_layers or any(
            not isinstance(t, str) or t not in names for t in types):
        raise config.bad("layer_types", types, "a list of %d entries, sliding_attention or "
                         "full_attention" % n_layers)
    return tuple(names[t] for t in types)


def sliding_window(config, model):
    key = "sliding_window" if "sliding_window" in config.doc else "sliding_window_size"
    if not any(model.local) and config.doc.get(key, 4096) is None:
        return model.context
    return config.number(key, 4096, 1, 1 << 30, int)


def query_scale(config, model):
    scalar = config.number("query_pre_attn_scalar", 256, 1e-6, 1e9)
    if scalar == 224 and model.H != 224:
        warn("query_pre_attn_scalar is 224 and is kept; Google corrected this value of early 9B "
             "files to 256, so if answers are poor, write 256 into %s and convert again"
             % config.path)
    return scale_of(scalar)


def id_list(config, key):
    """An id, a list of ids or null."""
    value = config.doc.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise config.bad(key, value, "a token id or a list of them")
    return tuple(ids)


# ---- safetensors ----------------------------------------------------------------------


def to_f32(a):
    return a.astype(np.float32, copy=False)


def float8_values():
    """f32 by byte of F8_E4M3, which has no infinities: all ones but the sign is NaN."""
    code = np.arange(128)
    exponent, fraction = code >> 3, (code & 7) / 8
    value = np.where(exponent, np.ldexp(1 + fraction, exponent - 7), np.ldexp(fraction, -6))
    value[127] = np.nan
    return np.concatenate((value, -value)).astype(np.float32)


E4M3 = float8_values()

# how numpy reads a type, how it becomes f32
FLOATS = {
    "F32": ("<f4", to_f32),
    "BF16": ("<u2", bf16_value),
    "F16": ("<f2", to_f32),
}
NUMBERS = {  # those and the codes of quantised checkpoints
    **FLOATS, "I8": ("i1", to_f32), "U8": ("u1", to_f32),
    "F8_E4M3": ("u1", lambda a: np.take(E4M3, a)),
}
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2,
          "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


class Stored:
    """One tensor of a plain type, row by row in a file; more than two axes count as rows."""

    def __init__(self, path, dtype, dims, offset):
        self.path, self.dtype, self.dims, self.offset = path, dtype, dims, offset
        self.key = path, offset
        rows, cols = (dims[:-1], dims[-1]) if len(dims) > 1 else (dims, 1)
        self.shape = math.prod(rows), cols

    def raw(self, start, stop):
        """Bytes [stop - start, of a row]."""
        width = self.shape[1] * WIDTHS[self.dtype]
        return read_at(self.path, self.offset + start * width, (stop - start) * width).reshape(
            stop - start, width)

    def rows(self, start, stop):
        numpy_type, values_of = NUMBERS[self.dtype]
        return values_of(self.raw(start, stop).view(numpy_type))

    def read(self, box):
        """Of all axes a (start, stop), in the stored type; what lies together is read at once."""
        numpy_type = np.dtype(FLOATS[self.dtype][0])
        out = np.empty([b - a for a, b in box], numpy_type)
        run = len(box)  # this axis and those after it are one piece
        while run and box[run - 1] == (0, self.dims[run - 1]):
            run -= 1
        run = max(run - 1, 0)
        strides = [math.prod(self.dims[i + 1:]) for i in range(len(box))]
        first = sum(a * stride for (a, _), stride in zip(box, strides))
        for index in np.ndindex(out.shape[:run]):
            at = first + sum(i * stride for i, stride in zip(index, strides))
            part = read_at(self.path, self.offset + at * numpy_type.itemsize, out[index].nbytes)
            out[index] = part.view(numpy_type).reshape(out.shape[run:])
        return out


def read_safetensors_header(path):
    """Name to Stored for one file, after every claim of its header is checked."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(8)
        n = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= n <= 100_000_000:
            raise ExportError("%s is no safetensors file (its first 8 bytes are no header size): "
                              "fetch it again (git lfs pull, if it is a pointer)" % path)
        if 8 + n > size:
            raise ExportError("%s is truncated: its header needs %d bytes and the file has %d: "
                              "fetch it again" % (path, 8 + n, size))
        header = parse_json(f.read(n), "the header of " + path)
    header.pop("__metadata__", None)
    tensors = {name: stored_tensor(path, name, entry, 8 + n) for name, entry in header.items()}
    check_layout(path, tensors, 8 + n, size)
    return tensors


def typed(value, kind):
    """What a stranger wrote, if it is of that kind, else an empty one."""
    return value if isinstance(value, kind) else kind()


def is_size(n):
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 50


def stored_tensor(path, name, entry, base):
    def bad(what):
        return ExportError("%s: tensor %s has %s: fetch the file again" % (path, name, what))
    if not isinstance(entry, dict):
        raise bad("no description")
    dtype, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise bad("an unknown dtype, %s" % json.dumps(dtype))
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(is_size, shape)):
        raise bad("a bad shape, %s" % json.dumps(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise bad("bad data_offsets, %s" % json.dumps(offsets))
    want = math.prod(shape) * WIDTHS[dtype]
    if offsets[1] - offsets[0] != want:
        raise bad("%d bytes where its shape and dtype need %d" % (offsets[1] - offsets[0], want))
    return Stored(path, dtype, tuple(shape), base + offsets[0])


def check_layout(path, tensors, base, size):
    """Tensors fill the file from the header to the end: no gap, no overlap, none beyond it."""
    at = base
    for name, t in sorted(tensors.items(), key=lambda item: item[1].offset):
        if t.offset != at:
            raise ExportError("%s: tensor %s %s: fetch the file again" % (
                path, name, "overlaps another" if t.offset < at else "leaves a gap before it"))
        at += math.prod(t.dims) * WIDTHS[t.dtype]
    if at != size:
        raise ExportError("%s is %s: its header speaks of %d bytes and the file has %d: fetch it "
                          "again" % (path, "truncated" if at > size else "too long", at, size))


def stored_tensors(files, read):
    """Name to Stored, from all files; read is for one."""
    stored = Tensors()
    for path in files:
        for name, tensor in read(path).items():
            stored.add(name, tensor, path)
    return stored


def series(name):
    """What the names of a checkpoint's numbered files share, this one's number and how many there
    are, if it says so; None for a file that stands alone."""
    m = re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\.\w+)", name)
    if m:
        return m.group(1, 3, 4), int(m[2]), int(m[3])
    m = re.fullmatch(r"(hf_model)_(\d+)(_\d+\.\w+)", name)  # torchtune's; an epoch follows
    return (m.group(1, 3), int(m[2]), None) if m else None


def weight_files(path, pattern, single, index):
    """The files of a checkpoint: one, those of an index, or a numbered series.  path is their
    directory or any of them."""
    directory, given = path, None
    if os.path.isfile(path):
        directory, name = os.path.split(path)
        directory, given = directory or ".", series(name)
        if given is None:
            return [path]
    names = sorted(n for n in os.listdir(directory) if pattern.fullmatch(n))
    if single in names and not given:
        return [os.path.join(directory, single)]
    if index and os.path.isfile(os.path.join(directory, index)) and not given:
        return indexed_files(directory, os.path.join(directory, index), pattern)
    found = collections.defaultdict(list)
    for n in names:
        found[series(n)[0] if series(n) else n].append(n)
    if len(found) > 1 and not given:
        raise ExportError("%s holds several checkpoints (%s ...): give a file of the right one%s"
                          % (directory, ", ".join(n[0] for n in list(found.values())[:2]),
                             ", or fetch " + index if index else ""))
    names = found[given[0]] if given else next(iter(found.values()), [])
    numbered = [series(n) for n in names if series(n)]
    count = numbered[0][2] or len(names) if numbered else 0
    if len(numbered) != count or sorted(n for _, n, _ in numbered) != list(range(1, count + 1)):
        raise ExportError("%s holds %d of the files that %s belongs to, and their numbers are not "
                          "1 to %d: fetch the others" % (directory, len(names), names[0], count))
    return [os.path.join(directory, n) for n in names]


def indexed_files(path, index, pattern):
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError("%s has no weight_map: fetch it again" % index)
    names = [n for v in weight_map.values() for n in (v if isinstance(v, list) else [v])]
    names = sorted({n if isinstance(n, str) else json.dumps(n) for n in names})
    for n in names:
        if n != os.path.basename(n) or not pattern.fullmatch(n):
            raise ExportError("%s names a shard %r, which is no file name: fetch it again"
                              % (index, n))
        if not os.path.isfile(os.path.join(path, n)):
            raise ExportError("%s names the shard %s, which is missing: fetch it" % (index, n))
    return [os.path.join(path, n) for n in names]


# What programs put around a model, and so before the names of its tensors: torch.compile,
# data parallelism, FSDP and checkpointed activations (also inside a name); PEFT and Lightning
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module|"
                      r"_checkpoint_wrapped_module)\.|^(?:(?:base_)?model\.)+")
# Hugging Face's name without them to ours; a layer's stand after "layers.N."
HF_NAMES = {  # gemma_pytorch's embedding last
    "embed_tokens.weight": "embedding", "norm.weight": "final_norm", "lm_head.weight": "head",
    "score.weight": "score", "embedder.weight": "embedding",
}
HF_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "q", "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v", "self_attn.o_proj.weight": "o",
    "self_attn.qkv_proj.weight": "qkv",  # gemma_pytorch's
    "post_attention_layernorm.weight": "post_attn_norm",  # Llama's ffn norm has this name
    "pre_feedforward_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "gate", "mlp.up_proj.weight": "up", "mlp.down_proj.weight": "down",
    "post_feedforward_layernorm.weight": "post_ffn_norm",
}
DROPPED = re.compile(  # computed anyway; scales of quantised activations and caches
    r".*rotary_emb\.inv_freq|.*\.(input|output|kv|[qkv])_(scale|zero_point|scale_ub)|"
    r".*\.(activation|act)_scale")
REFUSED = [  # pattern of a name, what it means
    (r"(classifier|v_head|value_head|reward_head|regression_layer)\..*", "a head that gives "
     "scores: the checkpoint is a reward model or a classifier, which writes no text"),
    (r".*(vision_tower|multi_modal_projector|vision_model|language_model).*",
     "part of a vision model such as PaliGemma"),
    (r".*(lora_|\.dora_).*", "part of a LoRA adapter: give the base model here and the adapter "
     "with --lora"),
    (r".*\.(q_(weight|invperm|scale|scale_max|groups|perm)|trellis|suh|svh)", "part of a matrix "
     "in EXL2 or EXL3 (ExLlama), which cannot be read: fetch the model as safetensors or GGUF"),
    (r".*\.(qweight|qzeros|g_idx|scales|biases|(nested_)?(absmax|quant_map)|SCB|quant_state\..*|"
     r"weight_\w+)",
     "part of a quantised matrix whose other parts are missing, or which config.json (under "
     "quantization_config) does not tell how to read: fetch all files again"),
    (r".*\.bias", "a bias, which Gemma 2 does not have"),
]


def unwrapped(name):
    while (inner := WRAPPERS.sub("", name)) != name:
        name = inner
    return name


def canonical_name(hf_name, holder="the checkpoint"):
    """Our name for one of Hugging Face's; None where it is to be dropped."""
    name = unwrapped(hf_name)
    if name in HF_NAMES:
        return HF_NAMES[name]
    m = re.fullmatch(r"layers\.(0|[1-9]\d{0,4})\.(.+)", name)
    if m and m.group(2) in HF_LAYER_NAMES:
        return "layers.%s.%s" % (m.group(1), HF_LAYER_NAMES[m.group(2)])
    if DROPPED.fullmatch(name):
        return None
    for pattern, meaning in REFUSED:
        if re.fullmatch(pattern, name):
            raise ExportError("%s holds %s, %s" % (holder, hf_name, meaning))
    raise stranger(hf_name, holder=holder)


class HuggingFace(Checkpoint):
    """A directory with config.json and safetensors files, or one of these.  Where config.json is
    missing or says little, the shapes tell the model."""
    what, endings = "Hugging Face safetensors", (".safetensors",)
    # In a directory, where torchtune and others leave an adapter beside the weights
    pattern = re.compile(r"(?!adapter_).*\.safetensors")
    single, index = "model.safetensors", "model.safetensors.index.json"
    read = staticmethod(read_safetensors_header)

    def __init__(self, path):
        self.directory = path if os.path.isdir(path) else os.path.dirname(path) or "."
        self.files = self.files_of(path)
        self.source = "%s, %s" % (self.name(), self.what)
        config = Config(os.path.join(self.directory, "config.json"),
                        optional_json(self.directory, "config.json"))
        if config.doc.get("model_type"):
            refuse_other_models(config)
        stored = stored_tensors(self.files, self.read)
        self.pieces = stored.pop("spiece_model", None)  # as ComfyUI keeps a tokenizer.model
        angles = [stored.pop(n) for n in list(stored) if unwrapped(n) == "freqs_cis"]
        dequantise(stored, config)
        self.tensors = self.collect(stored)
        self.model = (model_of_config(config) if "num_hidden_layers" in config.doc
                      else self.model_of_shapes(angles))
        generation = Config("generation_config.json",
                            optional_json(self.directory, "generation_config.json"))
        self.model.stop_ids += id_list(generation, "eos_token_id")
        self.split_qkv()
        self.files += [config.path] if config.doc else []
        said = config.doc.get("vocab_size")
        rows = self.tensors["embedding"].shape[0] if "embedding" in self.tensors else None
        if None not in (said, rows) and said != rows:
            warn("config.json says vocab_size %s, the embedding has %d rows; the rows count"
                 % (json.dumps(said), rows))

    @staticmethod
    def collect(stored):
        """By our names, those of fused projections included."""
        tensors = Tensors()
        for hf_name, tensor in stored.items():
            name = canonical_name(hf_name)
            if name is None:
                continue
            if isinstance(tensor, Stored) and tensor.dtype not in FLOATS:
                raise ExportError("%s: %s has dtype %s, and neither config.json nor a tensor of "
                                  "scales tells what its numbers mean: convert the original "
                                  "checkpoint, in F32, BF16 or F16"
                                  % (tensor.path, hf_name, tensor.dtype))
            tensors.add(name, tensor, hf_name)
        return tensors

    def model_of_shapes(self, angles):
        """o is [D, NH], qkv [NH + 2 KH, D], gate [F, D]; the angles are [..., H / 2]."""
        found, where = self.tensors, self.files[0]
        kv = "layers.0.k" if "layers.0.k" in found else "layers.0.qkv"
        for name in "layers.0.o", "layers.0.gate", kv:
            if name not in found:
                raise ExportError("%s lacks %s: fetch all files of the checkpoint" % (where, name))
        D, q_rows = found["layers.0.o"].shape
        kv_rows = found[kv].shape[0] - q_rows >> 1 if kv.endswith("qkv") else found[kv].shape[0]
        H = 2 * angles[0].shape[1] if angles else RELEASED.get(D, (0, 0, 0))[2]
        layers = count_layers(found)
        if not H or q_rows % H or kv_rows % H:
            raise ExportError("%s has no config.json that tells its sizes, and its shapes (hidden "
                              "size %d, %d layers, %d rows of q) are not those of 2B, 9B or 27B: "
                              "put the model's config.json beside it" % (where, D, layers, q_rows))
        refuse_gemma_1(found, where)
        return model_of_sizes({"L": layers, "D": D, "N": q_rows // H, "K": kv_rows // H, "H": H,
                               "F": found["layers.0.gate"].shape[0]}, where)

    def split_qkv(self):
        """qkv as q, k and v: all rows of q, then of k, then of v."""
        m, tensors = self.model, self.tensors
        ends = dict(zip("qkv", np.cumsum((m.N * m.H, m.K * m.H, m.K * m.H)).tolist()))
        for name in [n for n in tensors if n.endswith(".qkv")]:
            fused, start = tensors.pop(name), 0
            if fused.shape != (ends["v"], m.D):
                raise ExportError("%s_proj has shape %s where the model makes it %s: the files do "
                                  "not belong together"
                                  % (name, list(fused.shape), [ends["v"], m.D]))
            for c, end in ends.items():
                tensors.add(name[:-3] + c, Ranges(fused, (start, end)), name)
                start = end

    def tokenizer(self):
        if self.pieces is None:
            return super().tokenizer()
        data = self.pieces.raw(0, self.pieces.shape[0]).tobytes()
        return self.pieces.path, sentencepiece_tokenizer(data, self.pieces.path)


# ---- zip archives ------------------------------------------------------------------------


def stored_members(path):
    """Name to (offset, size) of an archive whose members are stored as they are, every claim
    checked."""
    size, found = os.path.getsize(path), {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError):
        raise ExportError("%s is no PyTorch checkpoint, or damaged, or older than PyTorch 1.6 (no "
                          "zip archive): fetch it again, or load and save it with a new torch"
                          % path) from None
    with open(path, "rb") as f:
        for m in members:
            at = m.header_offset if 0 <= m.header_offset < size else size
            f.seek(at)
            local = f.read(30)
            at += 30 + (sum(struct.unpack("<26x2H", local))
                        if local[:4] == b"PK\3\4" and len(local) == 30 else size)
            if (m.compress_type or m.file_size != m.compress_size or at + m.file_size > size
                    or m.filename in found):
                raise ExportError("%s is damaged, or compressed (its member %r): fetch it again"
                                  % (path, m.filename))
            found[m.filename] = at, m.file_size
    return found


# ---- PyTorch -------------------------------------------------------------------------------

TORCH_TYPES = {"Float": "F32", "BFloat16": "BF16", "Half": "F16", "Double": "F64", "Char": "I8",
               "Byte": "U8", "Short": "I16", "Int": "I32", "Long": "I64", "ComplexFloat": "C64",
               "Bool": "BOOL"}  # by storage
TORCH_FLOAT8 = {"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2"}
STATES = "model_state_dict", "state_dict", "model", "module"  # keys of a state dict in a file


class Named:
    """Stands for whatever a pickle names, and for what would come of calling it: it takes any
    contents, and does nothing."""
    __slots__ = "name",

    def __init__(self, name):
        self.name = name

    def __call__(self, *_given):
        return self

    def ignore(self, *_given):
        pass
    __setitem__ = append = extend = add = ignore


class State(dict):
    """A dictionary that takes texts and numbers as keys: to hash others may overflow the stack."""

    def __init__(self, *_given):
        super().__init__()

    def __setitem__(self, key, value):
        if isinstance(key, (str, int)):
            super().__setitem__(key, value)


# A tensor as a pickle describes it: in elements of its storage, which has a type and a key
Torch = collections.namedtuple("Torch", "dtype key start dims strides")


def rebuild_v2(storage, start, dims, strides, _grad, _hooks, *more):
    dtype, key = storage
    return Torch(None if any(more) else dtype, key, start, dims, strides)


def rebuild_v3(storage, start, dims, strides, _grad, _hooks, dtype, *more):
    return Torch(None if any(more) else TORCH_FLOAT8.get(dtype.name), storage[1], start, dims,
                 strides)


class Unpickler(pickle._Unpickler):
    """Python's own in its form in Python, which trusts no size.  All that a pickle can call is
    here: what torch.save names for the tensors of a state."""
    CALLED = {
        "collections.OrderedDict": State,
        "torch._tensor._rebuild_from_type_v2": lambda function, _type, given, _state:
            function(*given),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_v2,
        "torch._utils._rebuild_tensor_v3": rebuild_v3,
    }
    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: lambda self: self.append(State()),
        pickle.EMPTY_SET[0]: lambda self: self.append(Named("set")),
        pickle.NEWOBJ[0]: lambda self: self.stack.pop(),  # made of what, is nothing here
        pickle.NEWOBJ_EX[0]: lambda self: self.stack.__delitem__(slice(-2, None)),
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # nor what attributes it has
    }
    del dispatch[pickle.DICT[0]], dispatch[pickle.FROZENSET[0]]  # which hash and no torch writes

    def find_class(self, module, name):
        name = "%s.%s" % (module, name)
        return self.CALLED.get(name) or Named(name)

    def persistent_load(self, given):
        """The type, None where the tensor tells it, and the key of a storage."""
        _, kind, key, *_ = given
        return TORCH_TYPES.get(kind.name.split(".")[-1].replace("Storage", "")), key


def torch_tensors(path):
    """Name to Stored for the file of a state dict."""
    members = stored_members(path)
    pickles = [n for n in members if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ExportError("%s is no PyTorch checkpoint, or damaged (it holds %d data.pkl): fetch "
                          "it again" % (path, len(pickles)))
    place = pickles[0][:-len("data.pkl")]
    order = read_at(path, *members.get(place + "byteorder", (0, 0))).tobytes()
    offset, size = members[pickles[0]]
    if order not in (b"", b"little") or size > 1 << 24:
        raise ExportError("%s was written on a big-endian machine, or its pickle is too long (%d "
                          "bytes): save the model's state_dict() alone" % (path, size))
    found = attempt("the pickle of " + path, Unpickler(
        io.BytesIO(read_at(path, offset, size))).load)  # nothing that it names is run
    for key in STATES:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if isinstance(found, dict) and all(isinstance(k, str) for k in found):
        return {name: torch_stored(path, name, t, members, place) for name, t in found.items()}
    if isinstance(found, Named):
        raise runs(path, found)
    raise ExportError("%s holds no dictionary of tensors: save the model's state_dict()" % path)


def runs(path, named):
    return ExportError("%s asks to run %s, which no checkpoint needs; nothing was run: get the "
                       "weights from someone you trust, as safetensors" % (path, named.name))


def torch_stored(path, name, t, members, place):
    """Where a tensor lies in its file."""
    def bad(what):
        return ExportError("%s: %s %s: save the model's state_dict() again" % (path, name, what))
    if isinstance(t, Named) and not t.name.startswith("torch._utils._rebuild"):
        raise runs(path, t)
    if not isinstance(t, Torch):
        raise bad("is no plain tensor" if isinstance(t, Named) else "is no tensor")
    dims, strides = t.dims, t.strides
    texts = isinstance(t.dtype, str) and t.dtype in WIDTHS and isinstance(t.key, str)
    if not (texts and isinstance(dims, tuple) and len(dims) <= 8
            and isinstance(strides, tuple) and len(strides) == len(dims)
            and all(map(is_size, (t.start, *dims)))):
        raise bad("is no plain tensor")
    if any(n > 1 and stride != math.prod(dims[i + 1:])
           for i, (n, stride) in enumerate(zip(dims, strides))):
        raise bad("does not lie row by row, but as a view of another tensor; .contiguous() helps")
    at, room = members.get("%sdata/%s" % (place, t.key), (0, -1))
    start, size = t.start * WIDTHS[t.dtype], math.prod(dims) * WIDTHS[t.dtype]
    if start + size > room:
        raise bad("needs bytes that the file does not have")
    return Stored(path, t.dtype, dims, at + start)


class PyTorch(HuggingFace):
    """torch.save of a state dict, with Hugging Face's names or gemma_pytorch's: the latter fuse
    q, k and v into qkv_proj, may be int8 with a weight_scaler, and bring no config."""
    what, endings = "PyTorch", (".ckpt", ".bin", ".pth", ".pt")
    single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"
    # In a directory, where what else a trainer left is no weights
    pattern = re.compile(r"(?!(optimizer|scheduler|scaler|rng_state|recipe_state|training_args|"
                         r"adapter_).*)(pytorch_model.*\.bin|.*-of-\d+\.bin|.*\.(ckpt|pth|pt))")
    read = staticmethod(torch_tensors)


# ---- Quantised checkpoints in Hugging Face's layout -----------------------------------
#
# A quantised matrix [out, in] is several tensors: codes q, and numbers that a block of codes
# shares.  Their names begin with the module's; dequantise() puts one tensor in their place, under
# the name "<module>.weight".
#
#   method              codes                                     w
#   MLX                 bit stream along a row                    s q + b   group of a row
#   GPTQ                bit stream down a column of W^T           s (q - z) group of a row
#   AWQ                 8 columns of W^T in a word, shuffled      s (q - z) group of a row
#   bitsandbytes 4-bit  two to a byte, first one high, flat       s map[q]  run of the flat array
#   bitsandbytes int8   int8                                      s q / 127 row
#   compressed-tensors  bit stream along a row, int8 or float8    s q       group, row, all
#   FP8                 float8                                    s q       row, all
#   gemma_pytorch       int8                                      s q       row
#
# Released so were, for instance, mlx-community's gemma-2-9b-it-4bit, ModelCloud's gemma-2-27b-it-
# gptq-4bit, hugging-quants' gemma-2-9b-it-AWQ-INT4, unsloth's gemma-2-9b-it-bnb-4bit (its scales
# quantised too), neuralmagic's gemma-2-9b-it-quantized.w4a16, .w8a16 and gemma-2-2b-it-FP8 (all
# symmetric).  Other methods and other forms of these, in which no Gemma 2 is known to have been
# released, are refused by name.
#
# Everything is computed in f32, from the numbers as stored.
# ---------------------------------------------------------------------------------------


def unpack_bits(raw, bits, cols):
    """Bytes [n, of a row] to codes [n, cols] of so many bits, the first in the lowest bits.
    Eight codes are `bits` bytes, which a 64-bit word holds."""
    n, eights = len(raw), -(-cols // 8)
    stream = np.zeros((n, eights * bits), np.uint8)
    used = min(raw.shape[1], stream.shape[1])
    stream[:, :used] = raw[:, :used]
    words = np.zeros((n, eights, 8), np.uint8)
    words[:, :, :bits] = stream.reshape(n, eights, bits)
    codes = words.view("<u8") >> np.arange(0, 8 * bits, bits, dtype=np.uint64)
    return (codes & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(n, -1)[:, :cols]


class Bits:
    """Codes of a few bits, each row a bit stream, less a number that all were raised by."""

    def __init__(self, words, bits, cols, less=0):
        self.words, self.bits, self.less = words, bits, less
        self.shape = words.shape[0], cols

    def rows(self, start, stop):
        codes = unpack_bits(self.words.raw(start, stop), self.bits, self.shape[1])
        return codes.astype(np.float32) - np.float32(self.less)


def column_groups(g_idx, size, cols):
    """The group of each column: what g_idx says, else size columns after each other."""
    return np.arange(cols) // size if g_idx is None else g_idx_values(g_idx)


class Scaled:
    """w = (q * scale + bias) * factor.  q is a tensor of codes; scale and bias have one number for
    a block (rows, columns) of them; factor, a number, is of bitsandbytes' int8.  With g_idx, column
    c uses the numbers of group g_idx[c]."""

    def __init__(self, codes, block, scale, bias=None, g_idx=None, factor=None):
        self.codes, self.block, self.shape = codes, block, codes.shape
        self.scale, self.bias, self.g_idx, self.factor = scale, bias, g_idx, factor

    def rows(self, start, stop):
        w = self.codes.rows(start, stop)
        w *= self.spread(self.scale, start, stop)
        if self.bias is not None:
            w += self.spread(self.bias, start, stop)
        return w if self.factor is None else w * self.factor

    def spread(self, grid, start, stop):
        """The number of each weight in these rows."""
        tall, wide = self.block
        first = start // tall
        numbers = grid.rows(first, (stop - 1) // tall + 1)[np.arange(start, stop) // tall - first]
        return numbers[:, column_groups(self.g_idx, wide, self.shape[1])]


class Mapped:
    """bitsandbytes' w = map[code] * scale + offset: the matrix is one array, cut into runs, which
    share a scale, without regard to rows.  Of two codes in a byte the high one is first."""

    def __init__(self, codes, bits, code_map, run, scales, shape, offset=None):
        self.codes, self.bits, self.map, self.run = codes, bits, code_map, run
        self.scales, self.shape, self.offset = scales, shape, offset

    def rows(self, start, stop):
        cols, run = self.shape[1], self.run
        a, b = start * cols, stop * cols
        first, last = a * self.bits // 8, (b * self.bits + 7) // 8
        codes = read_at(self.codes.path, self.codes.offset + first, last - first)
        if self.bits == 4:
            codes = np.stack((codes >> 4, codes & 15), axis=1).reshape(-1)[a % 2:a % 2 + b - a]
        scales = self.scales.rows(a // run, -(-b // run))[np.arange(a, b) // run - a // run, 0]
        w = self.map.rows(0, 1 << self.bits)[:, 0][codes] * scales
        w = w if self.offset is None else w + np.float32(self.offset)
        return w.reshape(stop - start, cols)


class Turned:
    """GPTQ's W^T [in, out], which is read whole.  The codes of a column are a bit stream."""

    def __init__(self, parts, bits, group):
        self.qweight, self.qzeros, self.scales, self.g_idx = (
            parts.get(n) for n in ("qweight", "qzeros", "scales", "g_idx"))
        self.bits, self.group = bits, group
        self.shape = self.scales.shape[1], self.columns()

    def columns(self):
        return self.qweight.shape[0] * 32 // self.bits

    def rows(self, start, stop):
        words, zeros, scales = keep("turned", self.qweight.key, self.load)
        group = column_groups(self.g_idx, self.group, self.shape[1])
        w = self.codes(words, start, stop).astype(np.float32, order="C")
        w -= zeros[:, start:stop].T[:, group]
        w *= scales[:, start:stop].T[:, group]
        return w

    def load(self):
        words = self.qweight.raw(0, self.qweight.shape[0]).view("<u4")
        return words, self.zeros(), self.scales.rows(0, self.scales.shape[0])

    def zeros(self):
        """f32 [groups, out].  The file has each less one, and 0 as all ones."""
        zeros = Bits(self.qzeros, self.bits, self.shape[0]).rows(0, self.qzeros.shape[0])
        return (zeros + 1) % (1 << self.bits)

    def codes(self, words, start, stop):
        """u8 [stop - start, in]"""
        stream = np.ascontiguousarray(words[:, start:stop].T).view(np.uint8)
        return unpack_bits(stream, self.bits, self.shape[1])


class TurnedAwq(Turned):
    """AWQ's: a word has eight outputs of one input."""
    ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where it keeps each of them

    def columns(self):
        return self.qweight.shape[0]

    def zeros(self):
        words = self.qzeros.raw(0, self.qzeros.shape[0]).view("<u4")
        return self.codes(words, 0, self.shape[0]).T.astype(np.float32)

    def codes(self, words, start, stop):
        first = start // 8
        raw = np.ascontiguousarray(words[:, first:-(-stop // 8)])
        codes = unpack_bits(raw.view(np.uint8), 4, raw.shape[1] * 8)
        codes = codes.reshape(len(raw), -1, 8)[:, :, self.ORDER].reshape(len(raw), -1)
        return codes[:, start - 8 * first:stop - 8 * first].T


# ---- From parts to tensors ------------------------------------------------------------

WORDS = "I32", "U32"


class Parts:
    """The stored tensors of one quantised matrix, by what follows the module in their names."""

    def __init__(self, module, found):
        self.module, self.found = module, found

    def bad(self, what):
        return ExportError("%s is a quantised matrix and %s: fetch all files of the checkpoint "
                           "again, or convert the original one" % (self.module, what))

    def get(self, name):
        return self.found.get(name)

    def need(self, name, types, dims=None):
        part = self.found.get(name)
        if part is None:
            raise self.bad("lacks its part %s" % name)
        if part.dtype not in types:
            raise self.bad("its part %s has dtype %s, not %s" % (name, part.dtype,
                                                                 " or ".join(types)))
        if dims is not None and part.dims != tuple(dims):
            raise self.bad("its part %s has shape %s where the others make it %s"
                           % (name, list(part.dims), list(dims)))
        return part

    def matrix(self, name, types):
        part = self.need(name, types)
        if len(part.dims) != 2 or 0 in part.dims:
            raise self.bad("its part %s has shape %s, which is no matrix" % (name, list(part.dims)))
        return part


def g_idx_values(g_idx):
    return g_idx.raw(0, g_idx.shape[0]).view("<i4")[:, 0]


def checked_g_idx(parts, name, cols, groups):
    """The part that names each column's group; None where it says nothing (all 0 or -1)."""
    if parts.get(name) is None:
        return None
    g_idx = parts.need(name, ("I32",), (cols,))
    values = g_idx_values(g_idx)
    if values.min() == -1 or groups > 1 and not values.any():
        return None
    if values.min() < 0 or values.max() >= groups:
        raise parts.bad("its part %s names a group %d of %d"
                        % (name, values.min() if values.min() < 0 else values.max(), groups))
    return g_idx


def mlx_matrix(parts, settings):
    own = settings.doc.get(parts.module)  # layers may have settings of their own
    if isinstance(own, dict):
        settings = Config(settings.path, {**settings.doc, **own})
    check_form(settings, METHODS["mlx"])
    bits = settings.number("bits", None, 1, 8, int)
    group = settings.number("group_size", None, 1, 1 << 20, int)
    words, scales = parts.matrix("weight", WORDS), parts.matrix("scales", FLOATS)
    cols = scales.shape[1] * group
    if words.dims != (scales.shape[0], cols * bits / 32):
        raise parts.bad("its shapes, %s and %s, are not those of %d bits in groups of %d" % (
            list(words.dims), list(scales.dims), bits, group))
    return Scaled(Bits(words, bits, cols), (1, group), scales,
                  parts.need("biases", FLOATS, scales.dims))


def refuse_bias(parts):
    """Some programs that quantise write a bias of zeros."""
    bias = parts.get("bias")
    if bias is not None and (bias.dtype not in FLOATS or bias.rows(0, bias.shape[0]).any()):
        raise parts.bad("has a bias, which Gemma 2 does not have")


def group_size(parts, settings, cols, groups):
    """config.json's if it fits, as matrices may differ, else the columns divided by the groups."""
    size = settings.doc.get("group_size", settings.doc.get("q_group_size"))
    if is_size(size) and size > 0 and -(-cols // size) == groups:
        return size
    if cols % groups:
        raise parts.bad("has %d groups for %d columns" % (groups, cols))
    return cols // groups


def gptq_matrix(parts, settings):
    """bits and group size by the shapes, as config.json may give some layers others."""
    refuse_bias(parts)
    qweight, scales = parts.matrix("qweight", ("I32",)), parts.matrix("scales", FLOATS)
    qzeros = parts.matrix("qzeros", ("I32",))
    groups, out = scales.dims
    bits = qzeros.dims[1] * 32 // out
    if bits not in (4, 8):
        raise parts.bad("its codes have %d bits, where 4 and 8 can be read" % bits)
    cols = qweight.dims[0] * 32 // bits
    if (qzeros.dims != (groups, out * bits / 32) or qweight.dims != (cols * bits / 32, out)
            or groups > cols):
        raise parts.bad("its shapes, %s, %s and %s, do not belong together" % (
            list(qweight.dims), list(qzeros.dims), list(scales.dims)))
    parts.found["g_idx"] = checked_g_idx(parts, "g_idx", cols, groups)
    if groups > 1 and parts.found["g_idx"] is None and settings.doc.get("desc_act"):
        raise parts.bad("has its columns in an order (desc_act) that no part g_idx tells")
    if settings.doc.get("sym") is False and "gptqmodel:" in json.dumps(settings.doc.get("meta")):
        raise parts.bad("was packed by GPTQModel with zeros of its own (sym is false), whose "
                        "borrows cannot be told")
    return Turned(parts, bits, group_size(parts, settings, cols, groups))


def awq_matrix(parts, settings):
    refuse_bias(parts)
    qweight, scales = parts.matrix("qweight", ("I32",)), parts.matrix("scales", FLOATS)
    (cols, words), groups = qweight.dims, scales.dims[0]
    parts.need("qzeros", ("I32",), (groups, words))
    parts.need("scales", FLOATS, (groups, 8 * words))
    if cols % 8 or groups > cols:
        raise parts.bad("has %d groups for %d columns" % (groups, cols))
    return TurnedAwq(parts, 4, group_size(parts, settings, cols, groups))


def block_of(parts, shape, grid):
    """Rows and columns of the blocks that share a number: all, a row or a group of a row."""
    (rows, cols), (tall, wide) = shape, grid
    if tall not in (1, rows) or not wide or cols % wide:
        raise parts.bad("has scales of shape %s for weights of shape %s, where one for all, for a "
                        "row or for a group of a row can be read" % (list(grid), list(shape)))
    return rows // tall, cols // wide


def compressed_matrix(parts, settings):
    """Symmetric: zero points, where there are any, are 0."""
    zeros = parts.get("weight_zero_point")
    groups = typed(settings.doc.get("config_groups"), dict).values()
    said = [w for w in (typed(typed(g, dict).get("weights"), dict) for g in groups) if w]
    if (zeros is None and said and all(w.get("symmetric") is False for w in said)
            or zeros is not None and zeros.raw(0, zeros.shape[0]).any()):
        raise parts.bad("has zero points other than 0 (it is not symmetric), which cannot be read")
    if parts.get("weight_packed") is None:
        codes = parts.matrix("weight", ("F8_E4M3", "I8"))
    else:
        codes = compressed_codes(parts, [w.get("num_bits") for w in said])
    scale = parts.need("weight_scale", FLOATS)
    g_idx = checked_g_idx(parts, "weight_g_idx", codes.shape[1], scale.shape[1])
    return Scaled(codes, block_of(parts, codes.shape, scale.shape), scale, g_idx=g_idx)


def compressed_codes(parts, said):
    """Packed codes, whose width is the one of config.json's that fits the shapes."""
    if parts.get("weight") is not None:
        raise parts.bad("is there both packed and plain")
    words, shape = parts.matrix("weight_packed", ("I32",)), parts.need("weight_shape",
                                                                       ("I64", "I32"), (2,))
    out, cols = map(int, shape.raw(0, 2).view("<i%d" % WIDTHS[shape.dtype])[:, 0])
    widths = [b for b in range(1, 9) if b in said]
    fits = [b for b in widths if words.dims == (out, -(-cols * b // 32))]
    if cols <= 0 or len(fits) != 1:
        raise parts.bad("its shape, %s for weights of shape %s, is not that of codes of %s bits" % (
            list(words.dims), [out, cols], " or ".join(map(str, widths)) or "unknown"))
    bits, = fits
    return Bits(words, bits, cols, 1 << bits - 1)  # stored larger by half their range


def scaled_rows(parts, settings):
    """gemma_pytorch's int8."""
    codes = parts.matrix("weight", ("I8",))
    return Scaled(codes, (1, codes.shape[1]), parts.need("weight_scaler", FLOATS, codes.dims[:1]))


def int8_matrix(parts, settings):
    codes = parts.matrix("weight", ("I8",))
    layout = parts.get("weight_format")
    if layout is not None and layout.raw(0, layout.shape[0]).any():
        raise parts.bad("is laid out for one kind of GPU (weight_format is not 0, \"row\")")
    scale = parts.need("SCB", FLOATS, codes.dims[:1])
    return Scaled(codes, (1, codes.shape[1]), scale, factor=np.float32(1 / 127))


STATE = "weight.quant_state.bitsandbytes__"


def quant_state(parts):
    """The JSON object that goes with a 4-bit matrix."""
    part = next((p for n, p in parts.found.items() if n.startswith(STATE)), None)
    if part is None or part.dtype != "U8" or part.shape[0] > 1 << 16:
        raise parts.bad("lacks its part %snf4" % STATE)
    where = "the quant_state of " + parts.module
    state = Config(where, parse_json(part.raw(0, part.shape[0]).tobytes(), where))
    shape = state.doc.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(is_size(n) and n for n in shape):
        raise state.bad("shape", shape, "two positive numbers")
    return state, tuple(shape)


def run_of(parts, state, key, n, scales):
    """How many numbers share a scale, which n numbers must need as many of as there are."""
    run = state.number(key, None, 1, 1 << 30, int)
    if -(-n // run) != scales.shape[0] or scales.shape[1] != 1:
        raise parts.bad("has %d scales for %d weights in runs of %d" % (scales.shape[0], n, run))
    return run


def four_bit_matrix(parts, settings):
    state, shape = quant_state(parts)
    n = math.prod(shape)
    codes = parts.need("weight", WIDTHS)  # maybe in the guise of another type
    if math.prod(codes.dims) * WIDTHS[codes.dtype] != -(-n // 2):
        raise parts.bad("its codes do not fit a matrix of shape %s" % list(shape))
    absmax = parts.need("weight.absmax", (*FLOATS, "U8"))
    run = run_of(parts, state, "blocksize", n, absmax)
    if parts.get("weight.nested_absmax") is not None:
        n, outer = absmax.shape[0], parts.need("weight.nested_absmax", FLOATS)
        absmax = Mapped(
            parts.need("weight.absmax", ("U8",)), 8,
            parts.need("weight.nested_quant_map", FLOATS, (256,)),
            run_of(parts, state, "nested_blocksize", n, outer), outer, absmax.shape,
            state.number("nested_offset", None, -1e30, 1e30))
    elif absmax.dtype == "U8":
        raise parts.bad("lacks its part weight.nested_absmax")
    return Mapped(codes, 4, parts.need("weight.quant_map", FLOATS, (16,)), run, absmax, shape)


# ---- Methods --------------------------------------------------------------------------

# marker: the part that only a quantised matrix has;  parts: what else belongs to it
Layout = collections.namedtuple("Layout", "marker parts make")
# keys: where config.json names the form;  forms: what can be read
Method = collections.namedtuple("Method", "name keys forms layouts")

QWEIGHT = ["qzeros", "scales", "g_idx", "bias"]
COMPRESSED = ["weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"]
BNB4 = ["weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        STATE + "nf4", STATE + "fp4"]

# Where config.json names none
PLAIN = Method("gemma_pytorch", (), (), [Layout("weight_scaler", ["weight"], scaled_rows)])
METHODS = {  # by quant_method, or what stands for it
    "mlx": Method("MLX", ("mode",), ("affine",), [
        Layout("scales", ["weight", "biases"], mlx_matrix)]),
    "gptq": Method("GPTQ", ("checkpoint_format", "format"), ("gptq",), [
        Layout("qweight", QWEIGHT, gptq_matrix)]),
    "awq": Method("AWQ", ("version", "format"), ("gemm",), [
        Layout("qweight", QWEIGHT, awq_matrix)]),
    "bitsandbytes": Method("bitsandbytes", (), (), [
        Layout("weight.absmax", BNB4, four_bit_matrix),
        Layout("SCB", ["weight", "weight_format"], int8_matrix)]),
    "compressed-tensors": Method("compressed-tensors", ("format",), (
        "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense",
        "mixed-precision"), [Layout("weight_scale", COMPRESSED, compressed_matrix)]),
    "fp8": Method("FP8", (), (), [Layout("weight_scale", ["weight"], compressed_matrix)]),
}


def unreadable(config, by, forms):
    return ExportError("%s: the checkpoint is quantised by %s, which cannot be read (%s can): "
                       "convert the original one, in f32, bf16 or f16" % (
                           config.path, by, ", ".join(forms)))


def check_form(settings, method):
    """The form of a method that config.json names must be one that can be read."""
    named = next((settings.doc[k] for k in method.keys if settings.doc.get(k) is not None), None)
    if named is not None and str(named).lower() not in method.forms:
        raise unreadable(settings, "%s in its form %s" % (method.name, json.dumps(named)),
                         method.forms)


def method_of(config):
    """The Method that config.json names, with its settings."""
    doc, kind = config.doc, None
    found = doc.get("quantization_config") or doc.get("compression_config") or {}
    if isinstance(doc.get("quantization"), dict):  # MLX writes both keys
        kind, found = "mlx", doc["quantization"]
    elif not isinstance(found, dict):
        raise config.bad("quantization_config", found, "an object")
    elif found.get("load_in_4bit") or found.get("load_in_8bit"):  # older ones say no more
        kind = "bitsandbytes"
    kind = found.get("quant_method", kind)
    if kind is None:
        return PLAIN, config
    if not isinstance(kind, str) or kind not in METHODS:
        raise unreadable(config, json.dumps(kind), METHODS)
    settings = Config(config.path, found)
    for key in "transform_config", "sparsity_config", "weight_block_size", "weight_scale_semantics":
        more = found.get(key)  # transformed weights, sparse ones, scales of blocks or inverse
        if more and not (isinstance(more, dict) and more.get("format") == "dense"):
            raise unreadable(config, "%s with a %s" % (kind, key), ["without it"])
    check_form(settings, METHODS[kind])
    return METHODS[kind], settings


def dequantise(stored, config):
    """Puts one tensor in the place of the parts of each quantised matrix."""
    method, settings = method_of(config)
    made = {}  # not yet among what is stored, which the parts of others may be named like
    for marker, names, make in method.layouts:
        for name in [n for n in stored if n.endswith("." + marker)]:
            module = name[:-len(marker) - 1]
            found = {n: stored.pop(module + "." + n)
                     for n in [marker, *names] if module + "." + n in stored}
            made[module + ".weight"] = make(Parts(module, found), settings)
    for name, tensor in made.items():
        stored.add(name, tensor, "quantised")


# ---- Blocks: the formats of GGUF and gemma.cpp ----------------------------------------
#
# A format packs so many weights into so many bytes; its function takes the bytes of some blocks
# and returns their weights as f32.  GGUF's own formats are decoded by the gguf package.
# ---------------------------------------------------------------------------------------


def sfp_values():
    """gemma.cpp's 8-bit floats: 1.mmm * 2^(e - 15) from 2^-7 on, 1.mm * 2^(e - 23) below,
    where bit 6 is clear; the top bit is the sign.  (Byte 128 is never written.)"""
    b = np.arange(128)
    bits = np.where(b < 64, 0x3400 + (b << 5), 0x3800 + (b << 4)) * (b > 0)
    v = bf16_value(bits.astype(np.uint16))
    return np.concatenate((v, -v))


SFP = sfp_values()


# name: (weights, bytes, function) of a block
BLOCKS = {
    "F32": (1, 4, lambda b: b.view("<f4").astype(np.float32, copy=False)),
    "F16": (1, 2, lambda b: b.view("<f2").astype(np.float32)),
    "BF16": (1, 2, lambda b: bf16_value(b.view("<u2"))),
    "SFP": (1, 1, lambda b: SFP[b]),  # gemma.cpp's
}


@functools.lru_cache(maxsize=None)
def block_format(kind):
    """The same for GGUF's formats, too; NotImplementedError for those that gguf cannot decode."""
    if kind in BLOCKS:
        return BLOCKS[kind]
    gguf = gguf_library()
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]

    def values(b):  # as one row: gguf loops over rows
        return gguf.dequantize(b.reshape(1, -1), number)
    values(np.zeros(size, np.uint8))
    return weights, size, values


def gguf_library():
    return library("gguf", "gguf", "a GGUF file")


class Blocks:
    """A tensor whose rows are whole numbers of blocks.  The values are weight * scale + shift."""

    def __init__(self, path, kind, shape, offset, scale=1.0, shift=0.0):
        self.path, self.kind, self.shape, self.offset = path, kind, shape, offset
        self.scale, self.shift = scale, shift

    @staticmethod
    def size(kind, shape):
        """Bytes of such a tensor, None where a row is no whole number of blocks."""
        weights, size, _ = block_format(kind)
        return None if shape[1] % weights else math.prod(shape) // weights * size

    def rows(self, start, stop):
        weights, size, values = block_format(self.kind)
        width = self.shape[1] // weights * size
        raw = read_at(self.path, self.offset + start * width, (stop - start) * width)
        with np.errstate(invalid="ignore", over="ignore"):  # check_values finds them
            w = values(raw).reshape(stop - start, -1)
            if (self.scale, self.shift) != (1.0, 0.0):
                w = w * np.float32(self.scale) + np.float32(self.shift)
        return w


# ---- GGUF -----------------------------------------------------------------------------

GGUF_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
                10: "<u8", 11: "<i8", 12: "<f8"}  # by type of a value
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_HEADER = 1 << 26  # bytes at most, as lists take ten times as many; Gemma's are 6 MB
GGUF_NAMES = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"}
GGUF_LAYER_NAMES = {
    "attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "post_attention_norm": "post_attn_norm", "ffn_norm": "ffn_norm", "ffn_gate": "gate",
    "ffn_up": "up", "ffn_down": "down", "post_ffw_norm": "post_ffn_norm",
}


class GgufHeader:
    """What stands before the data of one file: facts {key: number, bytes or list} and
    tensors {name: Blocks}.  No size is used before the file is seen to be as long."""

    def __init__(self, path):
        self.path, self.at, self.size = path, 0, os.path.getsize(path)
        with open(path, "rb") as self.file:
            n_tensors, n_facts = self.start()
            self.facts = self.named(n_facts, "key", self.value)
            entries = self.named(n_tensors, "tensor", self.entry)
        del self.file
        self.tensors = self.place(entries)

    def bad(self, what):
        return ExportError("%s %s: fetch it again" % (self.path, what))

    def take(self, n):
        most = min(self.size, GGUF_HEADER)
        if n > most - self.at:
            raise self.bad("is no GGUF file, damaged or truncated: its header goes on beyond byte "
                           "%d" % most)
        self.at += n
        data = self.file.read(n)
        if len(data) < n:
            raise self.bad("became shorter while it was read")
        return data

    def numbers(self, numpy_type, n=1):
        data = self.take(n * np.dtype(numpy_type).itemsize)
        return np.frombuffer(data, numpy_type).tolist()

    def start(self):
        if self.take(4) != b"GGUF":
            raise self.bad("is no GGUF file (git lfs pull, if it is a pointer)")
        version, = self.numbers("<u4")
        if version not in (2, 3):
            raise ExportError("%s is GGUF version %d, or big-endian; little-endian files of 2 and "
                              "3 can be read: convert the original checkpoint"
                              % (self.path, version))
        return self.numbers("<u8", 2)

    def named(self, count, what, read):
        """count pairs of a name and what read makes of the bytes after it."""
        if count > 1 << 16:
            raise self.bad("speaks of %d %ss, too many" % (count, what))
        found = {}
        for _ in range(count):
            name = self.text(1024).decode("utf-8", "replace")
            if name in found or not name.isprintable():
                raise self.bad("holds the %s %r, unreadable or for the second time"
                               % (what, name[:100]))
            found[name] = read()
        return found

    def text(self, most=GGUF_HEADER):
        n = int.from_bytes(self.take(8), "little")
        if n > most:
            raise self.bad("has a text of %d bytes, too long" % n)
        return self.take(n)

    def value(self):
        kind, = self.numbers("<u4")
        if kind != GGUF_ARRAY:
            return self.values(kind, 1)[0]
        return self.values(*self.numbers("<u4"), *self.numbers("<u8"))

    def values(self, kind, n):
        if kind == GGUF_STRING:
            return [self.text() for _ in range(n)]
        if kind not in GGUF_NUMBERS:
            raise self.bad("has values of the unknown type %d" % kind)
        return self.numbers(GGUF_NUMBERS[kind], n)

    def entry(self):
        """(dimensions, the row's first; number of the type; offset) of a tensor."""
        n, = self.numbers("<u4")
        if n > 4:
            raise self.bad("has a tensor of %d dimensions" % n)
        return self.numbers("<u8", n), *self.numbers("<u4"), *self.numbers("<u8")

    def place(self, entries):
        """Entries to Blocks, once each is seen to lie in the file and apart from the others."""
        align = self.facts.get("general.alignment", 32)
        if not is_size(align) or not 8 <= align <= 1 << 20 or align & (align - 1):
            raise self.bad("has the alignment %s" % str(align)[:40])
        base, free = round_up(self.at, align), 0
        tensors = {}
        for name, (dims, kind, offset) in sorted(entries.items(), key=lambda e: e[1][2]):
            shape, kind = self.shape(name, dims), self.kind(name, kind)
            size = Blocks.size(kind, shape)
            if size is None:
                raise self.bad("has the tensor %s with rows of %d weights, which %s cannot hold"
                               % (name, shape[1], kind))
            if offset % align or offset < free:
                raise self.bad("has the tensor %s at offset %d, %s" % (
                    name, offset, "off the alignment" if offset % align else "inside another"))
            free = offset + size
            if base + free > self.size:
                raise self.bad("is truncated: %s ends at byte %d and the file has %d"
                               % (name, base + free, self.size))
            tensors[name] = Blocks(self.path, kind, shape, base + offset)
        return tensors

    def shape(self, name, dims):
        while len(dims) > 2 and dims[-1] == 1:
            dims = dims[:-1]
        if len(dims) not in (1, 2) or not all(0 < n < 1 << 40 for n in dims):
            raise self.bad("has the tensor %s with the dimensions %s" % (name, dims))
        return (dims[0], 1) if len(dims) == 1 else (dims[1], dims[0])

    def kind(self, name, number):
        kind = "of the unknown type %d" % number
        try:
            kind = gguf_library().GGMLQuantizationType(number).name
            block_format(kind)
        except (ValueError, AttributeError, NotImplementedError):
            raise ExportError(
                "%s: the tensor %s is %s, which the gguf package cannot decode: python3 -m pip "
                "install --upgrade gguf, or fetch a file of another type, or the original "
                "checkpoint" % (self.path, name, kind)) from None
        return kind


GGUF_SIZES = {
    "L": "block_count", "D": "embedding_length", "N": "attention.head_count",
    "K": "attention.head_count_kv", "H": "attention.key_length", "F": "feed_forward_length",
}
GGUF_FIXED = [  # facts that llama.cpp would follow, and what they are wherever they are told
    ("attention.value_length", "H"), ("rope.dimension_count", "H"),
    ("attention.key_length_swa", "H"), ("attention.value_length_swa", "H"),
    ("rope.freq_base_swa", "theta"),
    ("rope.dimension_count_swa", "H"), ("attention.causal", True), ("rope.scaling.type", "none"),
    ("rope.scaling.factor", 1), ("rope.scale_linear", 1),
]


def refuse_other_ggufs(config):
    kind, arch = (config.doc.get("general." + key) for key in ("type", "architecture"))
    if kind in ("adapter", "mmproj", "imatrix"):
        raise ExportError("%s holds no model (general.type is %s): give the model's file"
                          % (config.path, json.dumps(kind)))
    if arch != "gemma2":
        raise config.bad("general.architecture", arch, ONLY)


def model_of_gguf(config):
    """GGUF knows no query scale: it follows from the shapes."""
    refuse_other_ggufs(config)
    prefix = "gemma2."
    sizes = {letter: config.number(prefix + key, None, *LIMITS[letter], int)
             for letter, key in GGUF_SIZES.items()}
    model = model_of_sizes(sizes, config.path)
    model.rope_theta = float(config.number(prefix + "rope.freq_base", 10000.0, 1e-30, 1e30))
    for key, want in GGUF_FIXED:
        want = {**sizes, "theta": model.rope_theta}.get(want, want)
        if config.doc.get(prefix + key, want) != want:
            raise config.bad(prefix + key, config.doc[prefix + key], json.dumps(want))
    model.context = config.number(prefix + "context_length", 8192, 1, 1 << 30, int)
    model.window = config.number(prefix + "attention.sliding_window", 4096, 1, 1 << 30, int)
    model.eps = config.number(prefix + "attention.layer_norm_rms_epsilon", 1e-6, 0, 1)
    for name, key, default in SOFTCAPS:  # files of the first days lack them
        setattr(model, name, config.softcap(prefix + key, default))
    model.local = gguf_local_layers(config, model.L)
    return model


def gguf_local_layers(config, n_layers):
    """Every layer but each pattern-th, or a list of flags."""
    key = "gemma2.attention.sliding_window_pattern"
    pattern = config.doc.get(key, 2)
    if isinstance(pattern, list) and len(pattern) == n_layers:
        return tuple(bool(p) for p in pattern)
    pattern = config.number(key, 2, 1, 1024, int)
    return tuple(i % pattern < pattern - 1 for i in range(n_layers))


class Gguf(Checkpoint):
    """A GGUF file of llama.cpp, whole or split."""
    facts_in = "its header"

    endings, magic, pattern = (".gguf",), b"GGUF", re.compile(r".*\.gguf")

    def __init__(self, path):
        self.files = self.files_of(path)
        self.directory = os.path.dirname(self.files[0]) or "."
        headers = [GgufHeader(f) for f in self.files]
        facts = headers[0].facts
        config = Config(self.files[0], {
            k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v
            for k, v in facts.items()})
        self.model = model_of_gguf(config)
        self.tensors = self.collect(headers)
        self.own_tokenizer = gguf_tokenizer(config, facts)
        self.model.stop_ids = gguf_stop_ids(config, self.own_tokenizer)
        self.names = {name + "_token": self.own_tokenizer.text(i) for name, i in gguf_ids(
            config, len(self.own_tokenizer)).items()} if self.own_tokenizer else {}
        texts = (config.doc.get(k) for k in ("tokenizer.chat_template", "general.name"))
        self.template, self.title = (t if isinstance(t, str) else None for t in texts)
        kinds = {t.kind for t in self.tensors.values() if t.shape[1] > 1}
        self.source = "%s, GGUF of %s" % (os.path.basename(self.files[0]), ", ".join(sorted(kinds)))

    @staticmethod
    def collect(headers):
        tensors = Tensors()
        for header in headers:
            for name, tensor in header.tensors.items():
                ours = Gguf.canonical_name(name)
                if is_norm(ours):
                    tensor.shift = -1.0  # GGUF keeps 1 + w; for every such f32, less 1 is exact
                tensors.add(ours, tensor, header.path)
        return tensors

    @staticmethod
    def canonical_name(name):
        m = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?(\w+)\.weight", name)
        layer, base = m.groups() if m else (None, None)
        names = GGUF_NAMES if layer is None else GGUF_LAYER_NAMES
        if base not in names:
            raise stranger(name[:100])
        return names[base] if layer is None else "layers.%s.%s" % (layer, names[base])

    def name(self):
        return self.title or re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "",
                                    os.path.basename(self.files[0]))

    def tokenizer(self):
        return self.files[0] if self.own_tokenizer else None, self.own_tokenizer

    def chat_template(self):
        return self.template, self.names


# ---- gemma.cpp's .sbs -----------------------------------------------------------------
#
# Named blobs, back to back.  The first form of the file is header, directory, blobs; the second is
# a header that counts no blobs, blobs, directory, header.  The blob "toc" holds an entry for every
# tensor, "tokenizer" a SentencePiece model.  Files from before 2025 have neither: there the first
# letter of a tensor's name is its type.  The model follows from the width, which must be a
# released one's.

SBS_MAGIC, SBS_ALIGN = 0x0A534253, 256
SBS_TYPES = ["unknown", "F32", "BF16", "SFP", "NUQ", "F64", "U32", "U64", "INT8"]
SBS_PREFIXES = {"F": "F32", "B": "BF16", "$": "SFP", "2": "NUQ", "I": "INT8"}
SBS_NAMES = {  # our name or what several of ours lie in, rows (a sum of products), cols
    "c_embedding": ("embedding", "V", "D"), "c_final_norm": ("final_norm", "D", "1"),
}
SBS_LAYER_NAMES = {
    "pre_att_ns": ("attn_norm", "D", "1"), "post_att_ns": ("post_attn_norm", "D", "1"),
    "pre_ff_ns": ("ffn_norm", "D", "1"), "post_ff_ns": ("post_ffn_norm", "D", "1"),
    "qkv_ein": ("qkv", "NH+KH+KH", "D"), "qkv1_w": ("q", "NH", "D"), "qkv2_w": ("kv", "KH+KH", "D"),
    "att_ein": ("o_heads", "ND", "H"), "att_w": ("o", "D", "NH"),
    "gating_ein": ("gating", "F+F", "D"), "gating1_w": ("gate", "F", "D"),
    "gating2_w": ("up", "F", "D"), "linear_w": ("down", "D", "F"),
}
SBS_LAYER = re.compile(r"(.+)_(0|[1-9]\d{0,3})")
SBS_SCALED = "att_ein", "qkv_ein", "gating_ein", "linear_w"  # in the order of old files' scales


class HeadColumns:
    """[D, N * H] of a tensor [N * D, H]."""

    def __init__(self, tensor, N):
        self.tensor, self.N = tensor, N
        self.shape = tensor.shape[0] // N, tensor.shape[1] * N

    def rows(self, start, stop):
        D = self.shape[0]
        return np.concatenate([self.tensor.rows(n * D + start, n * D + stop)
                               for n in range(self.N)], axis=1)


def read_sbs_blobs(path):
    """Name to (offset, bytes) of every blob, which fill the file without a gap."""
    def bad(what):
        return ExportError("%s %s: fetch it again" % (path, what))
    def header(at):
        f.seek(at)
        return struct.unpack("<IIQ", f.read(16))
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if size < 48 or header(0)[0] != SBS_MAGIC:
            raise bad("is no gemma.cpp file (git lfs pull, if it is a pointer)")
        last = 0 if header(0)[1] else size - 16  # where the header that counts is
        magic, n, bytes_told = header(last)
        if magic != SBS_MAGIC:
            raise bad("is damaged or truncated: it does not end in a header")
        directory = last - 32 * n if last else 16
        if not 0 < n <= 1 << 14 or directory < 16 or directory + 32 * n > size:
            raise bad("speaks of %d blobs, which it cannot hold" % n)
        if bytes_told != size:
            raise bad("is truncated or too long: it has %d bytes where %d should be"
                      % (size, bytes_told))
        f.seek(directory)
        keys, ranges = f.read(16 * n), struct.unpack("<%dQ" % (2 * n), f.read(16 * n))
    first, end = (SBS_ALIGN, directory) if last else (round_up(16 + 32 * n, SBS_ALIGN), size)
    blobs = {}
    for i, (offset, length) in enumerate(zip(ranges[::2], ranges[1::2])):
        name = keys[16 * i:16 * i + 16].rstrip(b"\0").decode("ascii", "replace")
        if name in blobs or not name.isprintable():
            raise bad("holds the blob %r, unreadable or for the second time" % name)
        if offset != first or not length or offset + length > end:
            raise bad("has the blob %s at offset %d, not at %d, or beyond its end"
                      % (name, offset, first))
        blobs[name] = offset, length
        first = round_up(offset + length, SBS_ALIGN)
    return blobs


def sbs_entries(path, blobs):
    """Name to (type, weights, scale) of every tensor."""
    if "toc" not in blobs:
        return old_sbs_entries(path, blobs)
    offset, size = blobs["toc"]
    words, at, found = read_at(path, offset, min(size, 1 << 24) & -4).view("<u4"), 0, {}
    try:
        while at < len(words):  # a count of words, a count of words of the name, the name ...
            entry = words[at + 1:at + 1 + int(words[at])]
            name, rest = entry[1:1 + int(entry[0])], entry[1 + int(entry[0]):]
            name = name.tobytes().rstrip(b"\0").decode("ascii")
            kind, _, _, rows, cols = rest[:5].tolist()
            scale = rest[5:6].view("<f4").item()
            if name in found or not name.isprintable() or not math.isfinite(scale):
                raise ValueError
            found[name] = SBS_TYPES[kind], rows * cols, scale
            at += 1 + len(entry)
    except (ValueError, IndexError):
        raise ExportError("%s: its table of tensors is damaged after %d entries: fetch it again"
                          % (path, len(found))) from None
    return found


def old_sbs_entries(path, blobs):
    """The same for a file from before 2025, from names and sizes of the blobs.  Fscales has one
    for each of SBS_SCALED, layer by layer."""
    found = {}
    for name, (_, size) in blobs.items():
        kind = SBS_PREFIXES.get(name[:1])
        if kind and name != "Fscales":  # a kind that cannot be read is refused later, by name
            sbs_role(path, name)
            found[name] = kind, size // BLOCKS.get(kind, (1, 1))[1], 1.0
    if "Fscales" not in blobs:
        return found
    offset, size = blobs["Fscales"]
    layers = 1 + max((int(m.group(2)) for m in map(SBS_LAYER.fullmatch, found) if m), default=-1)
    if size != 16 * layers:
        raise ExportError("%s: it has %d layers and %d bytes of scales: fetch it again"
                          % (path, layers, size))
    names = ["%s_%d" % (base, layer) for layer in range(layers) for base in SBS_SCALED]
    scales = dict(zip(names, read_at(path, offset, size).view("<f4").tolist()))
    return {name: (kind, weights, scales.get(name[1:], 1.0))
            for name, (kind, weights, _) in found.items()}


def model_of_sbs(path, found):
    weights = {sbs_role(path, name)[0]: entry[1] for name, entry in found.items()}
    D = weights.get("final_norm", 0)
    if D not in RELEASED:
        raise ExportError("%s has the width %d, which no released Gemma 2 has: is it another model?"
                          % (path, D))
    gates = weights.get("layers.0.gating", 0) or 2 * weights.get("layers.0.gate", 0)
    N, K, H = RELEASED[D]
    return model_of_sizes({"L": count_layers(weights), "D": D, "N": N, "K": K, "H": H,
                           "F": gates // (2 * D)}, path)


def sbs_role(path, name):
    """Our name and the shape; a letter for the type may stand before theirs."""
    for base in (name, name[1:] if name[:1] in SBS_PREFIXES else name):
        m = SBS_LAYER.fullmatch(base)
        if base in SBS_NAMES:
            return SBS_NAMES[base]
        if m and m.group(1) in SBS_LAYER_NAMES:
            ours, rows, cols = SBS_LAYER_NAMES[m.group(1)]
            return "layers.%s.%s" % (m.group(2), ours), rows, cols
    raise stranger(name, holder=path)


class Sbs(Checkpoint):
    """A file of gemma.cpp."""
    facts_in = "its width"

    endings, pattern = (".sbs",), re.compile(r".*\.sbs")

    def __init__(self, path):
        path = self.files_of(path)[0]
        self.files, self.directory = (path,), os.path.dirname(path) or "."
        self.blobs = read_sbs_blobs(path)
        found = sbs_entries(path, self.blobs)
        self.model = model_of_sbs(path, found)
        self.tensors = Tensors()
        for name, entry in found.items():
            self.add(path, name, *entry)
        for layer in range(self.model.L):
            self.split("layers.%d." % layer)
        kinds = {t.kind for t in self.tensors.values() if isinstance(t, Blocks) and t.shape[1] > 1}
        self.source = "%s, gemma.cpp file of %s" % (os.path.basename(path),
                                                    ", ".join(sorted(kinds)))

    def add(self, path, name, kind, weights, scale):
        """Blocks for one entry, after what it says is held against the blob's size."""
        if name not in self.blobs:
            raise ExportError("%s: its table of tensors names %r, which is no blob: fetch it again"
                              % (path, name))
        ours, rows, cols = sbs_role(path, name)
        cols = self.model.dimension(cols)
        rows = weights // cols if rows == "V" else sum(map(self.model.dimension, rows.split("+")))
        if kind not in BLOCKS:
            raise ExportError("%s: the tensor %s is %s, which cannot be read: fetch the "
                              "file in SFP, BF16 or F32" % (path, name, kind))
        offset, size = self.blobs[name]
        if rows * cols != weights or Blocks.size(kind, (rows, cols)) != size:
            raise ExportError("%s: the tensor %s has %d weights of %s in %d bytes where the model "
                              "makes it %d x %d: fetch it again"
                              % (path, name, weights, kind, size, rows, cols))
        self.tensors.add(ours, Blocks(path, kind, (rows, cols), offset, scale), name)

    def split(self, layer):
        """Puts what lies together in theirs under our names."""
        N, K, H, F = (getattr(self.model, n) for n in "NKHF")

        def heads(t, base):  # k and v lie as k v k v
            return Ranges(t, *((at, at + H) for at in range(base, base + 2 * K * H, 2 * H)))
        parts = {
            "qkv": lambda t: {"q": Ranges(t, (0, N * H)), "k": heads(t, N * H),
                              "v": heads(t, N * H + H)},
            "kv": lambda t: {"k": heads(t, 0), "v": heads(t, H)},
            "gating": lambda t: {"gate": Ranges(t, (0, F)), "up": Ranges(t, (F, 2 * F))},
            "o_heads": lambda t: {"o": HeadColumns(t, N)},
        }
        for name in parts:
            tensor = self.tensors.pop(layer + name, None)
            for ours, part in (parts[name](tensor) if tensor else {}).items():
                self.tensors.add(layer + ours, part, name)

    def name(self):
        return re.sub(r"\.sbs$", "", os.path.basename(self.files[0]))

    def tokenizer(self):
        """The blob of that name; for old files what lies beside them."""
        offset, size = self.blobs.get("tokenizer", (0, 0))
        if 16 < size < 1 << 28:  # gemma.cpp writes a word where it has none
            data = read_at(self.files[0], offset, size).tobytes()
            return self.files[0], sentencepiece_tokenizer(data, self.files[0])
        return tokenizer_of_directory(self.directory)

    def chat_template(self):
        return None, {}


# ---- arrays of more axes -----------------------------------------------------------------
#
# Keras's and Flax's checkpoints say little about the model: the shapes of their arrays do.  Heads
# are an axis of their own, and most matrices are transposed.  The tables below name the axes of an
# array by the letters of its dimensions: "NDH" is q, whose rows run over N and H and whose columns
# run over D.


class Rearranged:
    """A matrix over the axes of an array.  letters names the axes of the array, rows and cols
    the axes that rows and columns run over; fixed {axis: index} picks one of the others.  The
    array has dims, dtype, key and read(box)."""
    BLOCK = 1 << 24    # bytes to read at once

    def __init__(self, array, letters, rows, cols, fixed):
        self.array, self.fixed = array, fixed
        self.row_axes = [letters.index(c) for c in rows]
        self.col_axes = [letters.index(c) for c in cols if c != "1"]
        self.inner = math.prod(array.dims[i] for i in self.row_axes[1:])
        self.shape = (array.dims[self.row_axes[0]] * self.inner,
                      math.prod(array.dims[i] for i in self.col_axes))
        width = WIDTHS[array.dtype] * self.inner * self.shape[1]
        self.step = max(1, self.BLOCK // max(width, 1))

    def block(self, number):
        """Rows of steps of the leading row axis, [rows, cols] in the stored type."""
        def read():
            box = [(0, n) for n in self.array.dims]
            lead, first = self.row_axes[0], number * self.step
            box[lead] = first, min(first + self.step, self.array.dims[lead])
            for axis, i in self.fixed.items():
                box[axis] = i, i + 1
            order = [*self.fixed, *self.row_axes, *self.col_axes]
            found = self.array.read(box).transpose(order)
            return np.ascontiguousarray(found).reshape(-1, self.shape[1])
        return keep("block", (self.array.key, tuple(self.fixed.items()), number), read)

    def touched(self, chunk):
        """Bytes of all chunks of these sizes that one block lies in."""
        sizes = [c if i in self.fixed else round_up(d, c)
                 for i, (d, c) in enumerate(zip(self.array.dims, chunk))]
        lead = self.row_axes[0]
        sizes[lead] = min(sizes[lead], round_up(self.step, chunk[lead]) + chunk[lead])
        return math.prod(sizes) * WIDTHS[self.array.dtype]

    def rows(self, start, stop):
        out = np.empty((stop - start, self.shape[1]), np.float32)
        to_f32, tall, at = FLOATS[self.array.dtype][1], self.step * self.inner, start
        while at < stop:
            skip = at % tall
            n = min(stop - at, tall - skip)
            out[at - start:at - start + n] = to_f32(self.block(at // tall)[skip:skip + n])
            at += n
        return out


ROLE_AXES = {name: (rows, cols) for name, _, rows, cols in ROLES + LAYER_ROLES}


class Axes:
    """Collects arrays as tensors and, from their shapes, the sizes of the model."""

    def __init__(self, what):
        self.what, self.tensors, self.sizes = what, Tensors(), {}

    def add(self, name, where, array, letters, fixed=None):
        """Takes an array as the tensor that name says; where names it in messages."""
        fixed = fixed or {}
        if array.dtype not in FLOATS:
            raise ExportError("%s has type %s: convert the original checkpoint, in f32, bf16 or "
                              "f16" % (where, array.dtype))
        if len(array.dims) != len(letters):
            raise ExportError("%s has shape %s and not %d axes: is this a Gemma 2 checkpoint?"
                              % (where, list(array.dims), len(letters)))
        for axis, letter in enumerate(letters):
            known, first = self.sizes.setdefault(letter, (array.dims[axis], where))
            if known != array.dims[axis] and axis not in fixed:
                raise ExportError("%s makes %s %d, but %s makes it %d: the files do not belong "
                                  "together" % (where, letter, array.dims[axis], first, known))
        rows, cols = ROLE_AXES[name.split(".")[-1]]
        self.tensors.add(name, Rearranged(array, letters, rows, cols, fixed), where)

    def model(self):
        refuse_gemma_1(self.tensors, self.what)
        sizes = {letter: size for letter, (size, _) in self.sizes.items()}
        return model_of_sizes({"L": count_layers(self.tensors), **sizes}, self.what)


def refuse_gemma_1(names, what):
    if any(n.endswith(".o") for n in names) and not any(n.endswith("post_ffn_norm") for n in names):
        raise ExportError("%s has no post-norms: it is Gemma 1, or another model; only Gemma 2 can "
                          "be converted" % what)


# ---- Keras -----------------------------------------------------------------------------------

# Path within the backbone, without the last "/vars/0", to our name and axes
KERAS_NAMES = {"reversible_embedding": ("embedding", "VD"),
               "rms_normalization": ("final_norm", "D")}
KERAS_LAYER_NAMES = {
    "pre_attention_norm": ("attn_norm", "D"), "attention/query_dense": ("q", "NDH"),
    "attention/key_dense": ("k", "KDH"), "attention/value_dense": ("v", "KDH"),
    "attention/output_dense": ("o", "NHD"), "post_attention_norm": ("post_attn_norm", "D"),
    "pre_ffw_norm": ("ffn_norm", "D"), "gating_ffw": ("gate", "DF"), "gating_ffw_2": ("up", "DF"),
    "ffw_linear": ("down", "FD"), "post_ffw_norm": ("post_ffn_norm", "D"),
}
KERAS_STATE = re.compile(r"(optimizer|_?metrics|compile_metrics|loss_tracker)\b.*")
# What Gemma 2's config.json says of GemmaBackbone beside sizes, which the weights tell
KERAS_FACTS = {
    "use_post_ffw_norm": True, "use_post_attention_norm": True,
    "use_sliding_window_attention": True, "sliding_window_size": 4096,
    "attention_logit_soft_cap": 50, "final_logit_soft_cap": 30, "layer_norm_epsilon": 1e-6,
}


def keras_name(path):
    """(our name, axes) of a dataset; None where it is no weight."""
    name = path.replace("_layer_checkpoint_dependencies/", "layers/")
    m = re.fullmatch(r"(?:layers/gemma_backbone/|backbone/)?layers/(.+)/vars/0", name)
    inner = m.group(1) if m else ""
    if inner in KERAS_NAMES:
        return KERAS_NAMES[inner]
    m = re.fullmatch(r"gemma_decoder_block(?:_([1-9]\d{0,4}))?/(.+)", inner)
    if m and m.group(2) in KERAS_LAYER_NAMES:
        name, axes = KERAS_LAYER_NAMES[m.group(2)]
        return "layers.%s.%s" % (m.group(1) or 0, name), axes
    if KERAS_STATE.match(path):
        return None
    raise stranger(path, "Keras's Gemma 2")


def h5_add(axes, path, name, item):
    """Takes one dataset.  Keras keeps bf16 as two opaque bytes and says so beside them."""
    ours, letters = keras_name(name) or (None, None)
    if ours is None:
        return
    dtype = {"<f4": "F32", "<f2": "F16"}.get(item.dtype.str, item.dtype.str)
    if dtype == "|V2" and "dtype" in item.attrs and item.attrs["dtype"] == "bfloat16":
        dtype = "BF16"
    dims, at = tuple(map(int, item.shape or ())), item.id.get_offset()
    if at is None or item.chunks or item.external or item.is_virtual:
        raise ExportError("%s: %s does not lie in the file as one piece, as Keras writes it: load "
                          "and save it with Keras" % (path, name))
    if not 0 <= at <= os.path.getsize(path) - math.prod(dims) * item.dtype.itemsize:
        raise ExportError("%s is truncated: %s needs bytes that it does not have: fetch it again"
                          % (path, name))
    axes.add(ours, "%s: %s" % (path, name), Stored(path, dtype, dims, at), letters)


class Keras(Checkpoint):
    """A preset of keras-hub (config.json, *.weights.h5, assets), or one .weights.h5."""

    endings, pattern = (".weights.h5",), re.compile(r".*\.weights\.h5")
    # A map tells the files of each group of variables, one or several
    single, index = "model.weights.h5", "model.weights.json"

    def __init__(self, path):
        self.directory = path if os.path.isdir(path) else os.path.dirname(path) or "."
        files = self.files_of(path)
        self.source = "%s, Keras" % self.name()
        axes = Axes(files[0])
        for file in files:
            attempt(file, lambda: self.read(axes, file))
        config = os.path.join(self.directory, "config.json")
        self.files = [*files, config, os.path.join(self.directory, self.index)]
        self.tensors, self.model = axes.tensors, axes.model()
        if os.path.isfile(config):
            self.check_facts(config, read_json(config))

    @staticmethod
    def read(axes, path):
        h5py = library("h5py", "h5py", "a Keras checkpoint")

        def visit(name, item):  # follows no link that leads elsewhere
            if isinstance(item, h5py.Dataset):
                h5_add(axes, path, str(name), item)  # b'...' where it is no UTF-8
        with open(path, "rb") as f, h5py.File(f, "r") as h5:
            h5.visititems(visit)

    def check_facts(self, path, doc):
        backbone = find_backbone(doc)
        if backbone is None or not isinstance(backbone.get("config"), dict):
            raise ExportError("%s describes no GemmaBackbone (%s): only Gemma 2 can be converted"
                              % (path, json.dumps(doc.get("class_name"))[:80]))
        for key, want in KERAS_FACTS.items():
            said = backbone["config"].get(key)
            if said != want:
                raise ExportError("%s: %s is %s, and %s in Gemma 2 as released: this is Gemma 1, "
                                  "or another model; only Gemma 2 can be converted"
                                  % (path, key, json.dumps(said)[:80], json.dumps(want)))
        if not backbone["config"].get("query_head_dim_normalize", True):
            self.model.query_scale = scale_of(max(self.model.D // self.model.N, 1))


def find_backbone(doc, depth=8):
    """The description of a GemmaBackbone, which a task's description holds inside."""
    if not isinstance(doc, dict) or not depth:
        return None
    if doc.get("class_name") == "GemmaBackbone":
        return doc
    return next(filter(None, (find_backbone(v, depth - 1) for v in doc.values())), None)


# ---- Flax, written by Orbax --------------------------------------------------------------------

# Path without a last "/w", to our names and axes; "2" counts several tensors, and "x" and "y"
# are D and F in either order
FLAX_NAMES = {"embedder/input_embedding": (("embedding",), "VD"),
              "final_norm/scale": (("final_norm",), "D")}
FLAX_LAYER_NAMES = {
    "pre_attention_norm/scale": (("attn_norm",), "D"), "attn/q_einsum": (("q",), "NDH"),
    "attn/kv_einsum": (("k", "v"), "2KDH"), "attn/attn_vec_einsum": (("o",), "NHD"),
    "post_attention_norm/scale": (("post_attn_norm",), "D"),
    "pre_ffw_norm/scale": (("ffn_norm",), "D"), "mlp/gating_einsum": (("gate", "up"), "2xy"),
    "mlp/linear": (("down",), "FD"), "post_ffw_norm/scale": (("post_ffn_norm",), "D"),
}
FLAX_STATE = re.compile(r"(opt_state|optimizer|step|collections)(/.*)?")
PADDED_ROWS, REAL_ROWS = 256128, 256000  # of the embedding as Flax has it: the rest is unused


def flax_add(axes, path, array):
    """One parameter, whose tree keys are joined by points or slashes and may be wrapped, to the
    tensors it holds."""
    name = re.sub(r"^((params|transformer)/)+", "", path.replace(".", "/"))
    name = re.sub(r"/w$", "", name)
    m = re.fullmatch(r"(layer_(0|[1-9]\d{0,4})/)?(.+)", name)
    names, letters = (FLAX_LAYER_NAMES if m[1] else FLAX_NAMES).get(m[3], (None, None))
    if names is None:
        raise stranger(path)
    if "x" in letters:
        letters = letters.replace("xy", flax_gating(path, array, axes))
    if len(names) == 2 and array.dims[:1] != (2,):
        raise ExportError("%s has shape %s, and should hold %s: is this a Gemma 2 checkpoint?"
                          % (path, list(array.dims), " and ".join(names)))
    for i, role in enumerate(names):
        axes.add("layers.%s.%s" % (m[2], role) if m[1] else role, path, array, letters,
                 {0: i} if len(names) == 2 else {})


def flax_gating(path, array, axes):
    """[2, D, F] in 2B, [2, F, D] in 9B and 27B; linear, which is [F, D], tells D from F."""
    D, F = (axes.sizes.get(c, (None,))[0] for c in "DF")
    if D and D == F:
        raise ExportError("%s could lie either way, as %d is both its hidden and its feed-forward "
                          "size: convert from another format" % (path, D))
    return "DF" if array.dims[-2:] == (D, F) else "FD"


class Zarr:
    """An array in a store that tensorstore reads: chunk files, or entries of an OCDBT store."""
    cache = 0  # bytes of decoded chunks to keep, as blocks are smaller

    def __init__(self, store, name, driver):
        self.spec = {"driver": driver, "kvstore": {**store, "path": store.get("path", "") + name},
                     "fill_missing_data_reads": False, "recheck_cached_data": False}
        self.where, self.key = name.rstrip("/"), json.dumps(self.spec)
        array = self.open()
        self.dims = tuple(map(int, array.shape))
        self.chunk = tuple(map(int, array.chunk_layout.read_chunk.shape or ()))  # None: no axes
        self.dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(
            array.dtype.name, array.dtype.name)

    def open(self):
        """The array, with the cache of its chunks; a process keeps the last one open."""
        def opened():
            tensorstore = tensorstore_library()
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": self.cache}})
            return attempt(self.where, lambda: tensorstore.open(
                self.spec, open=True, read=True, context=context).result())
        return keep("zarr", (os.getpid(), self.key, self.cache), opened)

    def read(self, box):
        window = self.open()[tuple(slice(a, b) for a, b in box)]
        found = attempt(self.where, lambda: window.read().result())
        return found.view(FLOATS[self.dtype][0])


def tensorstore_library():
    return library("tensorstore", "tensorstore", "a Flax checkpoint")


def orbax_directories(path):
    """Where a checkpoint lies: here, or in a directory of this one, as Kaggle ships it."""
    places = [path] + [os.path.join(path, n) for n in sorted(os.listdir(path))]
    found = [p for p in places if any(os.path.isfile(os.path.join(p, n)) for n in (
        "_METADATA", "manifest.ocdbt", "checkpoint"))]
    return found[:1] if path in found else found


class Orbax(Checkpoint):
    """A directory that Orbax wrote, flat, nested or wrapped, OCDBT or plain zarr."""
    start_method = "spawn"  # tensorstore's threads do not survive a fork
    CACHES = 3 << 30        # bytes of chunks in all processes, where one leaves room for more
    ROOM = 1 << 25          # for what else a cache holds, as a full one keeps nothing
    SPARE = 1 << 26         # bytes by which a chunk may be larger than its array

    files_of = staticmethod(orbax_directories)

    def __init__(self, path):
        found = orbax_directories(path)
        if len(found) > 1:
            raise ExportError("%s holds several checkpoints (%s, %s ...): give one of them"
                              % (path, found[0], found[1]))
        self.directory, self.place = path, found[0]
        self.source = "%s, Flax" % self.name()
        self.files = [os.path.join(d, n) for d, _, names in os.walk(self.place) for n in names]
        arrays = self.arrays()
        axes = Axes(self.place)
        # gating_einsum last: which of its axes is D, the others tell
        for name in sorted(arrays, key=lambda n: ("gating" in n, n)):
            flax_add(axes, name, arrays[name])
        self.tensors, self.model = axes.tensors, axes.model()
        for t in self.tensors.values():
            t.array.cache = t.touched(t.array.chunk) + self.ROOM
        # A chunk that is being decoded is there twice
        self.most_jobs = max(1, self.CACHES // (2 * max(a.cache for a in arrays.values())))
        embedding = self.tensors.get("embedding")
        if embedding and embedding.shape[0] == PADDED_ROWS:
            self.tensors["embedding"] = Ranges(embedding, (0, REAL_ROWS))

    def arrays(self):
        """Parameter name to Zarr."""
        tensorstore = tensorstore_library()
        base = {"driver": "file", "path": os.path.join(os.path.abspath(self.place), "")}
        store = base
        if os.path.isfile(os.path.join(self.place, "manifest.ocdbt")):
            store = {"driver": "ocdbt", "base": base}
        keys = attempt(self.place, lambda: tensorstore.KvStore.open(store).result().list().result())
        found = {}
        for key in keys:
            name, _, last = os.fsdecode(key).rpartition("/")
            if last in ZARR_DRIVERS and not FLAX_STATE.fullmatch(name.replace(".", "/")):
                found[name] = Zarr(store, name + "/", ZARR_DRIVERS[last])
        if not found:
            raise ExportError("%s holds no arrays: fetch all files of the checkpoint" % self.place)
        for name, a in found.items():
            if math.prod(a.chunk) > math.prod(a.dims) + self.SPARE // WIDTHS.get(a.dtype, 8):
                raise ExportError("%s: %s has shape %s, but chunks of %s, which only waste memory: "
                                  "save it again" % (self.place, name, list(a.dims), list(a.chunk)))
        return found

    def tokenizer(self):
        """Kaggle puts it beside the checkpoint's directory."""
        for directory in dict.fromkeys((self.directory, self.place,
                                        os.path.dirname(os.path.abspath(self.place)))):
            path, tokenizer = tokenizer_of_directory(directory)
            if tokenizer:
                return path, tokenizer
        return None, None


ZARR_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # by the file that describes an array

READERS = [HuggingFace, Gguf, Sbs, Keras, Orbax, PyTorch]  # the first that suits a path reads it

# ---- Hugging Face's hub ---------------------------------------------------------------

HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
WEIGHTS = [".safetensors", ".gguf", ".bin", ".ckpt", ".pth", ".pt", ".h5", ".sbs"]  # best first
BESIDE = ".json", ".jinja", ".model", ".spm"  # settings, indices, tokenizer

def hub_files(name, names, with_weights):
    """Of a repository's files the weights in one format and what describes them; all files of a
    format that is a tree of directories."""
    top = sorted(n for n in names if "/" not in n)
    beside = [n for n in top if n.endswith(BESIDE)] + [n for n in names if n in PIECE_FILES]
    if not with_weights:
        return beside
    for ending in WEIGHTS:
        weights = [n for n in top if n.endswith(ending)]
        if len(weights) > 1 and ending == ".gguf" and not re.search(r"-of-\d+\.gguf", weights[0]):
            raise ExportError("%s holds %d GGUF files: fetch one (hf download %s %s) and give its "
                              "path" % (name, len(weights), name, weights[0]))
        if weights:
            return weights + beside
    return names


def hub_snapshot(name, revision, with_weights):
    """The directory of a repository that is fetched, or found in the cache."""
    hub = library("huggingface_hub", "huggingface_hub",
                  name + " is no path here and, as a name on huggingface.co,")
    wanted, offline = ["config.json"], {"local_files_only": True}
    try:
        info = hub.HfApi().model_info(name, revision=revision)
        files = hub_files(name, [f.rfilename for f in info.siblings], with_weights)
        wanted, offline = [n.replace("[", "[[]") for n in files], {}
    except ExportError:
        raise
    except Exception as e:  # no network, or no leave: the cache may do
        refused = e
    try:
        return hub.snapshot_download(name, revision=revision, allow_patterns=wanted, **offline)
    except Exception as e:  # the library's own, httpx's or requests', the system's
        e = refused if offline else e
        said = " ".join(str(e).split())[:300]
        raise ExportError(
            "%s is no path here or in the cache, and huggingface.co does not give it (%s: %s): "
            "check the spelling, accept its licence at https://huggingface.co/%s and `hf auth "
            "login` if it is gated or private, or give a directory"
            % (name, type(e).__name__, said, name)) from None


def located(path, what, with_weights=True):
    """The path itself if something is there.  A path that can be a name on huggingface.co,
    org/name or org/name@revision, becomes the path of the files fetched from there."""
    if os.path.exists(path):
        return path
    if not HUB_NAME.fullmatch(path):
        raise ExportError("%s does not exist: give %s, or a name on huggingface.co, as "
                          "google/gemma-2-2b-it" % (path, what))
    return hub_snapshot(*HUB_NAME.fullmatch(path).groups(), with_weights)


def open_checkpoint(path):
    path = located(path, "the directory of a Gemma 2 checkpoint, its file")
    names = os.listdir(path) if os.path.isdir(path) else []
    if "adapter_config.json" in names and not any(
            n.endswith(tuple(WEIGHTS)) and not n.startswith("adapter_model.") for n in names):
        raise ExportError("%s is a LoRA adapter: give the directory of its base model, and the "
                          "adapter with --lora" % path)
    for reader in READERS:
        if reader.suits(path):
            return reader(path)
    raise ExportError("%s holds no weights in a form that is known here (*.safetensors, *.gguf, "
                      "*.bin, *.ckpt, *.weights.h5, *.sbs, Orbax): give the directory of a Gemma 2 "
                      "checkpoint, and of an archive (.zip, .tar.gz, .keras) what is in it" % path)


def check_limits(model):
    for name, (least, most) in LIMITS.items():
        value = getattr(model, name)
        value = value if name == "rope_theta" else float(np.float32(value))  # as it is stored
        if not (least <= value <= most or value == 0 and name.endswith("softcap")):
            raise ExportError("the checkpoint's %s is %.10g, and %.10g to %.10g can be converted"
                              % (name, value, least, most))


def check_shapes(reader):
    """Sets V from the embedding; refuses missing, surplus and wrongly shaped tensors."""
    model = reader.model
    if "embedding" not in reader.tensors:
        raise ExportError("the checkpoint lacks the embedding: fetch all of its files")
    model.V = reader.tensors["embedding"].shape[0]
    if "score" in reader.tensors:
        model.S = reader.tensors["score"].shape[0]
        if model.S > 1024:
            raise ExportError("score.weight gives %d scores, and 1 to 1024 can be converted"
                              % model.S)
    check_limits(model)
    table = tensor_table(model)
    missing = [n for n in table if n not in reader.tensors and n != "head"]
    if missing:
        raise ExportError("the checkpoint lacks %d tensors, the first is %s: fetch all of its files"
                          % (len(missing), missing[0]))
    for name, tensor in sorted(reader.tensors.items()):
        if name not in table:
            raise ExportError("the checkpoint holds %s, but %s says %d layers: the two do not "
                              "belong together" % (name, reader.facts_in, model.L))
        if tensor.shape != table[name][2:]:
            raise ExportError("%s has shape %s where %s makes it %s: the two do not belong together"
                              % (name, list(tensor.shape), reader.facts_in,
                                 list(table[name][2:])))


def settle_head(reader):
    """A head that repeats the embedding goes; a head of its own stays, whatever config.json says
    of ties, as in transformers from 5 on."""
    tied, tensors = reader.model.tied, reader.tensors
    if "head" not in tensors:
        if tied is False:
            raise ExportError("config.json says tie_word_embeddings is false, but there is no "
                              "lm_head.weight: fetch all files, or set it to true if the head is "
                              "the embedding")
    elif same_values(tensors["embedding"], tensors["head"]):
        del tensors["head"]
    elif tied is not False:
        warn("the output head differs from the embedding and is kept%s" % (
            ", though config.json ties the two (tie_word_embeddings)" if tied else ""))


def same_values(a, b):
    return a.shape == b.shape and all(np.array_equal(a.rows(i, j), b.rows(i, j))
                                      for i, j in row_blocks(*a.shape))


def row_blocks(rows, cols, slab=SLAB):
    """Ranges of whole tiles that hold about a slab of weights each."""
    step = max(1, slab // (TILE * max(cols, 1))) * TILE
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


# ---- LoRA adapters ----------------------------------------------------------------------
#
# PEFT writes a directory with adapter_config.json and adapter_model.safetensors.  An adapter
# changes a tensor W [rows, cols], in f32, whenever rows of W are asked for:
#   LoRA     W + s B A                      B [rows, r], A [r, cols], s = alpha / r
#   rsLoRA   the same with s = alpha / sqrt(r)
#   DoRA     m (W + s B A) / |W + s B A|    lengths of rows
#   whole    W is replaced ("modules_to_save")
# "Base" tensors are copies of W that PEFT saves where the vocabulary was or may be resized.

# Settings of adapter_config.json that shape nothing beyond what the tensors show.  Any other
# makes another model of it: trained tokens, aLoRA, Arrow, KaSA, BD-LoRA, QALoRA ...
SILENT_SETTINGS = set("""
    auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern alpha_pattern revision
    runtime_config target_modules task_type use_dora use_rslora
    """.split())
# Values of init_lora_weights that leave the base model alone.  PiSSA, OLoRA, CorDA, LoftQ and
# LoRA-GA take what the adapter starts with out of it, so that the adapter fits only what is left.
LEFT_ALONE = "none", "true", "false", "gaussian", "eva", "orthogonal", "mica"

ADAPTER_PARTS = {  # PEFT's name in a key, ours; "" is a module's own weight
    "lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m", "base_layer": "base",
    "original_module": "base", "modules_to_save": "copy", "": "whole",
}
ADAPTER_KEY = re.compile(  # module, part of it, the adapter's name (rarely there)
    r"(?:base_model\.model\.)?(.+?)(?:\.(%s)(?:\.(?!weight$|bias$)[^.]+)?)?(?:\.weight)?"
    % "|".join(filter(None, ADAPTER_PARTS)))
OTHER_PARTS = re.compile(r".*\.(lora_embedding_[AB]|token_adapter)\b.*")
MERGE = "merge it into its base model with PEFT's merge_and_unload()"


class Part:
    """A tensor of an adapter.  A value that is not finite is refused by its name."""

    def __init__(self, path, key, stored):
        self.path, self.key, self.stored = path, key, stored
        self.shape = stored.shape

    def rows(self, start, stop):
        w = self.stored.rows(start, stop)
        if not np.isfinite(w).all():
            raise ExportError("%s: %s holds NaN or infinity: the adapter is damaged, or its "
                              "training diverged" % (self.path, self.key))
        return w


class LowRank:
    """W + s B A.  DoRA gives lengths m to its rows."""

    def __init__(self, key, W, B, A, s, m):
        self.key, self.shape = key, W.shape
        self.W, self.B, self.A, self.s, self.m = W, B, A, np.float32(s), m

    def rows(self, start, stop):
        with np.errstate(all="ignore"):  # whoever uses the sum checks it
            target, adapter = self.key
            A = keep(("A", adapter), target, lambda: self.A.rows(0, self.A.shape[0]))
            w = self.B.rows(start, stop) @ A
            w *= self.s
            w += self.W.rows(start, stop)
            if self.m is not None:
                w *= self.m.rows(start, stop) / np.sqrt(np.einsum(
                    "ij,ij->i", w, w, dtype=np.float64)).astype(np.float32)[:, None]
        return w


class Adapter:
    """What one adapter makes of the model:
    bases     name of ours to the Part that takes the tensor's place before anything is added
    changes   name of ours to what follows: {"whole": Part}, or a pair {"A", "B"}, maybe with "m"
    """

    def __init__(self, directory, scale, number):
        self.directory, self.scale, self.number = directory, scale, number
        path = os.path.join(directory, "adapter_config.json")
        if not os.path.isfile(path):
            raise ExportError("%s has no adapter_config.json: give the directory of a LoRA adapter "
                              "of PEFT's" % directory)
        self.config = Config(path)
        self.check_settings()
        readers = {"adapter_model.safetensors": read_safetensors_header,
                   "adapter_model.bin": torch_tensors}
        found = [n for n in readers if os.path.isfile(os.path.join(directory, n))]
        if not found:
            raise self.bad("has no adapter_model.safetensors: fetch it")
        self.path = os.path.join(directory, found[0])
        self.files, stored = [path, self.path], readers[found[0]](self.path)
        self.parts, self.modules = collections.defaultdict(dict), {}
        for key in sorted(stored):
            self.sort_in(key, stored[key])
        if not self.parts:
            raise self.bad("holds no tensors: fetch it again")
        self.bases, self.changes = {}, {}
        for name, parts in self.parts.items():
            self.settle(name, dict(parts))
        if scale != 1 and any("whole" in parts for parts in self.changes.values()):
            warn("the adapter %s brings tensors whole, to which its scale does not apply"
                 % directory)

    def bad(self, text):
        return ExportError("the adapter %s %s" % (self.directory, text))

    # -- what the configuration says --

    def check_settings(self):
        doc = self.config.doc
        if doc.get("peft_type") != "LORA":
            raise self.bad("has the peft_type %s, where LORA can be converted: %s" % (
                json.dumps(doc.get("peft_type")), MERGE if "peft_type" in doc else
                "merge it into its base model (mlx-lm's with mlx_lm.fuse), and convert that"))
        init = doc.get("init_lora_weights")
        if str(init).lower() not in LEFT_ALONE:
            raise self.bad("fits a base model changed by init_lora_weights %s: merge it into that "
                           "with PEFT's merge_and_unload(), or save it with path_initial_model_for"
                           "_weight_conversion, which makes it fit the original"
                           % json.dumps(init))
        for key, value in doc.items():
            if value and key not in SILENT_SETTINGS:
                raise self.bad("has the setting %s %s, which is not known to leave it a plain LoRA "
                               "or DoRA: %s" % (key, json.dumps(value)[:80], MERGE))

    def scaling(self, name):
        """The factor s of a pair and its rank."""
        r = self.of_pattern(name, "rank_pattern", "r", 8, 1, 1 << 20, int)
        alpha = self.of_pattern(name, "alpha_pattern", "lora_alpha", 8, -1e9, 1e9, (int, float))
        return self.scale * (alpha / (math.sqrt(r) if self.config.doc.get("use_rslora") else r)), r

    def of_pattern(self, name, patterns, key, default, *limits):
        """The value of the first pattern that is the module's name, or its end after a dot."""
        found = self.config.doc.get(patterns) or {}
        if not isinstance(found, dict):
            raise self.config.bad(patterns, found, "an object")
        for pattern, value in found.items():
            try:
                if re.match(r"(.*\.)?(%s)$" % pattern, self.modules[name]):
                    return self.config.checked(pattern, value, *limits)
            except (re.error, RecursionError, OverflowError) as e:
                raise self.config.bad("a key of " + patterns, pattern,
                                      "a regular expression (%s)" % e) from None
        return self.config.number(key, default, *limits)

    # -- what the tensors are --

    def sort_in(self, key, stored):
        if key.endswith(".bias"):
            raise self.bad("holds %s, a bias, which Gemma 2 does not have" % key)
        if OTHER_PARTS.fullmatch(key):
            raise self.bad("holds %s, and LoRA of an embedding or trained tokens cannot be added: "
                           "%s" % (key, MERGE))
        module, kind = ADAPTER_KEY.fullmatch(key).groups()
        name = canonical_name(module + ".weight", "the adapter " + self.directory)
        kind = ADAPTER_PARTS[kind or ""]
        if name is None:
            return
        if kind in self.parts[name]:
            raise self.bad("holds the %s of %s twice, as %s and as %s: save one adapter alone"
                           % (kind, name, self.parts[name][kind].key, key))
        if len(stored.dims) > 2 or 0 in stored.dims or stored.dtype not in FLOATS:
            raise self.bad("holds %s with the shape %s in %s, which is no matrix of F32, BF16 or "
                           "F16: fetch it again" % (key, list(stored.dims), stored.dtype))
        self.parts[name][kind] = Part(self.path, key, stored)
        self.modules[name] = module

    def settle(self, name, parts):
        """Sorts one tensor's parts into its base and its change."""
        # Whether PEFT trained a copy of the module.  A tied partner keeps the original
        saved = "copy" in parts or any(
            isinstance(n, str) and self.modules[name].endswith(n)
            for n in typed(self.config.doc.get("modules_to_save"), list))
        if "copy" in parts:  # beside it, "whole" is the same once more
            parts["whole"] = parts.pop("copy")
        base = "whole" if not saved and set(parts) == {"whole"} else "base"
        if base in parts:
            self.bases[name] = parts.pop(base)
        pair = {"A", "B", "m"} if self.config.doc.get("use_dora") else {"A", "B"}
        fits = name != "embedding" and not is_norm(name) and set(parts) == pair
        if parts and set(parts) != {"whole"} and not fits:
            raise self.bad("holds %s, which is neither the whole of %s nor a pair of %s for it: "
                           "fetch it again, or %s" % (
                               ", ".join(sorted(p.key for p in parts.values())), name,
                               "lora_A and lora_B" + " with lora_magnitude_vector (use_dora)" *
                               (len(pair) == 3), MERGE))
        if parts:
            self.changes[name] = parts

    def tie(self):
        """Where the head is the embedding, PEFT lets both share every base.  They share changes
        only if ensure_weight_tying says so."""
        shared = [self.bases] + [self.changes] * bool(self.config.doc.get("ensure_weight_tying"))
        for found in shared:
            for name, other in ("embedding", "head"), ("head", "embedding"):
                if name in found:
                    found.setdefault(other, found[name])
                    self.modules.setdefault(other, self.modules[name])

    def changed(self, W, name):
        """The tensor that W becomes."""
        parts, (rows, cols) = self.changes[name], W.shape
        if "whole" in parts:
            return parts["whole"]
        s, r = self.scaling(name)
        for part, shape in ("A", (r, cols)), ("B", (rows, r)), ("m", (rows, 1)):
            if part in parts and parts[part].shape != shape:
                raise self.bad("holds %s with the shape %s where the model makes it %s: it belongs "
                               "to another base model" % (parts[part].key,
                                                          list(parts[part].shape), list(shape)))
        return LowRank((name, self.number), W, parts["B"], parts["A"], s, parts.get("m"))


class Adapted(Checkpoint):
    """A checkpoint and the adapters added to it, in their order."""

    def __init__(self, reader, adapters):
        self.reader, self.adapters = reader, adapters
        self.directory, self.model = reader.directory, copy.copy(reader.model)
        self.source = "%s, with LoRA %s" % (reader.source, ", ".join(
            directory_name(a.directory) for a in adapters))
        self.files = [*reader.files, *(f for a in adapters for f in a.files)]
        self.start_method, self.most_jobs = reader.start_method, reader.most_jobs
        self.tensors = dict(reader.tensors)
        tied = "head" not in self.tensors
        if tied:
            self.tensors["head"] = self.tensors["embedding"]
        bases, changes = self.gather(tied)
        for name in {**bases, **changes}:
            W = bases.get(name, self.tensors[name])
            for adapter in changes.get(name, ()):
                W = adapter.changed(W, name)
            self.check_shape(name, W)
            self.tensors[name] = W
        self.settle_vocabulary(tied)

    def gather(self, tied):
        """The bases, and in their order the adapters that change it, by the name of the tensor."""
        bases, changes = {}, collections.defaultdict(list)
        for adapter in self.adapters:
            unknown = [name for name in adapter.parts if name not in self.tensors]
            if unknown:
                raise adapter.bad("changes %s, and the model has %d layers: it belongs to another "
                                  "base model" % (unknown[0], self.model.L))
            if tied:
                adapter.tie()
            for name, part in adapter.bases.items():
                if name in bases and not same_values(bases[name], part):
                    raise adapter.bad("brings another %s than the adapter before it: %s"
                                      % (part.key, MERGE))
                bases[name] = part
            for name in adapter.changes:
                changes[name].append(adapter)
                if len(changes[name]) > 1 and any(
                        set(a.changes[name]) != {"A", "B"} for a in changes[name]):
                    raise adapter.bad("changes %s, as an adapter before it does, and the two do "
                                      "not just add up: merge the first with PEFT's "
                                      "merge_and_unload()" % name)
        return bases, changes

    def check_shape(self, name, W):
        """Tensors that came whole keep their shape.  Only the vocabulary may have another size."""
        rows, cols = self.reader.tensors.get(name, self.reader.tensors["embedding"]).shape
        if W.shape != (rows, cols) and (name not in ("embedding", "head") or W.shape[1] != cols):
            raise ExportError("%s: %s has the shape %s where the model makes it %s: the adapter "
                              "belongs to another base model" % (W.path, W.key, list(W.shape),
                                                                 [rows, cols]))

    def settle_vocabulary(self, was_tied):
        embedding, head = self.tensors["embedding"], self.tensors["head"]
        self.model.V = embedding.shape[0]
        if head.shape != embedding.shape:
            raise ExportError("with the adapters the embedding has %d rows and the head %d: an "
                              "adapter that resizes the vocabulary must bring both" % (
                                  embedding.shape[0], head.shape[0]))
        if was_tied and (head is embedding or same_values(embedding, head)):
            del self.tensors["head"]
        elif was_tied:
            warn("the adapters part the output head from the embedding: the file holds both")

    def name(self):
        return " + ".join([self.reader.name(), *(directory_name(a.directory)
                                                 for a in self.adapters)])

    def tokenizer(self):
        """The model's tokenizer.  An adapter's directory may bring the tokenizer, or the tokens,
        with which the adapter was trained."""
        path, tokenizer = self.reader.tokenizer()
        for directory in (a.directory for a in self.adapters):
            own_path, own = tokenizer_of_directory(directory)
            if own is None and tokenizer is not None:
                add_directory(tokenizer, directory, added_tokens({}, directory))
            elif own is not None:
                if tokenizer and (own.pieces, own.kinds) != (tokenizer.pieces, tokenizer.kinds):
                    warn("the adapter %s brings another tokenizer than the model's, which is used"
                         % directory)
                path, tokenizer = own_path, own
        return path, tokenizer

    def chat_template(self):
        """The last adapter's template, with which it was trained, or the model's."""
        found = (chat_template(a.directory) for a in reversed(self.adapters))
        return next((t for t in found if t[0] is not None), None) or self.reader.chat_template()


def adapter_beside(reader, given):
    """A list of the adapter that lies in the directory of the weights, or of none.  transformers
    adds it, whatever base model it names.  torchtune has merged it into the weights."""
    here = reader.directory
    there = {n for n in os.listdir(here) if n in (
        "config.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")}
    if (not isinstance(reader, HuggingFace) or not there > {"config.json", "adapter_config.json"}
            or any(os.path.isdir(path) and os.path.samefile(path, here) for path, _ in given)):
        return []
    merged = re.match("(hf_model_|ft-model-)", os.path.basename(reader.files[0]))
    warn("the adapter in %s %s" % (here, "does not count: torchtune has merged it into the weights "
                                   "beside it" if merged else "is added to the weights beside it, "
                                   "as transformers does: remove adapter_config.json if they hold "
                                   "it already"))
    return [] if merged else [(here, 1.0)]


def with_adapters(reader, given):
    """The reader with the adapters of (directory or hub name, scale) added."""
    given = adapter_beside(reader, given) + given
    return Adapted(reader, [
        Adapter(located(path, "the directory of a LoRA adapter"), scale, i)
        for i, (path, scale) in enumerate(given)]) if given else reader


# =====================================================================================
# 5. Tokenizers
# =====================================================================================

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE, MARKER = 1, 2, 3, 4, 5, 6, 7
ABSENT = 0xFFFFFFFF
MAX_TOKENIZER = 1 << 28  # bytes of a file that is read whole
SPACE = "\u2581"
# As in SentencePiece, text never becomes a control piece of these names.  Renamed control pieces
# are markers.
OWN_NAMES = "<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>"
# USER pieces that must not come from a stranger's text: Gemma's own, and what fine-tunes call so
GEMMA_MARKERS = re.compile(r"<mask>|<2mass>|\[@BOS@\]|<unused\d+>|<start_of_turn>|<end_of_turn>|"
                           r"\[toxicity=0\]")
MARKERS = re.compile(GEMMA_MARKERS.pattern + r"|<\|[^|]*\|>")
BYTES = ["<0x%02X>" % b for b in range(256)]


class Tokenizer:
    """Pieces (texts with U+2581 for a space), their scores and kinds, and a few ids by name."""

    def __init__(self, pieces, scores, kinds, ids):
        self.pieces, self.scores, self.kinds = pieces, scores, kinds
        self.ids = dict(ids)  # bos, eos, pad, unk
        self.stop_ids = ()    # of what a fine-tune calls its eos_token
        self.n_learnt = len(pieces)  # the rest are added tokens

    def __len__(self):
        return len(self.pieces)

    def find(self, piece):
        """Lowest id of a piece that is not merely unused, or None."""
        return next((i for i, p in enumerate(self.pieces)
                     if p == piece and self.kinds[i] != UNUSED), None)

    def text(self, i):
        return self.pieces[i].replace(SPACE, " ")

    def append_unused(self, n_pieces):
        more = n_pieces - len(self)
        self.pieces += [""] * more
        self.scores += [0.0] * more
        self.kinds += [UNUSED] * more

    def cut(self, n_pieces):
        for part in self.pieces, self.scores, self.kinds:
            del part[n_pieces:]
        self.stop_ids = tuple(i for i in self.stop_ids if i < n_pieces)
        self.ids = {name: i for name, i in self.ids.items() if i < n_pieces}


# ---- tokenizer.model: SentencePiece's protobuf -------------------------------------------


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]  # IndexError: truncated
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an overlong number")


def fields(data):
    """Yields (field number, value) of a protobuf message; bytes for anything with a length."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise IndexError
        yield key >> 3, value


# Field numbers in SentencePiece's ModelProto, TrainerSpec and NormalizerSpec
PIECES, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK = 3, 35
ID_FIELDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # and defaults
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE = 2, 3, 4, 5


def sentencepiece_tokenizer(data, path):
    try:
        pieces, trainer, normalizer = [], {}, {}
        for number, value in fields(data):
            if number == PIECES:
                piece = dict(fields(value))
                score, = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
            elif number == TRAINER:
                trainer = dict(fields(value))
            elif number == NORMALIZER:
                normalizer = dict(fields(value))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error):
        pieces = []
    if not pieces:
        raise ExportError("%s is no SentencePiece model, or is cut short: fetch it again (git lfs "
                          "pull, if it is a pointer)" % path)
    refuse_steps(path, [
        ("a model that is no BPE", trainer.get(MODEL_TYPE, 1) != 2),
        ("a normaliser (precompiled_charsmap)", normalizer.get(CHARSMAP)),
        ("add_dummy_prefix", normalizer.get(DUMMY_PREFIX, 1) != 0),
        ("remove_extra_whitespaces", normalizer.get(EXTRA_SPACES, 1) != 0),
        ("escape_whitespaces off", normalizer.get(ESCAPE, 1) == 0),
        ("a byte_fallback that does not agree with its byte pieces",
         bool(trainer.get(BYTE_FALLBACK, 0)) != any(kind == BYTE for _, _, kind in pieces)),
    ])
    ids = {}
    for name, (field, default) in ID_FIELDS.items():
        i = trainer.get(field, default)
        if isinstance(i, int) and 0 <= i < len(pieces) and pieces[i][2] in (CONTROL, UNKNOWN):
            ids[name] = i
    texts, scores, kinds = map(list, zip(*pieces))
    return Tokenizer(texts, scores, kinds, ids)


def refuse_steps(path, wrong):
    """wrong: pairs of what a tokenizer may do to texts unlike Gemma 2's, and whether it does."""
    for what, found in wrong:
        if found:
            raise ExportError("%s has %s, which Gemma 2's tokenizer does not and gemma2.c does not "
                              "follow: is this the right tokenizer?" % (path, what))


# ---- tokenizer.json: Hugging Face's --------------------------------------------------------


def json_tokenizer(doc, path):
    """The kinds and scores that SentencePiece would have, from vocabulary and merges."""
    bpe = check_json_tokenizer(doc, path)
    added = added_tokens(doc)
    texts = {i: p for p, i in bpe["vocab"].items()}
    shared = len(texts) < len(bpe["vocab"])
    for i, token in added.items():
        texts.setdefault(i, token["content"].replace(" ", SPACE))
    n = max(texts) + 1 if texts else 0
    if not 0 < n <= 1 << 22 or min(texts) < 0 or shared:
        raise ExportError("%s has ids that are negative, too large or shared by two pieces: fetch "
                          "it again" % path)
    pieces = [texts.get(i, "") for i in range(n)]
    spell_tab_as_byte(pieces)
    unk = bpe.get("unk_token") or "<unk>"
    kinds = [json_kind(p, i in added, unk) for i, p in enumerate(pieces)]
    ids = {name: pieces.index(p) for name, p in
           (("pad", "<pad>"), ("eos", "<eos>"), ("bos", "<bos>"), ("unk", unk)) if p in pieces}
    tokenizer = Tokenizer(pieces, json_scores(bpe, pieces, kinds, path), kinds, ids)
    tokenizer.n_learnt = max(bpe["vocab"].values(), default=-1) + 1
    return tokenizer


# Steps that Gemma 2's tokenizer.json does not have and that would change the text
OTHER_STEPS = re.compile(r'"(Prepend|NFK?[CD]|Lowercase|Strip|Precompiled|ByteLevel|Whitespace|'
                         r'Digits|Regex)"')
DUMMY = re.compile(r'"prepend_scheme": "(always|first)"|"add_prefix_space": true')


def check_json_tokenizer(doc, path):
    bpe = doc.get("model")
    if not (isinstance(bpe, dict) and bpe.get("type", "BPE") == "BPE"
            and isinstance(bpe.get("vocab"), dict) and isinstance(bpe.get("merges"), list)
            and all(isinstance(i, int) for i in bpe["vocab"].values())
            and isinstance(doc.get("added_tokens", []), list)):
        raise ExportError("%s holds no BPE vocabulary: is this the right tokenizer?" % path)
    affixes = bpe.get("continuing_subword_prefix"), bpe.get("end_of_word_suffix")
    steps = json.dumps([doc.get("normalizer"), doc.get("pre_tokenizer")])
    refuse_steps(path, [
        ("no byte_fallback", not bpe.get("byte_fallback")),
        ("ignore_merges", bpe.get("ignore_merges")),
        ("a prefix or suffix of words", any(affixes)),
        ("a normaliser or pre-tokeniser of its own", OTHER_STEPS.search(steps)),
        ("a dummy prefix", DUMMY.search(steps)),
    ])
    return bpe


def spell_tab_as_byte(pieces):
    """Hugging Face spells the byte piece <0x09> as a tab."""
    before = pieces.index(BYTES[8]) if BYTES[8] in pieces else -1
    if before >= 0 and BYTES[9] not in pieces and pieces[before + 1:before + 2] == ["\t"]:
        pieces[before + 1] = BYTES[9]


def json_kind(piece, is_added, unk):
    if piece == "":
        return UNUSED
    if piece == unk:
        return UNKNOWN
    if piece in ("<pad>", "<eos>", "<bos>"):
        return CONTROL
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return BYTE
    return USER if is_added else NORMAL


def json_scores(bpe, pieces, kinds, path):
    """The score of a piece is minus its rank.  Where merges come in the order of the ids they
    make, as in Gemma, ids count from the first NORMAL one.  Elsewhere a piece's first merge
    counts."""
    made = []
    for merge in bpe["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and list(map(type, pair)) == [str, str]
        i = bpe["vocab"].get("".join(pair)) if is_pair else None
        if i is None:
            raise ExportError("%s: the merge %r makes no piece: fetch it again" % (path, merge))
        if kinds[i] == NORMAL:
            made.append(i)
    first = kinds.index(NORMAL) if NORMAL in kinds else 0
    if all(a <= b for a, b in zip(made, made[1:])):
        return [float(first - i) if k == NORMAL else 0.0 for i, k in enumerate(kinds)]
    order = list(dict.fromkeys(made))
    if sum(a != b for a, b in zip(made, made[1:])) + 1 != len(order):
        warn("%s: merges of different pieces are interleaved, which scores cannot express; a few "
             "words may be cut differently" % path)
    rank = {i: r for r, i in enumerate(order)}
    return [-float(rank.get(i, len(order))) if k == NORMAL else 0.0 for i, k in enumerate(kinds)]


# ---- Pieces beyond tokenizer.model ---------------------------------------------------------


def added_tokens(doc, directory=None):
    """id to description of the added tokens in tokenizer.json, and in all the places in a directory
    where fine-tunes put them."""
    beside, settings = {}, {}
    if directory is not None:
        beside = optional_json(directory, "added_tokens.json")
        settings = optional_json(directory, "tokenizer_config.json")
    given = [(i, {"content": content}) for content, i in beside.items()]
    given += [(typed(t, dict).get("id"), t) for t in typed(doc.get("added_tokens"), list)]
    given += [(int(i), t) for i, t in typed(settings.get("added_tokens_decoder"), dict).items()
              if re.fullmatch("[0-9]{1,9}", i)]
    return {i: t for i, t in given
            if is_size(i) and isinstance(typed(t, dict).get("content"), str)}


def token_settings(directory):
    """tokenizer_config.json, to which older fine-tunes add special_tokens_map.json."""
    settings = optional_json(directory, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **optional_json(directory, "special_tokens_map.json")}
    return settings


def token_text(value):
    """The text of a token's entry, which is a string or an object, or None."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def add_directory(tokenizer, directory, added):
    """What the files of a directory add to a tokenizer, added tokens and more."""
    settings = token_settings(directory)
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    more = more.values() if isinstance(more, dict) else typed(more, list)
    named = [value for key, value in settings.items() if key.endswith("_token")]
    texts = filter(None, map(token_text, [*named, *more]))
    # Special whatever kinds the pieces have
    add_tokens(tokenizer, added, {
        t for t in texts if t not in OWN_NAMES and not GEMMA_TAGS.fullmatch(t)})
    flagged = {t["content"]: flag for t in added.values()
               for flag in ("lstrip", "rstrip", "single_word") if t.get(flag) is True}
    if flagged:  # which swallow spaces or match whole words only; like SentencePiece we do neither
        warn("%d added tokens have flags that are not followed: %s; text next to them may be cut "
             "differently than by transformers" % (
                 len(flagged), ", ".join("%r (%s)" % pair for pair in sorted(flagged.items()))))
    # Fine-tunes that end their turns with a token of their own often name it only here
    eos = token_text(settings.get("eos_token"))
    if eos and not GEMMA_TAGS.fullmatch(eos):  # </s> is an HTML tag of Gemma's
        i = tokenizer.find(eos.replace(" ", SPACE))
        tokenizer.stop_ids += (i,) if i is not None else ()
    bos = tokenizer.find((token_text(settings.get("bos_token")) or "").replace(" ", SPACE))
    if bos is not None and tokenizer.kinds[bos] in (CONTROL, MARKER):
        tokenizer.ids["bos"] = bos


def is_gemmas(piece):
    return piece in OWN_NAMES or GEMMA_MARKERS.fullmatch(piece) is not None


def add_tokens(tokenizer, added, special=()):
    """Appends added tokens, renames pieces and marks what is special.  As in transformers, a text
    that is a piece already keeps its id, whatever id is said beside it.  Gemma's own name for a
    piece is older than any other."""
    t, n = tokenizer, max(added, default=-1) + 1
    if n >= 1 << 22:
        raise ExportError("an added token has the id %d: fetch the tokenizer again" % (n - 1))
    t.append_unused(n)
    where = {p: i for i, p in reversed(list(enumerate(t.pieces))) if t.kinds[i] != UNUSED}
    renamed, ordinary = [], []
    for i, token in sorted(added.items()):
        content, is_special = token["content"].replace(" ", SPACE), bool(token.get("special"))
        i = where.get(content, i)
        old, kind = t.pieces[i], t.kinds[i]
        if not content or kind == BYTE or is_gemmas(content) and old and not is_gemmas(old):
            continue
        if kind == NORMAL and old != content:  # the model was trained with it
            ordinary.append("%d %r (is %r)" % (i, content, old))
        elif old != content and kind != UNUSED:
            renamed.append("%d %r (was %r)" % (i, content, old))
            where.pop(old, None)
        if kind != NORMAL or old == content:
            t.pieces[i], where[content] = content, i
            if content not in OWN_NAMES or kind not in (CONTROL, UNKNOWN):
                is_special |= kind == CONTROL or content.replace(SPACE, " ") in special
                t.kinds[i], t.scores[i] = MARKER if is_special else USER, 0.0
    for content in special:
        i = where.get(content.replace(" ", SPACE))
        if i is not None and t.kinds[i] != BYTE:
            t.kinds[i], t.scores[i] = MARKER, 0.0
    for what, found in (("rename %d pieces", renamed),
                        ("have the ids of %d ordinary pieces and are left out", ordinary)):
        if found:
            warn("added tokens %s: %s%s" % (what % len(found), ", ".join(found[:3]),
                                            " ..." if len(found) > 3 else ""))


# ---- A GGUF file's vocabulary ---------------------------------------------------------------

# Pieces of Gemma's vocabulary by which it is known: id of the first, pieces
GEMMA_PIECES = [
    (108, ["\n" * n for n in range(1, 32)]),
    (139, [SPACE * n for n in range(2, 32)]), (217, BYTES), (473, ["in", SPACE + "t", "er"]),
    (235248, [SPACE, "e", "a"]), (255969, ["\t" * n for n in range(2, 32)]),
]
# Its user-defined pieces that a converter may call control pieces by mistake
GEMMA_TAGS = re.compile(r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|"
                        r"em|b|i|u|s|sub|sup|code)>")


def gguf_tokenizer(config, facts):
    """The file's vocabulary, or None.  llama.cpp's converter calls most of Gemma's user-defined
    pieces normal or control pieces, gives them scores of its own and spells their spaces out.
    Their ids tell what they are."""
    key = "tokenizer.ggml."
    if key + "tokens" not in facts:
        return None
    if config.doc.get(key + "model") != "llama":
        raise config.bad(key + "model", config.doc.get(key + "model"), '"llama" (SentencePiece)')
    pieces, scores, kinds = (facts.get(key + name) for name in ("tokens", "scores", "token_type"))
    pieces = gguf_pieces(config, pieces)
    spell_tab_as_byte(pieces)
    n = len(pieces)
    is_gemma = all(pieces[i:i + len(want)] == want for i, want in GEMMA_PIECES)
    for name, found, kind in (("scores", scores, float), ("token_type", kinds, int)):
        if not isinstance(found, list) or len(found) != n or not isinstance(found[0], kind):
            raise ExportError("%s: %s%s is no list of %d numbers, one for each token: fetch it "
                              "again" % (config.path, key, name, n))
    ids = gguf_ids(config, n)
    if is_gemma:
        ids = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
        kinds = gemma_kinds(pieces, kinds)
    elif config.doc.get(key + "add_space_prefix"):
        raise config.bad(key + "add_space_prefix", True, "false, as in Gemma 2")
    for i in range(n):
        if kinds[i] == UNUSED and re.fullmatch(r"\[PAD\d+\]", pieces[i]):
            pieces[i] = ""
    scores = [s if k == NORMAL else 0.0 for s, k in zip(scores, kinds)]
    return Tokenizer(pieces, scores, kinds, ids)


def gguf_pieces(config, tokens):
    try:
        return [t.decode("utf-8").replace(" ", SPACE) for t in tokens or None]
    except (TypeError, AttributeError, UnicodeDecodeError):  # no list, no texts, no UTF-8
        raise ExportError("%s: tokenizer.ggml.tokens is no list of UTF-8 texts: fetch it again"
                          % config.path) from None


def gguf_ids(config, n):
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: config.doc.get("tokenizer.ggml.%s_token_id" % key) for name, key in keys.items()}
    return {name: i for name, i in ids.items() if is_size(i) and i < n}


def gemma_kinds(pieces, kinds):
    """The kinds of Gemma's ids.  Later ids, and pieces that fine-tunes named, have the file's."""
    n = len(pieces)
    known = [CONTROL] * 3 + [UNKNOWN] + [USER] * 213 + [BYTE] * 256 + [NORMAL] * 255495
    known += [USER] * 32 + kinds[256000:]
    for i in range(4, min(n, 256000)):
        if known[i] == USER and kinds[i] == CONTROL and not GEMMA_TAGS.fullmatch(pieces[i]):
            known[i] = MARKER
    if pieces[3] != "<unk>" and kinds[3] in (CONTROL, USER):
        known[3] = MARKER
    return known[:n]


def gguf_stop_ids(config, tokenizer):
    """Ids of eos, eot and eom, but never Gemma's HTML tag </s>."""
    found = []
    for name in ("eos", "eot", "eom"):
        key = "tokenizer.ggml.%s_token_id" % name
        i = config.doc.get(key)
        if i is not None and tokenizer is not None:
            i = config.number(key, None, 0, len(tokenizer) - 1, int)
            found += [i] if not GEMMA_TAGS.fullmatch(tokenizer.pieces[i]) else []
    return tuple(found)


# ---- Finding, finishing, writing -------------------------------------------------------------


# SentencePiece's file as Hugging Face, gemma.cpp and Keras name it
PIECE_FILES = "tokenizer.model", "tokenizer.spm", "assets/tokenizer/vocabulary.spm"
SIDE_FILES = (*PIECE_FILES, "tokenizer.json", "added_tokens.json", "tokenizer_config.json",
              "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
              "generation_config.json")
A_TOKENIZER = "a tokenizer.model, a tokenizer.json or their directory"


def tokenizer_of_file(path):
    if not os.path.isfile(path):
        raise ExportError("%s is no ordinary file: give a tokenizer.model or tokenizer.json" % path)
    with open(path, "rb") as f:
        if f.read(len(MAGIC)) == MAGIC:
            return container_tokenizer(f, path)
        f.seek(0)
        data = f.read(MAX_TOKENIZER + 1)
    if len(data) > MAX_TOKENIZER:
        raise ExportError("%s is too large for a tokenizer: give a tokenizer.model or "
                          "tokenizer.json" % path)
    if data.lstrip()[:1] == b"{":
        doc = parse_json(data, path)
        tokenizer = json_tokenizer(doc, path)
        add_tokens(tokenizer, added_tokens(doc))
        return tokenizer
    return sentencepiece_tokenizer(data, path)


def tokenizer_of_directory(directory):
    """(path, tokenizer): tokenizer.model or tokenizer.json, with the pieces that only other files
    know.  (None, None) where there is neither."""
    json_path = os.path.join(directory, "tokenizer.json")
    doc = optional_json(directory, "tokenizer.json")
    added = added_tokens(doc, directory)
    path = next(filter(os.path.isfile, (os.path.join(directory, n) for n in PIECE_FILES)), None)
    if path:
        tokenizer = tokenizer_of_file(path)
        vocab = typed(typed(doc.get("model"), dict).get("vocab"), dict)
        others = [i for piece, i in vocab.items() if is_size(i) and i not in added and (
            i >= len(tokenizer) or tokenizer.kinds[i] != BYTE and tokenizer.pieces[i] != piece)]
        if others:  # new merges or names, which only tokenizer.json knows
            warn("tokenizer.json has %d pieces that tokenizer.model has not, and is used instead"
                 % len(others))
            path, tokenizer = json_path, json_tokenizer(doc, json_path)
    elif doc:
        path, tokenizer = json_path, json_tokenizer(doc, json_path)
    else:
        return None, None
    add_directory(tokenizer, directory, added)
    return path, tokenizer


def find_tokenizer(given, reader, n_vocab):
    """The tokenizer that --tokenizer gives, or the checkpoint's, or Gemma 2's own."""
    if given:
        given = located(given, A_TOKENIZER, with_weights=False)
        path, tokenizer = (tokenizer_of_directory(given) if os.path.isdir(given)
                           else (given, tokenizer_of_file(given)))
    else:
        path, tokenizer = reader.tokenizer()
    if tokenizer is None and not given and n_vocab in (256000, 256128):
        here = os.path.dirname(os.path.realpath(__file__))
        path = next(filter(os.path.isfile, (
            os.path.join(here, *place, "tokenizer.bin")
            for place in ((), ("..", "share", "gemma2")))), None)  # as a checkout, as installed
        if path:
            tokenizer = tokenizer_of_file(path)
            warn("the checkpoint brings no tokenizer; Gemma 2's own (tokenizer.bin) is used")
    if tokenizer is None:
        raise ExportError("%s holds no tokenizer.model or tokenizer.json: fetch one, or give it "
                          "with --tokenizer FILE" % (given or reader.directory))
    return path, tokenizer


def finish_tokenizer(tokenizer, n_vocab, path):
    """Marks control pieces, pads to the embedding's rows, and checks what the file demands."""
    t = tokenizer
    for i, piece in enumerate(t.pieces):
        if (t.kinds[i] == USER and MARKERS.fullmatch(piece)
                or t.kinds[i] == CONTROL and piece not in OWN_NAMES):
            t.kinds[i] = MARKER
    while n_vocab and len(t) > n_vocab and t.kinds[-1] == UNUSED and not t.pieces[-1]:
        t.cut(len(t) - 1)
    if t.n_learnt <= n_vocab < len(t):  # some add a token and never need it
        warn("the embedding has %d rows, and none for added tokens beyond: %r is left out"
             % (n_vocab, " ".join(filter(None, t.pieces[n_vocab:]))[:80]))
        t.cut(n_vocab)
    if n_vocab and len(t) > n_vocab:
        raise ExportError("the tokenizer %s has %d pieces and the embedding only %d rows: give the "
                          "right one with --tokenizer" % (path, len(t), n_vocab))
    if n_vocab and len(t) < n_vocab:
        warn("the embedding has %d rows and the tokenizer %d pieces; the rest become unused pieces"
             % (n_vocab, len(t)))
        t.append_unused(n_vocab)
    for name in ("start_of_turn", "end_of_turn"):
        t.ids[name] = t.find("<%s>" % name)
    check_tokenizer(t, path)


def check_tokenizer(t, path):
    for i, (piece, score, kind) in enumerate(zip(t.pieces, t.scores, t.kinds)):
        wrong = [what for what, found in (
            ("of the unknown kind %s" % kind, kind not in range(NORMAL, MARKER + 1)),
            ("that is empty", not piece and kind != UNUSED),
            ("of more than 4096 bytes", len(piece.encode("utf-8", "surrogatepass")) > 4096),
            ("that is no text", re.search("[\ud800-\udfff]", piece)),
            ("that is no byte, of the kind of bytes", kind == BYTE and piece not in BYTE_SET),
            ("whose score is not finite", not math.isfinite(score))) if found]
        if wrong:
            raise ExportError("the tokenizer %s has a piece %s (id %d, %r): fetch it again"
                              % (path, wrong[0], i, piece[:40]))
    spelled = {p for p, k in zip(t.pieces, t.kinds) if k == BYTE}
    if t.ids.get("unk") is None and len(spelled) < 256:
        raise ExportError("the tokenizer %s has neither an unknown piece nor all 256 byte pieces: "
                          "fetch it again" % path)


BYTE_SET = set(BYTES)
TOKENIZER_HEAD = struct.Struct("<I6II32x")
ID_ORDER = "bos", "eos", "pad", "unk", "start_of_turn", "end_of_turn"


def tokenizer_section(t):
    blob = [p.encode("utf-8") for p in t.pieces]
    ends = np.cumsum([len(p) for p in blob])
    ids = [ABSENT if t.ids.get(name) is None else t.ids[name] for name in ID_ORDER]
    return b"".join([
        TOKENIZER_HEAD.pack(len(t), *ids, int(ends[-1])),
        (np.array(t.scores, "<f4") + np.float32(0)).tobytes(),  # no -0
        ends.astype("<u4").tobytes(), np.array(t.kinds, np.uint8).tobytes(), *blob])


def container_tokenizer(f, path):
    """The tokenizer section of a file of ours."""
    def part(start, size):
        if not 0 <= size <= MAX_TOKENIZER or start >= 1 << 63:
            raise ValueError
        f.seek(start)
        return f.read(size)
    try:
        n_entries = struct.unpack("<I", part(48, 4))[0]
        directory = part(HEADER_BYTES, n_entries * ENTRY.size)
        entries = [ENTRY.unpack_from(directory, i * ENTRY.size) for i in range(n_entries)]
        start, size, digest = next(e[6:9] for e in entries if e[0] == TOKENIZER)
        section = part(start, size)
        if hashlib.sha256(section).digest() != digest:
            raise ValueError
        n, *ids, blob_bytes = TOKENIZER_HEAD.unpack_from(section)
        ends = np.frombuffer(section, "<u4", n, 64 + 4 * n).tolist()
        blob = section[64 + 9 * n:]
        pieces = [blob[a:b].decode("utf-8") for a, b in zip([0] + ends, ends)]
        return Tokenizer(pieces, np.frombuffer(section, "<f4", n, 64).tolist(),
                         list(section[64 + 8 * n:64 + 9 * n]),
                         {k: i for k, i in zip(ID_ORDER, ids) if i != ABSENT})
    except (struct.error, StopIteration, ValueError):
        raise ExportError("%s is damaged or holds no tokenizer: make it again" % path) from None


def chat_template(directory):
    """The template that transformers picks, and the names of special tokens that it is given.
    Several templates, none of them the default, come as the list of their names."""
    path = os.path.join(directory, "chat_template.jinja")
    names = {key: token_text(value) for key, value in token_settings(directory).items()
             if key.endswith("_token") and token_text(value)}
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace", newline="") as f:
            return f.read(), names
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = optional_json(directory, name).get("chat_template")
        if isinstance(found, list):
            several = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
            found = several.get("default", list(several))
        if found and isinstance(found, (str, list)):
            return found, names
    return None, {}


# ---- Chat templates --------------------------------------------------------------------------
#
# A chat template is a program in Jinja.  gemma2.c knows no Jinja: it is given the texts that
# the template writes around the messages, the facts "chat.*":
#
#   chat.bos                                   1 or 0: whether BOS comes first
#   chat.trim                                  1 or 0: whether messages are stripped; or the roles
#                                              whose messages are, and "fold" where system text,
#                                              join and first user text are stripped as one
#   chat.start                                 first text where there is no system message
#   chat.system.before, chat.system.after      a system turn of its own, in the place of start
#   chat.system.join                           or: between system and first user message
#   chat.user.before, .after, chat.model.before, .after
#   chat.generate                              opens the model's turn at the end
#   chat.refused                               alone: why the template cannot be used
#
# They are found by rendering conversations of marked messages, and must give all renderings.

# A system message that may be empty (e), or none; user and model by turns
CONVERSATIONS = [system + "umumu"[:n] for system in ("", "s", "e") for n in range(1, 6)]
CHAT_ROLES = ["system", "user", "model"]
ROLE_NAMES = {"s": "system", "e": "system", "u": "user", "m": "assistant"}
PADS = "\u2003\t\n ", " \n\u2003"  # white space before and behind a text, or none
CHAT_SECONDS, CHAT_BYTES = 10, 1 << 30  # what rendering may take
MAX_CHAT_PART, MAX_CHAT_LINES = 1 << 16, 64  # as in gemma2.c
NOW = "?now?"  # what a template is told of the time
GEMMA_TEMPLATE = "1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123"
GEMMA_CHAT = {
    "chat.bos": "1", "chat.trim": "1", "chat.start": "",
    "chat.user.before": "<start_of_turn>user\n", "chat.user.after": "<end_of_turn>\n",
    "chat.model.before": "<start_of_turn>model\n", "chat.model.after": "<end_of_turn>\n",
    "chat.generate": "<start_of_turn>model\n",
}


class Inexpressible(Exception):
    """What a template does that the facts cannot say."""


def messages_of(conversation, pads=("", "")):
    """Pairs of a role and a marked text, which for a model looks like reasoning and its end."""
    text = {"e": "", "s": "(system %d)", "u": "(user %d)", "m": "(model %d </think> end)"}
    return [(ROLE_NAMES[c], pads[0] + text[c] % i + pads[1] if text[c] else "")
            for i, c in enumerate(conversation)]


def render_conversations():
    """A program of its own, run apart: it renders on behalf of render() as transformers would,
    and is killed if the template asks for too much."""
    import json
    import sys

    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    asked = json.load(sys.stdin)
    try:
        import resource
        for what, most in (resource.RLIMIT_AS, asked["bytes"]), (resource.RLIMIT_CPU,
                                                                 asked["seconds"]):
            resource.setrlimit(what, (most, most))
    except (ImportError, ValueError, OSError):  # Windows, macOS: the parent watches the clock
        pass

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model is trained on, and writes nothing."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        def __init__(self, *args, **kwargs):
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError("it names an attribute " + name)
            super().__setitem__(name, value)

    def raise_exception(text):
        raise jinja2.exceptions.TemplateError(text)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def attempt(action):
        try:
            return action()
        except Exception as e:  # whatever the template provokes
            return [" ".join(("%s: %s" % (type(e).__name__, e)).split())[:200]]

    def rendered(messages, generate):
        text = template.render(
            messages=[{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=generate, tools=None, documents=None, **asked["names"])
        return text if len(text) < 1 << 20 else ["it writes a megabyte for a short conversation"]

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, namespace=Namespace,
                       strftime_now=lambda _: asked["now"], dict=lambda *a, **k: dict(*a, **k))
    template = attempt(lambda: env.from_string(asked["template"]))
    json.dump([template if isinstance(template, list) else attempt(lambda: rendered(*case))
               for case in asked["cases"]], sys.stdout)


def render(template, names):
    """{(conversation, generate, padded): text, or a list with the reason why there is none}"""
    cases = [(c, g, p) for c in CONVERSATIONS for g in (False, True) for p in (False, True)]
    asked = {"template": template, "names": names, "now": NOW, "seconds": CHAT_SECONDS,
             "bytes": CHAT_BYTES, "cases": [(messages_of(c, PADS if p else ("", "")), g)
                                            for c, g, p in cases]}
    program = "import sys\nsys.path[:] = %r\n%s\nrender_conversations()" % (
        sys.path, inspect.getsource(render_conversations))  # not what lies in this directory
    try:
        run = subprocess.run([sys.executable, "-c", program], input=json.dumps(asked).encode(),
                             capture_output=True, timeout=2 * CHAT_SECONDS)
        found = json.loads(run.stdout) if run.returncode == 0 else []
    except (subprocess.TimeoutExpired, ValueError):
        found = []
    if len(found) != len(cases):
        raise Inexpressible("it takes more than %d seconds or a gigabyte" % CHAT_SECONDS)
    return dict(zip(cases, found))


def written(facts, conversation, generate=False, padded=False):
    """What the facts make of a conversation, as gemma2.c does."""
    words = {"0": (), "1": CHAT_ROLES}.get(facts["chat.trim"], facts["chat.trim"].split())
    given = [(role.replace("assistant", "model"), text)
             for role, text in messages_of(conversation, PADS if padded else ("", ""))]
    texts = [text.strip() if role in words else text for role, text in given]
    out, fold = facts["chat.start"], ""
    if given[0][0] == "system":
        system, texts, given = texts[0], texts[1:], given[1:]
        if "chat.system.before" in facts:
            out = facts["chat.system.before"] + system + facts["chat.system.after"]
        elif system:
            fold = system + facts["chat.system.join"]
            if "fold" in words:
                fold, texts[0] = fold.lstrip(), given[0][1].rstrip()
    for (role, _), text in zip(given, texts):
        out += facts["chat.%s.before" % role] + fold + text + facts["chat.%s.after" % role]
        fold = ""
    return out + (facts["chat.generate"] if generate else "")


class Renderings:
    """A template's renderings, and the facts that give them all."""

    def __init__(self, found, bos):
        self.found, self.bos = found, bos

    def text(self, conversation, generate=False, padded=False):
        text = self.found[conversation, generate, padded]
        if isinstance(text, list):
            raise Inexpressible("it fails: " + text[0])
        if not text.startswith(self.bos):
            raise Inexpressible("it writes %s only before some conversations" % self.bos)
        return text[len(self.bos):]

    def around(self, conversation, generate=False):
        """What stands before, between and behind the messages that are not empty."""
        parts, rest = [], self.text(conversation, generate)
        for text in filter(None, (text for _, text in messages_of(conversation))):
            before, found, rest = rest.partition(text)
            if not found or text in rest:
                raise Inexpressible("it does not write each message once and in its place")
            parts.append(before)
        return parts + [rest]

    def turns(self, system):
        """The facts of user and model turns, from conversations that begin with `system`."""
        start, answer, again = self.around(system + "umu")[:3]
        user, model = self.around(system + "u")[-1], self.around(system + "um")[-1]
        opened = self.around(system + "u", True)[-1]
        for whole, end in (answer, user), (again, model), (opened, user):
            if not whole.startswith(end):
                raise Inexpressible("how it ends a turn depends on what follows")
        before = again[len(model):]
        if not start.endswith(before):
            raise Inexpressible("it begins the first turn differently from later ones")
        return {"chat.bos": "1" if self.bos else "0", "chat.start": without_end(start, before),
                "chat.user.before": before, "chat.user.after": user,
                "chat.model.before": answer[len(user):], "chat.model.after": model,
                "chat.generate": opened[len(user):]}

    def system(self, turns):
        """The facts of system text."""
        before, between = self.around("su")[:2]
        if between.endswith(turns["chat.user.before"]):
            return {"chat.system.before": before,
                    "chat.system.after": without_end(between, turns["chat.user.before"])}
        if before == turns["chat.start"] + turns["chat.user.before"]:
            return {"chat.system.join": between}
        raise Inexpressible("it puts system text into a place of its own")

    def with_trim(self, facts, systems, roles):
        """The facts with the chat.trim that gives all conversations which begin so."""
        fold = ["", " fold"] if "chat.system.join" in facts else [""]
        parts = [p for n in range(len(roles), -1, -1) for p in itertools.combinations(roles, n)]
        for names, fold in itertools.product(parts, fold):
            trim = " ".join(names) + fold
            found = {**facts, "chat.trim": {"": "0", " ".join(roles): "1"}.get(trim, trim)}
            if all(written(found, c, g, p) == self.text(c, g, p) for c, g, p in self.found
                   if c.rstrip("um") in systems):
                return found
        raise Inexpressible("no texts before and after each message give what it writes")

    def facts(self):
        needs_system = isinstance(self.found["u", False, False], list) and not isinstance(
            self.found["su", False, False], list)
        turns = self.turns("e" if needs_system else "")
        if needs_system:
            found = self.with_trim({**turns, **self.system(turns)}, ["s", "e"], CHAT_ROLES)
            warn("the chat template demands system text: without any, conversations begin with "
                 "an empty system message")
            return found
        found = self.with_trim(turns, [""], CHAT_ROLES[1:])
        if isinstance(self.found["su", False, False], list):
            return found
        try:
            return self.with_trim({**turns, **self.system(turns)}, ["", "s"], CHAT_ROLES)
        except Inexpressible as e:
            warn("the chat template is used without its system text: %s" % e)
            return found


def without_end(text, end):
    return text[:len(text) - len(end)]


def facts_of_template(template, names, bos):
    found = render(template, names)
    if any(NOW in text for text in found.values() if isinstance(text, str)):
        raise Inexpressible("it writes the time of day")
    has_bos = bos and all(text.startswith(bos) for text in found.values() if isinstance(text, str))
    try:
        facts = Renderings(found, bos if has_bos else "").facts()
    except Inexpressible:
        if not has_bos:
            raise
        facts = Renderings(found, "").facts()  # BOS before every user turn
    n_lines = sum(len(re.findall("[^\n]*\n|[^\n]+", text)) for key, text in facts.items()
                  if key not in ("chat.bos", "chat.trim", "chat.start"))
    if re.search("[\ud800-\udfff]", "".join(facts.values())):
        raise Inexpressible("it writes an unpaired surrogate, which is no character")
    if max(map(len, facts.values())) > MAX_CHAT_PART // 4 or n_lines > MAX_CHAT_LINES:
        raise Inexpressible("it writes more than %d lines around the messages" % MAX_CHAT_LINES)
    return facts


def chat_facts(template, names, tokenizer):
    """The facts of a chat template, {} without one.  Pieces that mark its turns become markers."""
    if template is None:
        return {}
    of_ids = {name + "_token": tokenizer.text(i) for name, i in tokenizer.ids.items()
              if i is not None}
    bos, kept = of_ids.get("bos_token", ""), {"chat_template": template}
    try:
        if not isinstance(template, str):
            kept = {}
            raise Inexpressible("it has several forms (%s), and none is called default"
                                % ", ".join(template)[:200])
        if has_jinja2():
            facts = facts_of_template(template, {**of_ids, **names}, bos)
        elif hashlib.sha256(template.encode("utf-8", "replace")).hexdigest() == GEMMA_TEMPLATE:
            facts = GEMMA_CHAT
        else:
            raise Inexpressible("it could not be read without jinja2 3.1.6 or newer: install that "
                                "(python3 -m pip install jinja2) and export again")
    except Inexpressible as e:
        warn("the chat template cannot be used, and conversations are refused: %s" % e)
        return {**kept, "chat.refused": str(e)}
    mark_turns(tokenizer, facts)
    return {**kept, **facts}


def has_jinja2():
    try:
        import jinja2
    except ImportError:
        return False
    return tuple(map(int, re.findall("[0-9]+", jinja2.__version__)[:3])) >= (3, 1, 6)


def mark_turns(tokenizer, facts):
    """Pieces with which the template marks turns become markers, and what ends the model's
    turn ends a text."""
    ids = {tokenizer.text(i): i for i, kind in reversed(list(enumerate(tokenizer.kinds)))
           if kind in (CONTROL, USER, MARKER) and tokenizer.text(i).strip()}
    pieces = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)")
    for text in facts.values():
        for found in pieces.findall(text):
            if tokenizer.kinds[ids[found]] == USER:  # control pieces never come from text
                tokenizer.kinds[ids[found]] = MARKER
    end = pieces.match(facts["chat.model.after"].lstrip())
    if end:
        tokenizer.stop_ids += (ids[end.group()],)


# =====================================================================================
# 6. The file
# =====================================================================================

MAGIC = b"\x89GEMMA2\n"
HEADER = struct.Struct("<8s2I4Q4I8IIfd4f128sI15I160x")  # bytes 0 .. 479; the identity follows
HEADER_BYTES = 512
ENTRY = struct.Struct("<4I4Q32s16x")

# One section: what its directory entry says; data is bytes for a small one, None for a tensor
Section = collections.namedtuple("Section", "name role layer type rows cols size data")


def lock(file):
    """Whether a file is now this process's alone, without its workers."""
    with contextlib.suppress(ImportError):  # Windows removes nothing that is open instead
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            return e.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks
    return True


class Container:
    """Writes the file under a temporary name: sections in order, then header and directory.

    Used in a with statement; unless finish() was reached, the temporary is removed and an
    older file of the same name stays as it was."""

    def __init__(self, path, sections, align, inputs):
        self.path = os.path.realpath(path)
        self.directory = os.path.dirname(self.path)
        self.check_target(inputs)
        self.sections, self.align = sections, align
        self.offsets, at = [], HEADER_BYTES + ENTRY.size * len(sections)
        for section in sections:
            at = round_up(at, align)
            self.offsets.append(at)
            at += section.size
        self.size = at
        self.digests = []
        self.temporary = os.path.join(self.directory, ".%s.tmp" % os.path.basename(self.path))
        self.file = None

    def check_target(self, inputs):
        if os.path.exists(self.path):
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ExportError("%s is no ordinary file: name the file to write" % self.path)
            beside = [os.path.join(d, n) for d in {os.path.dirname(i) for i in inputs}
                      for n in SIDE_FILES]
            if any(os.path.samefile(self.path, i) for i in [*inputs, *beside]
                   if os.path.exists(i)):
                raise ExportError("%s is an input of this conversion: choose another name for the "
                                  "output" % self.path)
        elif not os.path.isdir(self.directory):
            raise ExportError("the directory %s does not exist: make it first" % self.directory)

    def __enter__(self):
        return self

    def create_temporary(self):
        """Its writer holds a lock on it for as long as it lives, so that what a killed process
        left is taken over, and what another one writes is left alone."""
        if os.name == "nt":
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.temporary)
        while self.file is None:
            f = open(self.temporary, "wb", opener=lambda path, flags: os.open(
                path, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666))
            if not lock(f):
                raise ExportError("%s is being written by another process: wait for it, or choose "
                                  "another name for the output" % self.path)
            with contextlib.suppress(FileNotFoundError):  # else another made it its output
                if os.path.samestat(os.fstat(f.fileno()), os.stat(self.temporary)):
                    self.file = f
        self.file.truncate()
        free = shutil.disk_usage(self.directory).free
        if free < self.size:
            raise ExportError("%s has %s left and the output needs %s: make room, or choose a "
                              "smaller --type" % (self.directory, human(free), human(self.size)))

    def __exit__(self, *failure):
        with undisturbed():
            if self.file:
                with contextlib.suppress(OSError):  # a full disk has no room for its buffer
                    self.file.close()
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.temporary)

    def write_section(self, chunks):
        """Writes the next section from an iterable of bytes."""
        i = len(self.digests)
        if not i:  # not before: a signal must find the with statement begun
            with undisturbed():
                self.create_temporary()
        self.file.write(bytes(self.offsets[i] - self.file.tell()))  # first for the header
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            self.file.write(chunk)
            size += len(chunk)
        assert size == self.sections[i].size, "a section is not as long as planned"
        self.digests.append(digest.digest())

    def finish(self, model):
        directory = b"".join(
            ENTRY.pack(s.role, s.layer, TYPES[s.type].number if s.type in TYPES else 0, 0,
                       s.rows, s.cols, offset, s.size, digest)
            for s, offset, digest in zip(self.sections, self.offsets, self.digests))
        header = pack_header(model, self.size, len(self.sections), self.align)
        self.file.seek(0)
        self.file.write(header + hashlib.sha256(header + directory).digest() + directory)
        self.file.flush()
        os.fsync(self.file.fileno())
        if os.name == "nt":  # does not rename what is open
            self.file.close()
        ignore_signals()  # it is complete
        os.replace(self.temporary, self.path)  # still locked: no other run takes it for stale


def pack_header(m, file_bytes, n_entries, align):
    flags = np.array(m.local + (False,) * (1024 - m.L), bool)
    local = np.packbits(flags, bitorder="little").tobytes()
    stops = list(m.stop_ids) + [0] * (15 - len(m.stop_ids))
    return HEADER.pack(
        MAGIC, 1, HEADER_BYTES, 0, 0, file_bytes, HEADER_BYTES, n_entries, ENTRY.size, align, 0,
        m.L, m.D, m.N, m.K, m.H, m.F, m.V, m.window, m.context, m.eps, m.rope_theta,
        m.attn_softcap, m.final_softcap, m.query_scale, m.embedding_scale, local,
        len(m.stop_ids), *stops)


def facts_section(facts):
    out = [struct.pack("<I", len(facts))]
    for key, value in facts.items():
        key, value = key.encode("utf-8"), value.encode("utf-8", "replace")
        out.append(struct.pack("<II", len(key), len(value)) + key + value)
    return b"".join(out)


def bytes_section(name, role, data):
    return Section(name, role, 0, "bytes", 0, 0, len(data), data)


def human(n):
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return "%.4g %s" % (n, unit)
        n /= 1000


# =====================================================================================
# 7. Conversion
# =====================================================================================


def fixed_type(name, tied, options):
    """The type that a tensor must have: norms f32; else that of the last --tensor that matches,
    or --head for the output head; None where --type, --size or --bits decides."""
    if is_norm(name) or name == "score":
        return "f32"
    for pattern, type_name in reversed(options.tensor):
        if fnmatch.fnmatchcase(name, pattern):
            return type_name
    if options.head and name == ("embedding" if tied else "head"):
        return options.head
    return None


def choose_type(name, tied, options):
    """Only a q4 or q3 file keeps embedding, head and v at q6 (v is a fiftieth of the weights, and a
    quarter of the divergence if it is q4).  With --size and --bits all begins with the smallest."""
    fixed = fixed_type(name, tied, options)
    if fixed or options.fits:
        return fixed or LADDER[0]
    if options.type in ("q4", "q3") and name.split(".")[-1] in ("embedding", "head", "v"):
        return "q6"
    return options.type


def plan_tensors(reader, options):
    """(Section, name in the reader) of every tensor to write, in order of use."""
    tied = "head" not in reader.tensors
    second_head = tied and any(pattern == "head" for pattern, _ in options.tensor)
    plan = []
    for name, (role, layer, rows, cols) in tensor_table(reader.model).items():
        if name == "head" and tied and not second_head:
            continue
        if name == "head" and reader.model.kept is not None:
            rows = len(reader.model.kept)
        type_name = choose_type(name, tied, options)
        size = packed_bytes(type_name, rows, cols)
        plan.append((Section(name, role, layer, type_name, rows, cols, size, None),
                     "embedding" if name == "head" and tied else name))
    for pattern, _ in options.tensor:
        if not any(fnmatch.fnmatchcase(s.name, pattern) and not is_norm(s.name) for s, _ in plan):
            raise UsageError("--tensor %s matches no matrix of this model: names are embedding, "
                              "head, layers.0.q ... layers.%d.down" % (pattern, reader.model.L - 1))
    return plan


# ---- --size and --bits: the types that lose least for their bytes ----

LADDER = "q3", "q4", "q6", "q8"
# What a relative squared error of a matrix's products adds to the divergence of the next token
# (KL, nats), for a matrix of a layer in the units of harms(): with importance in blocks, in means,
# and without.  The less is known, the smaller products look.  A tied embedding does both harms.
HARM = {"q": (0.65, 0.2, 0.2), "k": (1.05, 0.3, 0.3), "v": (1.0, 0.8, 0.9), "o": (1.26, 0.76, 0.84),
        "gate": (0.95, 0.49, 0.48), "up": (0.65, 0.38, 0.38), "down": (0.94, 0.76, 0.57),
        "embedding": (0.7, 0.7, 0.7), "head": (4.3, 3.3, 1.3), "tied": (10.0, 5.4, 2.0)}
SAMPLED_TILES = 4
ROOMS = 1 << 16  # steps of bytes that best_levels tells apart


def sampled_rows(rows):
    """A few tiles of rows from all over a tensor, as one slab."""
    last = (rows - 1) // TILE
    tiles = sorted({last * i // (2 * SAMPLED_TILES) for i in range(1, 2 * SAMPLED_TILES, 2)})
    return [(i * TILE, min((i + 1) * TILE, rows)) for i in tiles]


def sample(job, name):
    tensor = job.reader.tensors[name]
    w = np.concatenate([tensor.rows(i, j) for i, j in sampled_rows(tensor.shape[0])])
    check_values(name, "f32", w)
    return w


def looseness(job, name):
    """The power of a matrix's products with inputs of the same size that go together in no way,
    relative to their real power.  It tells how much errors of the inputs matter."""
    w, moments = sample(job, name), job.importance.moments(job.importance.key(name, False))
    c = np.arange(moments.shape[1])
    power = weighted_square(w, moments)
    return weighted_square(w, moments[c % len(moments), c][None]) / power if power > 0 else 1.0


def harms(job, tied):
    """{matrix: what a relative squared error of its products adds to the divergence}.

    The norms behind o and down give what these add to the residual stream a size that no error
    changes, so the stream takes their errors in the share that they have in it, as the next
    layer's norm weighs the channels."""
    model, blocks = job.reader.model, job.importance and job.importance.block > 1
    found = {role: by[0 if blocks else 1 if job.importance else 2] for role, by in HARM.items()}
    found["embedding"] = found["tied" if tied else "embedding"]

    def squares(norm):
        w = job.reader.tensors[norm].rows(0, model.D)
        check_values(norm, "f32", w)
        return np.square(1 + w.astype(np.float64).reshape(-1))
    embedding = sample(job, "embedding").astype(np.float64)
    stream = model.embedding_scale ** 2 * np.square(embedding).mean(axis=0)  # power by channel
    for layer in range(model.L):
        name, after = "layers.%d." % layer, "layers.%d.attn_norm" % (layer + 1)
        o, down = squares(name + "post_attn_norm"), squares(name + "post_ffn_norm")
        stream += o + down
        weight = squares(after if layer + 1 < model.L else "final_norm")
        whole = stream @ weight
        for last, added, before, power in ("o", o, ("q", "k", "v"), 1), (
                "down", down, ("gate", "up"), 2):
            share = added @ weight / whole if whole > 0 else 0.0
            found[name + last] = found[last] * share
            if blocks:
                share *= looseness(job, name + last) ** power
            for role in before:
                found[name + role] = found[role] * share
    return found


def measured_harm(job, free, tied, options, progress):
    """For each (section, source) the harm of each type of the ladder."""
    tasks = []
    for section, source in free:
        key = job.importance.key(section.name, tied) if job.importance else None
        tasks += [(source, t, [sampled_rows(section.rows)], key) for t in LADDER]
    progress.start(len(tasks))
    results = pack_all(tasks, free, job, options.jobs)
    with np.errstate(all="ignore"):  # check_values finds what is not finite
        weights, harm = harms(job, tied), []
    try:
        for section, _ in free:
            harm.append([])
            for _ in LADDER:
                _, power, error = next(results)
                harm[-1].append(weights[section.name] * error / power if power > 0 else 0.0)
                progress.add(1)
    finally:
        results.close()
    return harm


def best_levels(extra, harm, room):
    """For each matrix the type of the ladder, such that the sum of harm is the least that
    extra bytes up to room allow (exactly so, but for rounding bytes up to whole units)."""
    most = sum(max(e) for e in extra)
    unit = max(math.gcd(*(b for e in extra for b in e)), -(-most // ROOMS), 1)
    room = min(room, most + len(extra) * unit) // unit
    least, choices = np.zeros(room + 1), []  # by room: the harm of the matrices so far
    for sizes, harms in zip(extra, harm):
        found = np.full((len(sizes), room + 1), np.inf)
        for t, more in enumerate(-(-b // unit) for b in sizes):
            found[t, more:] = harms[t] + least[:max(room + 1 - more, 0)]
        choices.append(found.argmin(axis=0).astype(np.int8))
        least = found.min(axis=0)
    levels = []
    for sizes, choice in zip(reversed(extra), reversed(choices)):
        levels.append(int(choice[room]))
        room -= -(-sizes[levels[-1]] // unit)
    return levels[::-1]


def fit_types(job, plan, other_bytes, align, options, progress):
    """The plan with types so chosen that it keeps to --size or --bits; other_bytes are those of
    the file that no type changes."""
    tied = all(section.name != "head" for section, _ in plan)
    free = {i for i, (s, _) in enumerate(plan) if not fixed_type(s.name, tied, options)}
    order = sorted(free)
    sizes = [[packed_bytes(t, plan[i][0].rows, plan[i][0].cols) for t in LADDER] for i in order]
    unit = align if options.size else 1
    wish = options.size or int(options.bits * sum(s.rows * s.cols for s, _ in plan) / 8)
    used = sum(round_up(s.size, unit) for s, _ in plan) + (other_bytes if options.size else 0)
    if used > wish:
        what, least = (("size", human(used)) if options.size else
                       ("bits", "%.3f" % (options.bits * used / wish)))
        raise UsageError("--%s is too small: the least that can be made of this model is %s%s" % (
            what, least, " bits a weight" if options.bits else " (%d bytes)" % used))
    harm = measured_harm(job, [plan[i] for i in order], tied, options, progress)
    extra = [[round_up(b, unit) - round_up(row[0], unit) for b in row] for row in sizes]
    level = best_levels(extra, harm, wish - used)
    plan = list(plan)
    for n, i in enumerate(order):
        section, source = plan[i]
        plan[i] = section._replace(type=LADDER[level[n]], size=sizes[n][level[n]]), source
    return plan


def plan_lines(plan, model):
    """How many matrices of a role get which type."""
    roles = {}
    for section, _ in plan:
        if not is_norm(section.name):
            roles.setdefault(section.name.rsplit(".", 1)[-1], collections.Counter())[
                section.type] += 1
    return ["types chosen:"] + ["  %-10s %s" % (role, ", ".join(
        "%s%s" % (t, " x %d" % n if n > 1 or sum(types.values()) > 1 else "")
        for t, n in sorted(types.items()))) for role, types in roles.items()]


# ---- the file of `run --importance`, described in run.c --

INPUTS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
IMPORTANCE_HEADER = struct.Struct("<8s2I7IIQQ")


class Importance:
    """Moments of the inputs of every matrix, read when they are needed."""

    def __init__(self, path, model):
        self.path = path
        with open(path, "rb") as f:
            head = f.read(IMPORTANCE_HEADER.size)
        if len(head) < IMPORTANCE_HEADER.size or head[:8] != b"\x89GEMMAI\n":
            raise ExportError("%s holds no importance: make one with run MODEL --importance OUT "
                              "-f TEXT" % path)
        _, version, self.block, *sizes, zero, self.tokens, more = IMPORTANCE_HEADER.unpack(head)
        sound = version == 1 and self.tokens and not zero and not more
        if not sound or self.block not in (1, *range(32, 1025, 32)):
            raise ExportError("%s is damaged, or of another version: make it again" % path)
        self.check_sizes(sizes, model)
        self.offsets, at = {}, IMPORTANCE_HEADER.size
        for layer in range(model.L):
            for name in ("q", "o", "gate", "down"):
                cols = {"o": model.N * model.H, "down": model.F}.get(name, model.D)
                self.offsets["layers.%d.%s" % (layer, name)] = at, cols
                at += 4 * self.block * cols
        self.offsets["head"] = at, model.D
        at += 4 * self.block * model.D
        if os.path.getsize(path) != at:
            raise ExportError("%s has %d bytes, not %d: make it again"
                              % (path, os.path.getsize(path), at))

    def check_sizes(self, sizes, model):
        for name, have in zip("LDNKHFV", sizes):
            want = getattr(model, name)
            if have != want:
                raise ExportError("%s was made with another model (%s is %d, here %d): run the "
                                  "same checkpoint to make it" % (self.path, name, have, want))

    def key(self, name, tied):
        """Which input the matrix of that name multiplies; None where it only looks up rows."""
        if is_norm(name) or name == "score":
            return None
        if name in ("embedding", "head"):
            return "head" if name == "head" or tied else None
        layer, matrix = name.rsplit(".", 1)
        return "%s.%s" % (layer, INPUTS[matrix])

    def moments(self, key):
        """[block, cols], damped."""
        def read():
            offset, cols = self.offsets[key]
            raw = read_at(self.path, offset, 4 * self.block * cols).view("<f4")
            found = raw.reshape(self.block, cols)
            self.check_moments(found, key)
            return damped(found, self.tokens)
        return keep("moments", (self.path, key), read)

    def check_moments(self, found, key):
        blocks = blocks_of(found, round_up(found.shape[1], self.block))
        with np.errstate(invalid="ignore", over="ignore"):
            squares = np.einsum("bii->bi", blocks).astype(np.float64)
            most = np.sqrt(squares[:, :, None] * squares[:, None, :]) * 1.001
            sound = (squares >= 0).all() and (squares < HUGE).all() and (
                np.abs(blocks) <= most).all() and (blocks == blocks.transpose(0, 2, 1)).all()
        if not sound:
            raise ExportError("%s is damaged: what it says of %s are no means of products; make "
                              "it again" % (self.path, key))


# ---- Fisher information: which errors the next token's probabilities feel ----------------
#
# Importance tells how large the error of a product is, and nothing of what comes of it.  Let g be
# the gradient of log p(t) with regard to a product y = W x, t a token drawn from the model's own
# probabilities.  An error E of W then costs half the mean of (g^T E x)^2 in divergence.  That is
# taken apart (K-FAC) into tr(G E M E^T): G the mean of g g^T, M that of |g|^2 x x^T.  M takes the
# place of the importance's moments, and G lets rows make up for the errors of rows before them.

FISHER_CHUNK, FISHER_BATCH, HEAD_TOKENS = 512, 4096, 256  # tokens
OUTPUT_DAMPING = 0.1
PHASES = 16  # in which the tiles of a slab are rounded


def coupled_rows(rows, cols):
    """The ranges of rows that make up for each other's errors: a slab's."""
    return row_blocks(rows, cols, 4 * SLAB)


class Fisher:
    """G and M of every matrix of the layers, in blocks, in a file that worker processes read."""

    def __init__(self, path, model, block, tokens):
        self.path, self.block, self.tokens = path, block, tokens
        self.places, self.size = {}, 0  # by matrix and first row of G's block, or "inputs"
        for name, (_, _, rows, cols) in tensor_table(model).items():
            if name.startswith("layers.") and not is_norm(name):
                self.place(name, "inputs", (round_up(cols, block) // block, block, block))
                for start, stop in coupled_rows(rows, cols):
                    self.place(name, start, (1, stop - start, stop - start))

    def place(self, name, part, shape):
        self.places[name, part] = self.size, shape
        self.size += 4 * math.prod(shape)

    def read(self, name, part):
        at, shape = self.places[name, part]
        found = read_at(self.path, at, 4 * math.prod(shape)).view("<f4").reshape(shape)
        if not np.isfinite(found).all():
            raise ExportError("--fisher: the gradients at %s are not finite: the checkpoint is "
                              "damaged, or its training diverged" % name)
        return found

    def moments(self, name, cols):
        """As Importance.moments."""
        def read():
            found = self.read(name, "inputs").transpose(1, 0, 2).reshape(self.block, -1)
            return damped(np.ascontiguousarray(found[:, :cols]), self.tokens)
        return keep("fisher", (self.path, name), read)

    def outputs(self, name, start):
        found = self.read(name, start)[0].astype(np.float64)
        mean = np.trace(found) / len(found)
        return found + np.eye(len(found)) * (OUTPUT_DAMPING * mean if mean > 0 else 1)


def pack_in_phases(w, type_name, moments, outputs):
    """As pack() of a type.  The error of each phase's tiles moves all later ones, so that these
    make up for it under outputs [rows, rows] as well as real numbers could."""
    moved, lost, tile = w.copy(), np.empty_like(w), np.arange(len(w)) // TILE
    packed = np.empty((tile[-1] + 1, TYPES[type_name].tile_bytes(w.shape[1])), np.uint8)
    for phase in range(min(PHASES, len(packed))):
        now, later = tile % PHASES == phase, tile % PHASES > phase
        data, error = TYPES[type_name].pack(moved[now], moments)
        packed[phase::PHASES] = np.frombuffer(data, np.uint8).reshape(-1, packed.shape[1])
        lost[now] = w[now] - (moved[now] - error)
        if later.any():
            pull = outputs[np.ix_(later, now)] @ error
            moved[later] += np.linalg.solve(outputs[np.ix_(later, later)], pull)
    return packed.tobytes(), lost


def fisher_ids(path, importance, tokenizer):
    """Chunks of ids, each with BOS first."""
    if importance.block == 1:
        raise UsageError("--fisher needs importance in blocks, and %s has none: make it with "
                         "--importance-block 256" % importance.path)
    with open(path, "rb") as f:
        words = f.read().split()
    if not all(re.fullmatch(rb"\d{1,7}", w) and int(w) < len(tokenizer) for w in words):
        raise ExportError("%s holds something else than this model's ids: make it with run MODEL "
                          "--tokenize -f TEXT" % path)
    chunk = min(FISHER_CHUNK, len(words))
    if chunk < 32:
        raise ExportError("%s holds %d ids: take a text of some 17,000" % (path, len(words)))
    ids = np.array(words[:len(words) // chunk * chunk], np.int64).reshape(-1, chunk)
    if tokenizer.ids.get("bos") is not None:
        ids[:, 0] = tokenizer.ids["bos"]
    return ids


class Pass:
    """The model in torch, a layer at a time, for a batch of ids [chunks, T]."""

    def __init__(self, torch, reader, T):
        self.torch, self.reader, self.model = torch, reader, reader.model
        at, half = torch.arange(T), torch.arange(0, reader.model.H, 2) / reader.model.H
        angle = at.double()[:, None] * self.model.rope_theta ** -half.double()
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        self.ahead = at[:, None] - at

    def tensor(self, name):
        tensor = self.reader.tensors[name]
        if isinstance(tensor, Ordered):  # by --keep-vocab: ids mean the checkpoint's rows
            tensor = tensor.tensor
        return self.torch.from_numpy(np.ascontiguousarray(tensor.rows(0, tensor.shape[0])))

    def weights(self, layer):
        return {name: self.tensor("layers.%d.%s" % (layer, name)) for name, *_ in LAYER_ROLES}

    def norm(self, x, w):
        return x * (x.square().mean(-1, keepdim=True) + self.model.eps).rsqrt() * (1 + w[:, 0])

    def turned(self, x):
        a, b = x.chunk(2, -1)
        return self.torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)

    def layer(self, x, w, local, products):
        """x [chunks, T, D] after a layer; products[matrix] becomes (inputs, outputs)."""
        torch, m = self.torch, self.model

        def times(name, x):
            products[name] = x, x @ w[name].T
            return products[name][1]

        def heads(x):
            return x.unflatten(-1, (-1, m.H)).transpose(1, 2)
        y = self.norm(x, w["attn_norm"])
        q, k, v = (heads(times(name, y)) for name in "qkv")
        k, v = (a.repeat_interleave(m.N // m.K, 1) for a in (self.turned(k), v))
        scores = self.turned(q) @ k.transpose(2, 3) * m.query_scale
        if m.attn_softcap:
            scores = torch.tanh(scores / m.attn_softcap) * m.attn_softcap
        hidden = (self.ahead < 0) | (self.ahead >= (m.window if local else len(self.ahead)))
        seen = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        x = x + self.norm(times("o", seen.transpose(1, 2).flatten(2)), w["post_attn_norm"])
        y = self.norm(x, w["ffn_norm"])
        gate = torch.nn.functional.gelu(times("gate", y), approximate="tanh")
        return x + self.norm(times("down", gate * times("up", y)), w["post_ffn_norm"])

    def head(self, states, rows):
        """The gradients of log p(t) with regard to states [tokens, D], for a t drawn for each."""
        torch, cap, found = self.torch, self.model.final_softcap, []
        for x in states.split(HEAD_TOKENS):
            logits = torch.cat([x @ part.float().T for part in rows.split(1 << 14)], 1)
            bent = torch.tanh(logits / cap) if cap else torch.zeros(())
            p = (bent * cap if cap else logits).softmax(1)
            p.scatter_add_(1, torch.multinomial(p, 1), torch.full((len(x), 1), -1.0))
            p *= 1 - bent.square()
            found.append(sum(a @ b.float() for a, b in zip(p.split(1 << 14, 1),
                                                           rows.split(1 << 14))))
        return torch.cat(found)


def gather_fisher(job, ids, jobs, progress):
    """Fills a Fisher's file from chunks of ids.  Memory holds one layer's weights in f32, the
    head's in bf16 and, of a batch, the inputs of every layer; sums lie in the file."""
    torch = library("torch", "torch", "--fisher")
    torch.manual_seed(0)
    torch.set_num_threads(jobs)
    fisher, model = job.fisher, job.reader.model
    directory = os.path.dirname(os.path.dirname(fisher.path))
    free = shutil.disk_usage(directory).free
    if free < fisher.size:  # writing to the map would kill the process
        raise ExportError("%s has %s left and --fisher needs %s for a while: make room"
                          % (directory, human(free), human(fisher.size)))
    sums = np.memmap(fisher.path, "<f4", "w+", shape=fisher.size // 4)
    run = Pass(torch, job.reader, ids.shape[1])
    embedding = run.tensor("embedding").bfloat16()
    head = run.tensor("head").bfloat16() if "head" in job.reader.tensors else embedding
    batches = np.array_split(ids, -(-ids.size // FISHER_BATCH))
    progress.start(len(batches) * 2 * model.L)

    def add(name, part, a):  # [blocks, tokens, n]
        at, shape = fisher.places[name, part]
        total = torch.from_numpy(sums[at // 4:at // 4 + math.prod(shape)]).view(shape)
        total.baddbmm_(a.transpose(1, 2), a)

    for batch in batches:
        batch = torch.from_numpy(batch)
        with torch.no_grad():
            inputs = [embedding[batch].float() * model.embedding_scale]
            for layer in range(model.L):
                inputs.append(run.layer(inputs[-1], run.weights(layer), model.local[layer], {}))
                progress.add(1)
        x = inputs.pop().requires_grad_()
        states = run.norm(x, run.tensor("final_norm"))
        states.backward(run.head(states.detach().flatten(0, 1), head).view_as(states))
        for layer in reversed(range(model.L)):
            gradient, x, products = x.grad, inputs.pop().requires_grad_(), {}
            weights = run.weights(layer)
            y = run.layer(x, weights, model.local[layer], products)
            wanted = [x, *(out for _, out in products.values())]
            x.grad, *found = torch.autograd.grad(y, wanted, gradient)
            for (matrix, (given, _)), g in zip(products.items(), found):
                name, g = "layers.%d.%s" % (layer, matrix), g.flatten(0, 1)
                given = given.detach().flatten(0, 1) * g.square().sum(1, keepdim=True).sqrt()
                given = torch.nn.functional.pad(given, (0, -given.shape[1] % fisher.block))
                add(name, "inputs", given.unflatten(1, (-1, fisher.block)).transpose(0, 1))
                for start, stop in coupled_rows(g.shape[1], weights[matrix].shape[1]):
                    add(name, start, g[None, :, start:stop])
            progress.add(1)
    sums.flush()


# What packing needs beside the task: the checkpoint, an Importance or None, a Fisher or None
Job = collections.namedtuple("Job", "reader importance fisher", defaults=(None,))
worker_job = None  # in each worker process


def start_worker(job):
    """Workers leave signals to the parent and never outlive it."""
    global worker_job
    worker_job = job
    ignore_signals()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow():
        parent.join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def pack_rows(task, job=None):
    """Packs slabs of a tensor, each a list of (first row, end): bytes, sum w^2, sum (w - w')^2,
    these weighted where the importance of the inputs is known."""
    name, type_name, slabs, key = task
    job = job or worker_job
    moments = job.importance.moments(key) if key else None
    packed, power, error = [], 0.0, 0.0
    for slab in slabs:
        with np.errstate(all="ignore"):  # check_values finds what is not finite
            w = np.concatenate([job.reader.tensors[name].rows(i, j) for i, j in slab])
        check_values(name, type_name, w)
        if job.fisher and (name, slab[0][0]) in job.fisher.places and type_name in LADDER:
            moments = job.fisher.moments(name, w.shape[1])
            data, lost = pack_in_phases(w, type_name, moments, job.fisher.outputs(name, slab[0][0]))
        else:
            data, lost = TYPES[type_name].pack(w, moments)
        packed.append(data)
        power += weighted_square(w, moments)
        error += 0.0 if lost is None else weighted_square(lost, moments)
    return b"".join(packed), power, error


def check_values(name, type_name, w):
    top = max(float(w.max()), -float(w.min()))  # NaN where there is one
    if not math.isfinite(top):
        raise ExportError("%s holds NaN or infinity: the checkpoint is damaged, or its training "
                          "diverged" % name)
    if top > HUGE and type_name not in ("f32", "bf16"):
        raise ExportError("%s holds %g, too large to quantise: add --tensor %s=bf16"
                          % (name, top, name))


def tasks_of(section, source, importance, tied):
    """Parts of a tensor of about 2^20 weights."""
    key = importance.key(section.name, tied) if importance else None
    broad = key and importance.block > 1  # settle's many small steps want more rows
    per_task = 2 if broad else 8
    blocks = (coupled_rows if broad else row_blocks)(section.rows, section.cols)
    slabs = [[rows] for rows in blocks]
    return [(source, section.type, slabs[i:i + per_task], key)
            for i in range(0, len(slabs), per_task)]


def pack_all(tasks, plan, job, jobs):
    """Yields the results of every task, in order, few ahead of the consumer."""
    jobs = min(jobs, job.reader.most_jobs)
    weights = sum(s.rows * s.cols for s, _ in plan)
    if jobs < 2 or weights < 1 << 24:
        for task in tasks:
            yield pack_rows(task, job)
        return
    how = multiprocessing.get_context(job.reader.start_method)
    pool = futures.ProcessPoolExecutor(jobs, how, initializer=start_worker, initargs=(job,))
    waiting = collections.deque()
    try:
        for task in tasks:
            with undisturbed():  # it may start a worker
                waiting.append(pool.submit(pack_rows, task))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (RuntimeError, BlockingIOError):  # a broken pool; no thread more; no process more
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise ExportError("a worker process was killed or could not start, for want of memory "
                          "perhaps: use fewer (-j 1)") from None
    finally:
        with contextlib.suppress(RuntimeError):  # its thread never started
            pool.shutdown(cancel_futures=True)


def write_tensors(out, job, plan, options, progress):
    """Packs and writes every tensor; returns the relative error of each."""
    tied = all(section.name != "head" for section, _ in plan)
    tasks = [tasks_of(section, source, job.importance, tied) for section, source in plan]
    progress.start(sum(s.rows * s.cols for s, _ in plan))
    results = pack_all((t for part in tasks for t in part), plan, job, options.jobs)
    errors = []
    try:
        for (section, _), part in zip(plan, tasks):
            sums = [0.0, 0.0]

            def chunks():
                for _, _, slabs, _ in part:
                    data, power, error = next(results)
                    sums[0] += power
                    sums[1] += error
                    progress.add((slabs[-1][-1][1] - slabs[0][0][0]) * section.cols)
                    yield data
            out.write_section(chunks())
            errors.append(math.sqrt(max(sums[1], 0) / sums[0]) if sums[0] > 0 else 0.0)
    finally:
        results.close()  # ends the workers
    return errors


def stop_ids(model, tokenizer):
    """Ids that end a text: the config's, the tokenizer's, and <eos> and <end_of_turn> whatever
    these say (the 9B and 27B chat models' config forgets the latter)."""
    ids = [*model.stop_ids, *tokenizer.stop_ids]
    ids += [tokenizer.ids.get("eos"), tokenizer.ids.get("end_of_turn")]
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    wrong = [i for i in ids if i >= len(tokenizer)]
    if wrong:
        raise ExportError("eos_token_id %d is outside the vocabulary of %d: correct config.json or "
                          "generation_config.json" % (wrong[0], len(tokenizer)))
    if len(ids) > 15:
        raise ExportError("there are %d ids that end a text, and 15 can be: shorten eos_token_id "
                          "in config.json" % len(ids))
    return tuple(ids)


def keep_vocabulary(path, reader, tokenizer):
    """Notes which ids can be written, and puts their rows first in embedding and head."""
    with open(path, "rb") as f:
        words = {m.group() for m in re.finditer(rb"[^\s,]+", f.read())}
    for word in words:
        if not re.fullmatch(rb"\d{1,9}", word) or int(word) >= len(tokenizer):
            raise ExportError("%s holds %.20r, which is no id of this vocabulary of %d: --keep-vocab "
                              "takes ids, as run --tokenize prints them" % (
                                  path, word.decode("utf-8", "replace"), len(tokenizer)))
    if not words:
        raise ExportError("%s holds no ids: --keep-vocab takes those that run --tokenize prints"
                          % path)
    is_kept = ~np.isin(tokenizer.kinds, (NORMAL, UNUSED))
    is_kept[[*map(int, words), *reader.model.stop_ids]] = True
    reader.model.kept = np.flatnonzero(is_kept)
    order = np.concatenate([reader.model.kept, np.flatnonzero(~is_kept)])
    for name in {"embedding", "head"} & set(reader.tensors):
        reader.tensors[name] = Ordered(reader.tensors[name], order)


GEMMA_NOTICE = ("Gemma is provided under and subject to the Gemma Terms of Use found at "
                "ai.google.dev/gemma/terms")


def gather_facts(options, name, source, is_gemma, chat, how):
    facts = {"name": options.name or name, "source": options.source or source,
             "license": options.license or (GEMMA_NOTICE if is_gemma else None),
             "export": "export.py %s %s" % (VERSION, how)}
    return {**{k: v for k, v in facts.items() if v}, **chat}


def options_text(options):
    """The options that shaped the weights, for the file's facts."""
    words = ["--size %d" % options.size if options.size else "--bits %g" % options.bits
             if options.bits else "--type " + options.type]
    words += ["--head " + options.head] if options.head else []
    words += ["--importance " + os.path.basename(options.importance)] if options.importance else []
    words += ["--fisher " + os.path.basename(options.fisher)] if options.fisher else []
    words += ["--keep-vocab " + os.path.basename(options.keep_vocab)] if options.keep_vocab else []
    words += ["--tensor %s=%s" % pair for pair in options.tensor]
    words += ["--lora %s=%g" % (directory_name(path), scale) for path, scale in options.lora]
    return " ".join(words)


def convert(options, progress):
    started = time.monotonic()
    reader = open_checkpoint(options.input)
    check_shapes(reader)
    settle_head(reader)
    reader = with_adapters(reader, options.lora)
    model = reader.model
    tokenizer_path, tokenizer = find_tokenizer(options.tokenizer, reader, model.V)
    finish_tokenizer(tokenizer, model.V, tokenizer_path)
    chat = chat_facts(*reader.chat_template(), tokenizer)
    model.stop_ids = stop_ids(model, tokenizer)
    if options.keep_vocab:
        keep_vocabulary(options.keep_vocab, reader, tokenizer)
    plan = plan_tensors(reader, options)
    importance = Importance(options.importance, model) if options.importance else None
    facts = gather_facts(options, reader.name(), reader.source, model.V >= 256000,
                         chat, options_text(options))
    sections = [bytes_section("facts", FACTS, facts_section(facts)),
                bytes_section("tokenizer", TOKENIZER, tokenizer_section(tokenizer))]
    if model.kept is not None:
        sections.append(bytes_section("kept", KEPT, model.kept.astype("<u4").tobytes()))
    tiny = (options.size or sum(s.size for s, _ in plan)) < 1 << 20
    align = options.align or (64 if tiny else 4096)
    ids = fisher_ids(options.fisher, importance, tokenizer) if options.fisher else None
    job = Job(reader, importance)
    if options.fits:
        other = round_up(HEADER_BYTES + ENTRY.size * (len(plan) + len(sections)), align) + sum(
            round_up(s.size, align) for s in sections)
        plan = fit_types(job, plan, other, align, options, progress)
        progress.clear()
        if not options.quiet:
            say(plan_lines(plan, model))
    small = list(sections)
    sections += [s for s, _ in plan]
    inputs = [*reader.files, tokenizer_path, options.importance, options.fisher,
              options.keep_vocab]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(Container(options.output, sections, align,
                                            list(filter(None, inputs))))
        if options.fisher:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=out.directory))
            stack.callback(handles.clear)  # Windows removes nothing that is open
            job = job._replace(fisher=Fisher(os.path.join(folder, "fisher"), model,
                                             importance.block, ids.size))
            try:
                gather_fisher(job, ids, options.jobs, progress)
            except RuntimeError as e:  # so torch says that memory is short
                raise ExportError("--fisher failed in torch (%s): without it less memory is needed"
                                  % str(e).split("\n")[0][:200]) from None
        for section in small:
            out.write_section([section.data])
        errors = write_tensors(out, job, plan, options, progress)
        out.finish(model)
    seconds = time.monotonic() - started
    lines = report(options.output, out.size, [s for s, _ in plan], errors, seconds)
    if model.kept is not None:
        lines.append("%d of %d pieces can be written" % (len(model.kept), model.V))
    return lines + (["errors are weighted by the importance of the inputs"] if importance else [])


def report(path, file_bytes, sections, errors, seconds):
    """Lines: one for each tensor, then the totals."""
    row = "%-26s %-5s %16s %14s %12s"
    lines = [row % ("tensor", "type", "shape", "bytes", "rel. error")]
    lines += [row % (s.name, s.type, "%d x %d" % (s.rows, s.cols), s.size, "%.3e" % error)
              for s, error in zip(sections, errors)]
    weights = sum(s.rows * s.cols for s in sections)
    size = sum(s.size for s in sections)
    return lines + [
        "%d tensors, %d weights, %d bytes of weights (%.3f bits a weight)" % (
            len(sections), weights, size, 8 * size / weights),
        "%s: %d bytes (%s) in %.1f seconds" % (path, file_bytes, human(file_bytes), seconds)]


def convert_tokenizer(options, _progress):
    """A file of ours with nothing but facts and tokenizer."""
    place = located(options.input, A_TOKENIZER, with_weights=False)
    path, tokenizer = find_tokenizer(place, None, 0)
    finish_tokenizer(tokenizer, 0, path)
    model = Model()
    model.V = len(tokenizer)
    template, names = chat_template(place) if os.path.isdir(place) else (None, {})
    chat = chat_facts(template, names, tokenizer)
    model.stop_ids = stop_ids(model, tokenizer)
    facts = gather_facts(options, "Gemma 2 tokenizer" if model.V >= 256000 else "tokenizer",
                         os.path.basename(path), False, chat, "--tokenizer-only")
    sections = [bytes_section("facts", FACTS, facts_section(facts)),
                bytes_section("tokenizer", TOKENIZER, tokenizer_section(tokenizer))]
    with Container(options.output, sections, options.align or 64, [path]) as out:
        for section in sections:
            out.write_section([section.data])
        out.finish(model)
    kinds = collections.Counter(tokenizer.kinds)
    names = "normal", "unknown", "control", "user", "unused", "byte", "marker"
    return ["%s: %d pieces (%s), %d bytes" % (options.output, len(tokenizer), ", ".join(
        "%d %s" % (kinds[k], n) for k, n in enumerate(names, 1) if kinds[k]), out.size)]


# =====================================================================================
# 8. Main
# =====================================================================================


def complaint(error):
    """One sentence for a failure of the system."""
    if isinstance(error, MemoryError):
        return "out of memory: use fewer workers (-j 1)"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return "no space left on the disk of the output: make room, or choose a smaller --type"
    if error.errno == errno.EFBIG:
        return ("the disk of the output holds no file that large (FAT32 none of 4 GB): choose "
                "another, or a smaller --type")
    return "%s: %s" % (error.filename or "reading or writing failed", error.strerror or error)


def say(lines):
    """The report.  The output is complete by now, whatever becomes of standard output."""
    try:
        print("\n".join(lines), flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(e, BrokenPipeError):  # whose reader has seen enough
            warn("the report could not be written (%s); the output is complete" % e.strerror)


def main(arguments):
    options = parse_options(arguments)
    stop_on_signals()
    try:
        with contextlib.closing(Progress(not options.quiet)) as progress:
            lines = (convert_tokenizer if options.tokenizer_only else convert)(options, progress)
    except UsageError as e:
        complain(str(e))
        return 2
    except (ExportError, OSError, MemoryError) as e:
        complain(str(e) if isinstance(e, ExportError) else complaint(e))
        return 1
    except Stopped as e:
        complain("interrupted")
        return 128 + e.args[0]
    finally:
        ignore_signals()  # too late for them
    if not options.quiet:
        say(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
