"""Text to token ids and back: words, characters, or pieces of words (BPE)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from kuosan.discrete.lengths import PAD

Kind = Literal["word", "bpe", "character"]

UNKNOWN = 1  # with PAD, which is 0, the ids of the special tokens in every vocabulary
SPECIAL = ("<pad>", "<unk>")


class Tokenizer:
    """A vocabulary and how text is split into it; made by `train` or `load`.

    - "word": lower-cased; each word, with the apostrophes and hyphens inside it, and each punctuation mark is a token.
      A number keeps the dots and commas inside it. What is not in the vocabulary becomes <unk>.
    - "character": each character is a token, white space and line ends too; the case is kept. Others become <unk>.
    - "bpe": byte pairs, merged within words. The case is kept, nothing is unknown, and decoding gives the very text.

    Special tokens have fixed ids: 0 <pad>, 1 <unk>. A text that spells one out is ordinary text.

    Attributes:
        kind: "word", "bpe" or "character".
    """

    def __init__(self, library: Any, kind: Kind):
        self.kind = kind
        self._library = library
        self._library.encode_special_tokens = True  # or a text with "<pad>" in it would end there; it is not saved

    @classmethod
    def train(cls, texts: Iterable[str], kind: Kind = "word", size: int = 2500) -> "Tokenizer":
        """Learn a vocabulary: the most frequent words, characters or merges; of equally frequent ones, the first in
        the order of the alphabet.

        Args:
            size: the most tokens that the vocabulary may have, the two special ones included.

        Raises:
            ValueError: the kind is unknown, the size leaves no room (BPE needs 258: it has every byte), or the texts
                hold nothing but white space.
            ImportError: the library `tokenizers` is not installed.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        smallest = len(SPECIAL) + (256 if kind == "bpe" else 1)
        if size < smallest:
            raise ValueError(f"a vocabulary of kind {kind!r} needs a size of at least {smallest} tokens, got {size}")
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise ValueError("there is nothing to learn a vocabulary from: the texts are empty or white space")
        library, trainer = _parts(kind, size)
        library.train_from_iterator(texts, trainer)
        return cls(library, kind)

    @property
    def size(self) -> int:
        """How many tokens there are, the special ones included; the ids are 0 .. size - 1."""
        return self._library.get_vocab_size()

    @property
    def tokens(self) -> tuple[str, ...]:
        """What each id stands for, as the library writes it."""
        return tuple(self._library.id_to_token(i) for i in range(self.size))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without padding."""
        return self._library.encode(text).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all processor cores."""
        return [encoding.ids for encoding in self._library.encode_batch(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first <pad>; an unknown token reads "<unk>".

        Words are joined by single spaces, with punctuation marks where English has them; characters by nothing.

        Raises:
            ValueError: an id is not of this vocabulary.
        """
        kept: list[int] = []
        size = self.size
        for i in map(int, ids):
            if not 0 <= i < size:
                raise ValueError(f"id {i} is not in this vocabulary, whose ids are 0 .. {size - 1}")
            if i == PAD:
                break
            kept.append(i)
        if self.kind == "bpe":
            return self._library.decode(kept, skip_special_tokens=False)
        tokens = [self._library.id_to_token(i) for i in kept]
        return "".join(tokens) if self.kind == "character" else _joined(tokens)

    def save(self, path: str | Path) -> None:
        """Write one JSON file: the kind, and what the library itself writes."""
        said = {"kind": self.kind, "tokenizer": json.loads(self._library.to_str())}
        Path(path).write_text(json.dumps(said, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a saved tokenizer.
            ImportError: the library `tokenizers` is not installed.
        """
        library, content = _library(), Path(path).read_bytes()
        try:
            said = json.loads(content)
            kind = said["kind"]
            if kind not in get_args(Kind):
                raise ValueError(f"its kind is {kind!r}")
            tokenizer = cls(library.Tokenizer.from_str(json.dumps(said["tokenizer"])), kind)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer saved by Tokenizer.save: {error}") from error
        if [tokenizer._library.token_to_id(token) for token in SPECIAL] != [PAD, UNKNOWN]:
            raise ValueError(f"{path} lacks the special tokens {' '.join(SPECIAL)} with the ids 0 and 1")
        return tokenizer


_WORD = r"[\p{L}\p{M}\p{N}]+(?:(?:['’\-]|(?<=\p{N})[.,](?=\p{N}))[\p{L}\p{M}\p{N}]+)*|[^\s\p{L}\p{M}\p{N}]"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("tokens need the library tokenizers: pip install 'kuosan[text]'") from None
    return tokenizers


def _parts(kind: Kind, size: int) -> tuple[Any, Any]:
    """The library's tokenizer, still empty, and its trainer."""
    library = _library()
    before, common = library.pre_tokenizers, {"vocab_size": size, "special_tokens": list(SPECIAL)}
    if kind == "bpe":
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = before.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = before.ByteLevel.alphabet()
        return tokenizer, library.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **common)
    tokenizer = library.Tokenizer(library.models.WordLevel(unk_token=SPECIAL[UNKNOWN]))
    if kind == "word":
        tokenizer.normalizer = library.normalizers.Lowercase()
        tokenizer.pre_tokenizer = before.Split(library.Regex(_WORD), "removed", invert=True)
    else:
        tokenizer.pre_tokenizer = before.Split(library.Regex(r"[\s\S]"), "isolated")
    return tokenizer, library.trainers.WordLevelTrainer(show_progress=False, **common)


_TO_THE_LEFT = frozenset(".,;:!?%)]}'’”…，。！？；：、”）》」")  # no space before these
_TO_THE_RIGHT = frozenset("([{$£€#`‘“（《「")  # no space after these
_BETWEEN = frozenset("/")


def _joined(tokens: Sequence[str]) -> str:
    """Words with a space between, but none where a punctuation mark clings to its neighbour."""
    pieces: list[str] = []
    glued, quoting = True, False
    for token in tokens:
        opening = token == '"' and not quoting
        closing = token == '"' and quoting
        if not (glued or closing or token in _TO_THE_LEFT or token in _BETWEEN):
            pieces.append(" ")
        pieces.append(token)
        glued = opening or token in _TO_THE_RIGHT or token in _BETWEEN
        quoting ^= token == '"'
    return "".join(pieces)
