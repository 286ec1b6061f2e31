"""Writes tests/golden/, the committed data that `make test` compares the engine with.
Needs torch (CPU), transformers, sentencepiece and numpy.  Run it again only if the weight
file's layout or the list of traced activations changes.

  python3 tests/make_golden.py            everything
  python3 tests/make_golden.py both long  the models of these names only

tiny.model      a SentencePiece BPE vocabulary of 347 pieces, set up as Gemma's is;
                trained once and kept, so that the other files stay the same

NAME.bin        a random Gemma 2 model of odd shape: written as a checkpoint by
                transformers, converted by export.py --align 64
NAME.trace      what transformers computes for it in float32 with eager attention:

                "G2TRACE\\n", then records up to the end of the file, little-endian:
                  char name[32]   zero-padded
                  i32  layer      0 where the activation belongs to none
                  u32  rows, cols
                  f32  data[rows][cols]
                The first record, "tokens" [1, T], holds the prompt's ids.  The second,
                "rows" [1, R], holds the positions of the rows in all later records.
                Those records have the names that gemma2_set_hook in gemma2.h uses.

story.txt       the demo model's greedy text: a line E with the prompt, a line D with the
                continuation, in the format of tokens.txt.  The engine writes it, and
                oracle.py checks it against transformers

tokens.txt      vectors for tokenizer.bin, a line each, bytes in hexadecimal, - for none:
                  E bytes n ids    what SentencePiece makes of the text
                  P bytes n ids    GEMMA2_ENCODE_PLAIN: the same algorithm without the
                                   marker pieces (reference.py, checked against
                                   SentencePiece with all pieces)
                  D bytes n ids    what SentencePiece decodes the ids to
"""
import io
import os
import random
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import numpy as np

import reference as ref

# No width has a square root in bf16, and no dimension is a multiple of 16.
MODELS = {
    # Both soft-caps, irregular layers, head_dim != D / N, two query heads a kv head.
    "both": dict(layers="LGGL", vocab_size=347, hidden_size=42, num_attention_heads=6,
                 num_key_value_heads=3, head_dim=10, intermediate_size=50,
                 query_pre_attn_scalar=7),
    # Attention soft-cap only; untied head, odd D, three query heads a kv head, theta 500.
    "untied": dict(layers="GLL", vocab_size=341, hidden_size=45, num_attention_heads=3,
                   num_key_value_heads=1, head_dim=14, intermediate_size=70,
                   query_pre_attn_scalar=11, attn_logit_softcapping=20.0,
                   final_logit_softcapping=None, tie_word_embeddings=False, rms_norm_eps=1e-2,
                   rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    # Final soft-cap only; as many kv heads as query heads, all layers local.
    "final": dict(layers="LL", vocab_size=333, hidden_size=50, num_attention_heads=5,
                  num_key_value_heads=5, head_dim=6, intermediate_size=33,
                  query_pre_attn_scalar=5, attn_logit_softcapping=None,
                  final_logit_softcapping=15.0),
    # No soft-cap; a prompt past position 256, where bf16 can no longer count.
    "long": dict(layers="LG", vocab_size=339, hidden_size=26, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, intermediate_size=41,
                 query_pre_attn_scalar=5, attn_logit_softcapping=None,
                 final_logit_softcapping=None),
    # Every number format in one file; transformers runs the dequantised weights.
    "mixed": dict(layers="LG", vocab_size=337, hidden_size=38, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=12, intermediate_size=35,
                  query_pre_attn_scalar=12),
    # q3 in every matrix, an odd number of columns, a row of several blocks.
    "three": dict(layers="LG", vocab_size=335, hidden_size=38, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=12, intermediate_size=275,
                  query_pre_attn_scalar=12),
}
EXPORT_OPTIONS = {"mixed": ["--type", "q8", "--head", "q6", "--tensor", "*.q=q4",
                            "--tensor", "*.up=q4", "--tensor", "*.k=bf16",
                            "--tensor", "*.down=q6"],
                  "three": ["--type", "q3", "--head", "q3", "--tensor", "*.v=q3"]}
# Positions whose activations are kept: window filling, full, and far past its first wrap.
ROWS = {"both": [0, 1, 6, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 40, 43],
        "long": [0, 7, 8, 9, 63, 127, 128, 200, 255, 256, 257, 258, 297, 298, 299]}
LENGTH = {"long": 300}

MARKERS = ["<start_of_turn>", "<end_of_turn>", "<mask>", "<unused0>"]
SYMBOLS = MARKERS + ["\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<b>", "</b>"]
TEXT = """Once upon a time there was a king who had three daughters, and the youngest was
so fair that the sun itself was astonished whenever it shone in her face. Close by the
castle lay a great dark forest, and under an old lime tree in the forest was a well; and
when the day was very warm, the king's child went out into the forest and sat down by the
side of the cool fountain, and when she was bored she took a golden ball and threw it up
and caught it, and this ball was her favourite plaything. 1234567890 äöüß éè → 生活 😈 """


def tiny_tokenizer():
    """tiny.model: trained once on the text above."""
    path = os.path.join(ref.GOLDEN, "tiny.model")
    if not os.path.exists(path):
        import sentencepiece
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n") * 3), model_writer=out, model_type="bpe",
            vocab_size=347, byte_fallback=True, user_defined_symbols=SYMBOLS,
            normalization_rule_name="identity", add_dummy_prefix=False, split_digits=True,
            remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
            pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
            minloglevel=2)
        with open(path, "wb") as f:
            f.write(out.getvalue())
    with open(path, "rb") as f:
        return f.read()


def cut_tokenizer(model, size):
    """The model with its first size pieces only."""
    from sentencepiece import sentencepiece_model_pb2 as pb
    m = pb.ModelProto()
    m.ParseFromString(model)
    del m.pieces[size:]
    m.trainer_spec.vocab_size = size
    return m.SerializeToString()


def export(checkpoint, out, *options):
    subprocess.run([sys.executable, os.path.join(ref.ROOT, "export.py"), checkpoint, out,
                    "--align", "64", *options], check=True, stdout=subprocess.DEVNULL)


def write_record(f, name, layer, data):
    data = np.atleast_2d(np.asarray(data, "<f4"))
    f.write(name.encode().ljust(32, b"\0") + np.array([layer], "<i4").tobytes()
            + np.array(data.shape, "<u4").tobytes() + data.tobytes())


def make_model(name, number, tokenizer):
    config = ref.hf_config(**MODELS[name])
    model = ref.hf_model(config, seed=100 + number)
    ids = np.random.default_rng(200 + number).integers(0, config.vocab_size, LENGTH.get(name, 44))
    ids[0] = 2
    path = os.path.join(ref.GOLDEN, name)
    with tempfile.TemporaryDirectory() as d:
        ref.save_checkpoint(model, d, cut_tokenizer(tokenizer, config.vocab_size))
        export(d, path + ".bin", "--name", name, "--source", "tests/make_golden.py",
               *EXPORT_OPTIONS.get(name, ["--type", "f32"]))
    if name in EXPORT_OPTIONS:
        model = ref.hf_from_bin(ref.Bin(path + ".bin"))
    trace = ref.hf_trace(model, ids)
    rows = ROWS.get(name, ROWS["both"])
    logits_only = name in ("long", *EXPORT_OPTIONS)
    with open(path + ".trace", "wb") as f:
        f.write(b"G2TRACE\n")
        write_record(f, "tokens", 0, ids)
        write_record(f, "rows", 0, rows)
        for (what, layer), data in trace.items():
            if what == "logits" or not logits_only:
                write_record(f, what, layer, data[rows])
    report(name, config, trace)


def report(name, config, trace):
    """Shows whether soft-caps bend: scores and logits should reach tens."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = trace["q", 0].reshape(-1, N, H)
    k = trace["k", 0].reshape(-1, K, H).repeat(N // K, axis=1)
    scores = np.tril(np.einsum("ihd,jhd->hij", q, k))
    print(f"{name}: scores to {abs(scores).max():.1f}, logits to "
          f"{abs(trace['logits', 0]).max():.1f}")


# ---- token vectors -------------------------------------------------------------------

PUBLISHED = [  # facts from transformers', KerasHub's and llama.cpp's tests
    "Hello this is a test", "The quick brown fox.", "A sample test", "This is a test",
    "生活的真谛是", "Hi  Hello", "Hi   Hello", " ", "  ", " Hello", "<s>", "<s> Hello<s>how",
    " <s> Hello<s> how", "\t\t\t\t \n\n61",
    "Hey<eos>. \t\t \n\nyou  é  @#😈  🤗!       , 1234 15 5,61",
    "<start_of_turn>user\nhello discards HOW are you<end_of_turn>\n",
    " " * 50 + "fifty spaces", "The quick brown fox jumps over the lazy dog.", "",
    "<bos>", "<eos><pad><unk>", "a<bos>b", "[@BOS@]<2mass>", "[toxicity=0]", "<unused99>",
    "\u2581", "a\u2581b", "\u2581\u2581 \u2581", "\0", "a\0b", "\ufeffx", "\r\n\r\n", "\t",
    "</s>", "<h1>x</h1>", "<table><tr><td>1</td></tr></table>", "a" * 999, "😈" * 77,
    "\n" * 31, "\n" * 32, "\n" * 100, " " * 31, " " * 32, " " * 100, "\t" * 31, "\t" * 33]
DECODED = [[869], [30112, 869], [4521, 3, 4521], [0, 1, 2, 3], [2, 4521], [106, 107],
           [217 + c for c in "é".encode()], [217 + 0xC3], [217 + 0xE2, 217 + 0x96, 4521],
           [217 + 0xE2, 217 + 0x96, 217 + 0x81],
           [217 + 0xF0, 217 + 0x9F, 217 + 0x98, 1, 217 + 0x88],
           [217 + 0xFF] * 5, [217], [226], [139, 168], [204, 213]]


def vector(kind, text, ids):
    return " ".join([kind, text.hex() or "-", str(len(ids)), *map(str, ids)])


def make_tokens():
    import sentencepiece
    ids, pieces = ref.Bin(os.path.join(ref.ROOT, "tokenizer.bin")).vocabulary()
    assert ref.vocabulary_digest(pieces) == ref.GEMMA_VOCABULARY, "not Gemma's vocabulary"
    sp = sentencepiece.SentencePieceProcessor(model_proto=ref.sentencepiece_model(pieces))
    every, plain = ref.Bpe(pieces), ref.Bpe(pieces, plain=True)
    rng = random.Random(7)
    texts = [t.encode() for t in PUBLISHED]
    texts += [b"\xff", b"ab\xe2\x96", b"\xc0\x80x", b"\xed\xa0\x80"]
    texts += [ref.random_text(rng, pieces) for _ in range(250)]
    lines = []
    for text in texts:
        assert every.encode(text) == sp.encode(text), text
        lines.append(vector("E", text, sp.encode(text)))
        if plain.encode(text) != sp.encode(text) or not text:
            lines.append(vector("P", text, plain.encode(text)))
    for out in DECODED + [ref.random_ids(rng, pieces) for _ in range(150)]:
        lines.append(vector("D", sp.decode(out).encode(), out))
    with open(os.path.join(ref.GOLDEN, "tokens.txt"), "w") as f:
        f.write("\n".join(lines) + "\n")
    print(f"tokens.txt: {len(lines)} vectors")


# ---- the demo model --------------------------------------------------------------------

STORY = b"Once upon a time there was a king who had three daughters, and the youngest"


def make_story(engine):
    """Greedy text in the default session: prompt in one call, then token by token."""
    model = ref.Model(engine, os.path.join(ref.HERE, "demo", "story-q8.bin"))
    session, prompt, out = ref.Session(model), model.encode(STORY), []
    logits = session.append([model.config.bos] + prompt, "prefill")
    for _ in range(64):
        out.append(int(logits.argmax()))
        logits = session.append(out[-1:])
    with open(os.path.join(ref.GOLDEN, "story.txt"), "w") as f:
        f.write(vector("E", STORY, prompt) + "\n" + vector("D", model.decode(out), out) + "\n")
    print("story.txt:", model.decode(out).decode())


def main():
    import transformers
    transformers.utils.logging.disable_progress_bar()
    os.makedirs(ref.GOLDEN, exist_ok=True)
    wanted = sys.argv[1:] or [*MODELS, "tokens", "story"]
    tokenizer = tiny_tokenizer()
    for number, name in enumerate(MODELS):
        if name in wanted:
            make_model(name, number, tokenizer)
    if "tokens" in wanted:
        make_tokens()
    if "story" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            make_story(ref.build_engine(folder))


if __name__ == "__main__":
    main()
