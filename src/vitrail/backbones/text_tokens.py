"""Text to tokens: CLIP's byte-level byte-pair encoding (Radford et al., ICML 2021, section 2.4; Sennrich et
al., ACL 2016, arXiv 1508.07909), by the `tokenizers` library.

A vocabulary is its merges: the ids of the two tokens that each of them joins, in the order in which they were
learnt. They are numbers, and so a model carries them among its weights. Ids are CLIP's: 256 bytes, the same
at the end of a word, the merges, and last what begins and what ends a text.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "</w>"  # of a word
BEFORE_MERGES = 512  # tokens: every byte, and every byte that ends a word
ENDS = 2  # tokens: of the beginning and of the end of a text
SMALLEST = BEFORE_MERGES + ENDS  # a vocabulary without a merge
# Contractions, runs of letters, single digits, runs of all else; spaces only part them.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[int, int]]:
    """At most `count` merges, the most frequent first; pairs that occur once are not worth one."""
    from tokenizers.trainers import BpeTrainer

    tokenizer = _bare({}, [])
    letters = list(alphabet())
    trainer = BpeTrainer(
        vocab_size=BEFORE_MERGES + count,
        min_frequency=2,
        initial_alphabet=letters,
        # Else they are numbered as they are met, in an order that differs from run to run, and of pairs that
        # are equally frequent that of the lower numbers comes first.
        special_tokens=[letter + END for letter in letters],
        end_of_word_suffix=END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return to_ids(_merges_of(tokenizer)[:count])


def to_ids(merges: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Merges as they stand in a merges.txt, as pairs of ids."""
    vocabulary = _first_tokens()
    out = []
    for i, (left, right) in enumerate(merges):
        if left not in vocabulary or right not in vocabulary:
            raise InputError(
                f"merge {i} joins {left!r} and {right!r}, but no earlier one makes both of them; give merges "
                "in the order in which they were learnt"
            )
        out.append((vocabulary[left], vocabulary[right]))
        vocabulary.setdefault(left + right, BEFORE_MERGES + i)
    return out


@lru_cache(maxsize=4)
def tokenizer_of(merges: tuple[tuple[int, int], ...]) -> "Tokenizer":
    """What turns a text into the ids of its words, without a beginning and an end."""
    vocabulary = _first_tokens()
    names = {i: name for name, i in vocabulary.items()}
    pairs = []
    for i, (left, right) in enumerate(merges):
        pairs.append((names[left], names[right]))
        names[BEFORE_MERGES + i] = names[left] + names[right]
        vocabulary.setdefault(names[left] + names[right], BEFORE_MERGES + i)
    return _bare(vocabulary, pairs)


def alphabet() -> str:
    """The letter that stands for each byte, in the order of CLIP's ids: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(map(chr, printable)) + "".join(chr(256 + n) for n in range(len(others)))


def _first_tokens() -> dict[str, int]:
    letters = alphabet()
    ends = {letter + END: len(letters) + i for i, letter in enumerate(letters)}
    return {letter: i for i, letter in enumerate(letters)} | ends


def _bare(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> "Tokenizer":
    try:
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import BPE
    except ImportError as error:
        raise InputError(
            "texts are read by the tokenizers library, which is not installed; pip install 'vitrail[text]'"
        ) from error
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=END))
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(clean)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return tokenizer


def _merges_of(tokenizer: "Tokenizer") -> list[tuple[str, str]]:
    said = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in said]


def encode(
    texts: Sequence[str], merges: tuple[tuple[int, int], ...], vocab_size: int, context: int
) -> tuple[list[list[int]], int]:
    """The ids of each text, with its beginning and its end, at most `context` of them; and how many texts
    were longer and are cut, before their end."""
    start, end = vocab_size - 2, vocab_size - 1
    said = tokenizer_of(merges).encode_batch(list(texts))
    cut = sum(len(text.ids) > context - ENDS for text in said)
    return [[start, *islice(text.ids, context - ENDS), end] for text in said], cut
