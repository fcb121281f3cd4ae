"""The tokenizer against those it has to equal: open_clip's, by its answers to awkward strings, and
transformers' ``CLIPTokenizer``, run here on plain ones (it mends nothing and unescapes nothing).

golden/d_tokenizer holds open_clip 4.2.0.dev0's ids at contexts 77 and 16; clip_tokens.json those of
open_clip_torch 3.3.0 at 77, without padding, of 500 strings put together at random from html,
mojibake, control characters, letters that change length in lower case, special tokens and the like.
"""

import gzip
import html
import json
import pathlib
import pickle
import random

import ftfy
import numpy as np
import pytest
from transformers import CLIPTokenizer

from webssl_jax.data import tokens
from webssl_jax.data.tokens import END, START, VOCABULARY, Tokenizer, clean

GOLDEN = pathlib.Path(__file__).parent / "golden"
FIRST = json.loads((GOLDEN / "d_tokenizer.json").read_text())
FIRST_IDS = np.load(GOLDEN / "d_tokenizer.npz")
MANY = json.loads((GOLDEN / "clip_tokens.json").read_text())
PLAIN = [
    "a photo of a cat",
    "A PHOTO OF A CAT, and 2 dogs!",
    "  spaces   everywhere\t\nand newlines ",
    "it's the dog's ball; they've won, we'll see I'd say you're right, I'm sure, don't",
    "supercalifragilistic antidisestablishmentarianism",
    "1234567890 3.14 1,000,000",
    "http://example.com/a?b=c#d",
    "café naïve résumé",
    "日本語のキャプション 一只猫坐在垫子上",
    "emoji 😀 👨‍👩‍👧 ❤️",
    "Straße ОЧЕНЬ ελληνικά",
    "word " * 200,
    "",
]


def ids_of(row):
    return row[: np.flatnonzero(row)[-1] + 1].tolist()


@pytest.mark.parametrize("context", [77, 16])
def test_ids_are_open_clips_on_the_golden_strings(context):
    texts = [entry["text"] for entry in FIRST["strings"]]
    ours = Tokenizer(context)(texts)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, FIRST_IDS[f"ctx{context}"])
    assert (START, END, VOCABULARY) == (FIRST["sot"], FIRST["eot"], FIRST["vocab_size"])


def test_pieces_of_ids_are_their_text_again():
    for text in PLAIN:
        found = tokens.pieces(Tokenizer(1000)([text])[0])
        spelled = "".join(found).encode()
        for byte in range(0x80, 0x100):  # of characters that are not whole in one id
            spelled = spelled.replace(f"<{byte:02x}>".encode(), bytes([byte]))
        assert spelled.decode() == clean(text).replace(" ", ""), text
    assert tokens.pieces(Tokenizer(8)(["a cat Ё"])[0]) == ["a", "cat", "<d1>", "<91>"]


def test_ids_are_open_clips_on_500_awkward_strings():
    ours = Tokenizer()(MANY["texts"])
    wrong = [text for text, row, ids in zip(MANY["texts"], ours, MANY["ids"]) if ids_of(row) != ids]
    assert len(MANY["texts"]) == 500 and not wrong


def test_ids_are_those_of_transformers_where_nothing_needs_mending():
    file = pathlib.Path(tokens.__file__).parent / "vocabulary/bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 1 + tokens.MERGES]
    merges = [tuple(line.split()) for line in lines]
    bytes_ = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling = [chr(b) for b in bytes_] + [chr(256 + i) for i in range(256 - len(bytes_))]
    names = spelling + [f"{letter}</w>" for letter in spelling] + ["".join(m) for m in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    theirs = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    expected = theirs(PLAIN, truncation=True, max_length=77)["input_ids"]
    assert [ids_of(row) for row in Tokenizer()(PLAIN)] == expected


def test_a_text_that_is_too_long_keeps_its_beginning_and_its_end_token():
    whole, cut = Tokenizer(77)(["one two three four"])[0], Tokenizer(5)(["one two three four"])[0]
    assert whole[:6].tolist() == [START, *cut[1:4].tolist(), whole[4], END]
    assert cut.tolist() == [*whole[:4].tolist(), END]
    assert Tokenizer(6)(["one two three four"])[0].tolist() == whole[:6].tolist()  # just fits
    assert Tokenizer(2)(["one two", ""]).tolist() == [[START, END]] * 2


def test_merging_by_a_queue_is_merging_the_best_pair_until_there_is_none():
    def slowly(ids, pairs):
        while best := min((pairs[p] for p in zip(ids, ids[1:]) if p in pairs), default=None):
            out = []
            while ids:
                pair = tuple(ids[:2])
                merged = len(pair) == 2 and pairs.get(pair) == best
                out.append(best if merged else ids[0])
                ids = ids[2 if merged else 1 :]
            ids = out
        return ids

    _, pairs = tokens._vocabulary()
    assert len(pairs) == tokens.MERGES
    rng = random.Random(0)
    bytes_ = [i for i in range(256) if sum(i in pair for pair in list(pairs)[:3000])]
    for length in (1, 2, 3, 5, 30, 200):
        for letters in (2, 5, len(bytes_)):  # few letters make many runs of the same pair
            some = rng.sample(bytes_, letters)
            ids = rng.choices(some, k=length)
            assert tokens._merge(ids, pairs) == slowly(ids, pairs)


def test_no_plain_text_is_changed_by_what_is_skipped_for_plain_text():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(chr(rng.randrange(32, 127)) for _ in range(40)).replace("&", "")
        mended = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text) == " ".join(mended.split()).lower()


def test_a_pickled_tokenizer_is_the_same_tokenizer():
    first = Tokenizer(9)
    first(["some words"])
    again = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(again(["some words"]), first(["some words"]))
    assert again.context == 9


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="context = 1 must be at least 2"):
        Tokenizer(1)
    with pytest.raises(TypeError, match="a sequence of texts"):
        Tokenizer()("a cat")
    assert Tokenizer()([]).shape == (0, 77)
