"""CLIP's text tower: transformers' tower and tokenizer, with weights and vocabulary carried over."""

import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tests.parity import assert_close_to_peer
from vitrail.backbones.text import TextConfig, TextTransformer, from_transformers
from vitrail.backbones.text_tokens import (
    BEFORE_MERGES,
    SMALLEST,
    alphabet,
    learn_merges,
    to_ids,
    tokenizer_of,
)
from vitrail_runtime.errors import InputError

SMALL = {
    "dim": 10,
    "text_dim": 24,
    "text_depth": 2,
    "text_heads": 3,
    "text_mlp_ratio": 2.0,
    "context": 9,
    "vocab_size": 560,
}
MERGES = [("t", "h"), ("th", "e</w>"), ("s", "e"), ("v", "e"), ("se", "ve"), ("seve", "n</w>")]
TEXTS = (
    "the seven",
    "  The\t SEVEN\n",
    "it's 42!!",
    "Smörgåsbord \N{ROLLING ON THE FLOOR LAUGHING}",
    "e\N{COMBINING ACUTE ACCENT}",
    "",
)


def peer(act: str) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=560,
        hidden_size=24,
        intermediate_size=48,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=9,
        hidden_act=act,
        bos_token_id=558,
        eos_token_id=559,
        pad_token_id=559,
    )
    model = CLIPTextModelWithProjection(config)
    for parameter in model.parameters():  # norms and biases too, which start at one and zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_embeddings_equal_transformers_with_carried_over_weights(act):
    other = peer(act)
    model = TextTransformer(TextConfig(**SMALL, text_act=act)).double()
    missing, strange = model.load_state_dict(from_transformers(other.state_dict()), strict=False)
    assert (missing, strange) == (["merges"], [])
    ids = torch.randint(0, 558, (4, 9))
    ids[:, 0] = 558
    for row, end in zip(ids, (8, 3, 1, 6), strict=True):
        row[end:] = 559
    with torch.no_grad():
        want = other(input_ids=ids).text_embeds
        assert_close_to_peer(model(ids), want, 1e-9)
        # A batch as long as its longest text needs says the same.
        assert_close_to_peer(model(ids[1:, :7]), want[1:], 1e-9)


def test_what_stands_behind_the_end_of_a_text_does_not_matter():
    torch.manual_seed(1)
    model = TextTransformer(TextConfig(**SMALL)).double()
    ids = torch.tensor([[558, 7, 8, 559, 0, 0], [558, 7, 8, 559, 3, 559]])
    first, second = model(ids)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_ids_equal_those_of_transformers_tokenizer():
    names = [*alphabet(), *(letter + "</w>" for letter in alphabet())]
    vocabulary = {name: i for i, name in enumerate([*names, *("".join(m) for m in MERGES)])}
    vocabulary |= {"<|startoftext|>": 558, "<|endoftext|>": 559}
    other = CLIPTokenizer(vocab=vocabulary, merges=MERGES)
    model = TextTransformer(TextConfig(**SMALL | {"context": 60}))
    model.take(to_ids(MERGES))
    for text in TEXTS:
        assert model.encode([text])[0].tolist() == other(text)["input_ids"], text


def by_hand(texts: list[str], count: int) -> list[tuple[int, int]]:
    """Byte-pair encoding of lower-case words: the most frequent pair, of equals the one of lower ids."""
    letters = alphabet()
    words = Counter(word for text in texts for word in text.split())
    known = {letter: i for i, letter in enumerate(letters)}
    split = {w: [known[c] for c in w[:-1]] + [256 + known[w[-1]]] for w in words}
    merges = []
    for made in range(BEFORE_MERGES, BEFORE_MERGES + count):
        pairs = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        often = max(pairs.values(), default=0)
        if often < 2:
            break
        # Numbered as the library does: ends of words before letters.
        best = min(
            (p for p, n in pairs.items() if n == often), key=lambda p: [numbered(i) for i in p]
        )
        merges.append(best)
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [made]
                i += 1
    return merges


def numbered(i: int) -> int:
    """The library's number: ends of words first, letters by their code point."""
    if i < 256:
        return 256 + sorted(alphabet()).index(alphabet()[i])
    return i - 256 if i < BEFORE_MERGES else i


def test_a_vocabulary_is_learnt_by_joining_the_most_frequent_pair_again_and_again():
    texts = ["low lower lowest", "new newer newest low low", "wide wider widest new"] * 2
    got = learn_merges(texts, 14)
    assert got == by_hand(texts, 14)
    assert len(got) == 14
    assert learn_merges(texts, 5) == got[:5]


def test_a_pair_that_occurs_once_is_not_worth_a_token():
    assert learn_merges(["ab", "xy xy"], 40) == to_ids([("x", "y</w>")])


def test_learnt_words_are_one_token_and_others_are_bytes():
    model = TextTransformer(TextConfig(**SMALL))
    assert not model.knows_words
    assert model.encode(["the"]).tolist() == [[558, 83, 71, 256 + 68, 559]]
    model.learn(["The seven, the seven"] * 3)
    assert model.knows_words
    ids = model.encode(["the", "seven", "than"])
    assert ids.shape == (3, 6)
    assert [len([i for i in row if i]) for row in ids.tolist()] == [3, 3, 6]
    with pytest.raises(InputError, match="has a vocabulary already"):
        model.learn(["more"])


def test_a_smaller_tower_takes_the_first_merges():
    model = TextTransformer(TextConfig(**SMALL | {"vocab_size": SMALLEST + 2}))
    model.take(to_ids(MERGES))
    assert model.merges.tolist() == [list(pair) for pair in to_ids(MERGES)[:2]]
    assert model.encode(["the"]).tolist() == [[SMALLEST, BEFORE_MERGES + 1, SMALLEST + 1]]
    TextTransformer(TextConfig(**SMALL | {"vocab_size": SMALLEST})).take(to_ids(MERGES))


def test_a_text_longer_than_the_context_is_cut_before_its_end_and_counted():
    model = TextTransformer(TextConfig(**SMALL))
    texts = ["abcdefg", "abcdefgh", "x", "abcdefghijkl"]  # 7 letters have room
    ids = model.encode(texts)
    assert ids.shape == (4, 9)
    whole = [558, *(64 + i for i in range(7)), 559]
    assert ids[1].tolist() == ids[3].tolist() == whole
    assert ids[0].tolist() == [*whole[:7], 256 + 70, 559]
    assert ids[2].tolist() == [558, 256 + 87, 559, 0, 0, 0, 0, 0, 0]
    assert model.too_long(texts) == 2


def test_texts_are_counted_part_by_part(monkeypatch):
    monkeypatch.setattr("vitrail.backbones.text.AT_ONCE", 2)
    model = TextTransformer(TextConfig(**SMALL))
    assert model.too_long(["abcdefgh", "x", "abcdefgh", "y", "abcdefgh"]) == 3


def test_the_same_letters_joined_in_two_ways_are_one_token():
    both = to_ids([("a", "b"), ("b", "c</w>"), ("ab", "c</w>"), ("a", "bc</w>")])
    assert both[3] == (64, BEFORE_MERGES + 1)
    assert tokenizer_of(tuple(both)).encode("abc").ids == [BEFORE_MERGES + 2]


def test_merges_out_of_order_are_refused():
    with pytest.raises(InputError, match="merge 0 joins 'th' and 'e', but no earlier one"):
        to_ids([("th", "e"), ("t", "h")])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_heads": 5}, "text_dim 24 is no multiple of text_heads 5"),
        ({"context": 2}, "context is 2, but a text has a beginning, a word and an end: at least 3"),
        ({"vocab_size": 513}, "vocab_size is 513, but the bytes alone need 514"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TextConfig(**SMALL | fields)


def test_weights_are_drawn_as_in_the_official_code():
    torch.manual_seed(0)
    model = TextTransformer(TextConfig(dim=300, text_dim=256, text_depth=4, vocab_size=2000))
    block = model.blocks[3]
    wanted = {
        model.token_embed.weight: 0.02,
        model.pos_embed: 0.01,
        model.proj.weight: 1 / 16,
        block.attn.qkv.weight: 1 / 16,
        block.attn.proj.weight: 1 / 16 / 8**0.5,
        block.mlp.fc1.weight: 1 / 512**0.5,
        block.mlp.fc2.weight: 1 / 16 / 8**0.5,
    }
    for weight, std in wanted.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("proj.bias"))


def test_the_released_sizes_are_the_defaults():
    config = TextConfig()
    assert (config.text_dim, config.text_depth, config.text_heads) == (512, 12, 8)
    assert (config.context, config.vocab_size, config.dim) == (77, 49408, 512)
    with torch.device("meta"):
        count = sum(p.numel() for p in TextTransformer(config).parameters())
    assert (
        count == 151_277_313 - 87_849_216 - 1
    )  # CLIP ViT-B/32 but for its image tower and its scale
