"""What texts are cut into: the tokens of a vocabulary that is given, of one that is trained on the texts, or bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lba_exp.data.cache import kept
from lba_exp.data.sources import TOKENIZER, vocabulary_file
from lba_exp.errors import DataError

KINDS = ("wordpiece", "bpe", "bytes")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEEDED = ("[CLS]", "[SEP]", "[MASK]")
TRAINED = 1  # version of ``trained``, to be raised with every change after which it makes other vocabularies
LEAST = 2  # times that a pair of symbols has to be seen to become a token


class Vocabulary:
    """A tokenizer of the library ``tokenizers``.

    Attributes:
        size: number of tokens.
        identity: short hash, equal for equal vocabularies.
        ids: the special tokens that it has -> their numbers; [CLS], [SEP] and [MASK] among them.
        tokenizer: the library's own.
    """

    def __init__(self, tokenizer: Any, identity: str):
        self.tokenizer, self.identity = tokenizer, identity
        self.size = tokenizer.get_vocab_size()
        self.ids = {token: number for token in SPECIAL if (number := tokenizer.token_to_id(token)) is not None}

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, int32 (n,), without special tokens around them."""
        return [np.array(found.ids, np.int32) for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def word(self, number: int) -> str:
        return self.tokenizer.id_to_token(number)


class ByteVocabulary:
    """The bytes of a text's UTF-8 (as in Long Range Arena's text task, arXiv 2011.04006), and behind them [CLS], [SEP] and [MASK].

    Attributes as of ``Vocabulary``.
    """

    ids = {"[CLS]": 256, "[SEP]": 257, "[MASK]": 258}  # noqa: RUF012
    size, identity = 259, hashlib.sha256(b"bytes, [CLS], [SEP], [MASK]").hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def word(self, number: int) -> str:
        return bytes([number]).decode("latin-1") if number < 256 else {at: token for token, at in self.ids.items()}[number]


def given(kind: str, vocabulary: str | None, lowercase: bool) -> Vocabulary | ByteVocabulary:
    """The vocabulary that a run names.

    Args:
        kind: one of KINDS.
        vocabulary: vocab.txt (WordPiece, one token a line, as of bert-base-uncased) or tokenizer.json (of the library ``tokenizers``), or
            the folder of one; None with bytes.
        lowercase: put texts into lower case and take accents away; a tokenizer.json says that itself.

    Raises:
        DataError: there is none, or one of another kind, or without the tokens that are needed.
    """
    if kind == "bytes":
        return ByteVocabulary()
    path = vocabulary_file(vocabulary)
    if path.suffix == ".json":
        return _of_json(path, kind)
    if kind != "wordpiece":
        raise DataError(f"data.vocabulary={vocabulary} is a list of WordPiece tokens: give data.tokens=wordpiece, or a {TOKENIZER}.")
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(str(path), lowercase=lowercase).to_str())
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"data.vocabulary={vocabulary} cannot be read ({error}).") from None
    if missing := [token for token in (*NEEDED, "[UNK]") if tokenizer.token_to_id(token) is None]:
        raise DataError(f"data.vocabulary={vocabulary} lacks {', '.join(missing)}: it is no vocabulary of BERT's.")
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return Vocabulary(tokenizer, _short(repr((lowercase, tokens))))


def trained(
    texts: Iterable[str], kind: str, size: int, lowercase: bool, *, of: dict[str, Any], cache: str | None
) -> tuple[Vocabulary, Path]:
    """A vocabulary learned from texts, and the tokenizer.json that it is kept in: WordPiece, or byte-level BPE, which knows every text.

    Args:
        texts: read where it is not kept yet.
        kind: "wordpiece" or "bpe".
        size: number of tokens, special ones among them.
        lowercase: put texts into lower case and take accents away.
        of: what says which texts these are.
        cache: see ``lba_exp.data.cache.kept``.

    Raises:
        DataError: more characters in the texts than tokens; see ``kept``.
    """
    made_of = {"kind": kind, "size": size, "lowercase": lowercase, "version": TRAINED, "texts": of}
    folder = kept("tokenizer", made_of, lambda folder: _train(texts, kind, size, lowercase).save(str(folder / TOKENIZER)), cache)
    return _of_json(folder / TOKENIZER, kind), folder / TOKENIZER


def _train(texts: Iterable[str], kind: str, size: int, lowercase: bool) -> Any:
    from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "wordpiece":
        tokenizer, texts = BertWordPieceTokenizer(lowercase=lowercase), list(texts)
        counts = Counter(character for text in texts for character in tokenizer.normalize(text) if not character.isspace())
        alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[: size // 4])
        # Left to itself the library numbers the characters inside words in the order of a hash table, another one in every process, and
        # breaks ties between tokens by these numbers.
        first = [*SPECIAL, *(f"##{character}" for character in alphabet)]
        options = {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet), "special_tokens": first, "show_progress": False}
        tokenizer.train_from_iterator(texts, size, LEAST, **options)
        tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(tokenizer.get_vocab(), lowercase=lowercase).to_str())
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=LEAST, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    if (made := tokenizer.get_vocab_size()) > size:
        raise DataError(f"data.vocabulary_size={size} is too small: the texts' characters alone make {made:,} tokens.")
    return tokenizer


def _of_json(path: Path, kind: str) -> Vocabulary:
    from tokenizers import Tokenizer
    from tokenizers.processors import BertProcessing

    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
        model = json.loads(tokenizer.to_str())["model"]["type"].lower()
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"data.vocabulary={path} cannot be read as a {TOKENIZER} ({str(error).splitlines()[0]}).") from None
    if model != kind:
        raise DataError(f"data.vocabulary={path} is of the kind {model}, and data.tokens={kind}: give one for the other.")
    if missing := [token for token in NEEDED if tokenizer.token_to_id(token) is None]:
        raise DataError(f"data.vocabulary={path} lacks {', '.join(missing)}, which a model of masked and of labelled text needs.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = BertProcessing(*((token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")))
    return Vocabulary(tokenizer, _short(tokenizer.to_str()))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
