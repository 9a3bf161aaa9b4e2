"""Text as the phonemes that are said, by the CMU pronouncing dictionary: what a small model learns to speak from."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from kuosan.speech.words import DIGITS

#: What fills the end of shorter texts in a batch.
PAD = "_"
#: Rests, from the least: between words, inside a sentence, at its end. Few, as a mark needs many examples to be learnt:
#: of 20 minutes of prompts, 4 end in "?".
PAUSES = (" ", ",", ".")
#: Consonants, parted by the sound of an "s" after them: IH Z, S or Z.
HISSING = ("CH", "JH", "S", "SH", "Z", "ZH")
VOICELESS = ("F", "K", "P", "T", "TH")
OTHERS = ("B", "D", "DH", "G", "HH", "L", "M", "N", "NG", "R", "V", "W", "Y")
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
#: All symbols, in the order of their ids: padding is 0. Vowels are without stress: the dictionary that comes with the
#: recogniser has none, and in 20 minutes of prompts many a stressed one would occur a few times only.
SYMBOLS = (PAD, *PAUSES, *HISSING, *VOICELESS, *OTHERS, *VOWELS)


def phonemes(text: str) -> list[str]:
    """The symbols of a text: ARPAbet phonemes of each word, a pause between any two words and at both ends.

    Pauses are symbols because the time of a rest belongs to no phoneme: people rest where no mark is written, and
    recordings begin and end in silence. "," is also of ; : ... dashes and opening brackets; "." of ! and ?, and of both
    ends where no mark is. Of several marks between two words the greatest counts. A mark inside a word ("H.323") parts
    it only.

    Words have the dictionary's first pronunciation. Each digit is its English name. "a" is the article where a word
    follows at once, else the letter; "A" is the letter. Letters with full stops between ("a.m.") are letters. Accents
    are dropped, as the dictionary has none. What stands in braces is phonemes: "{HH AH L OW} world".

    A word that is not in the dictionary is tried, in this order, as

    - a stem and "'s", which is S, Z or IH Z by the sound before it;
    - letters, if it is 2 to 4 capitals ("PBX");
    - two words of at least 4 letters ("touch" and "tone"), at the most even split;
    - a beginning before a word of at least 4 letters ("un" and "mute"), said as it most often is before a known
      word in the dictionary, if that is 50 times or more.

    Raises:
        ValueError: there is nothing to say, a word has no pronunciation, a character cannot be read, or what is in
            braces is not phonemes or has no end.
        ImportError: pocketsphinx, which has the dictionary, is not installed.
    """
    tokens = list(_tokens(text))
    said: list[str] = []
    unknown: list[str] = []
    pause = ""
    for token, after in zip(tokens, [*tokens, "."][1:], strict=True):
        if token in PAUSES:
            pause = max(pause or " ", token, key=PAUSES.index)
            continue
        article = token == "a" and after not in PAUSES
        sounds = ["EY"] if token in ("a", "A") and not article else _sounds(token)
        if sounds is None:
            unknown.append(token)
        else:
            said += [pause or (" " if said else "."), *sounds]
        pause = ""
    if unknown:
        distinct = list(dict.fromkeys(unknown))
        more = f" and {len(distinct) - 5:,} more" if len(distinct) > 5 else ""
        raise ValueError(
            f"no pronunciation is known of {', '.join(map(repr, distinct[:5]))}{more}: "
            "write the phonemes in braces, such as {HH AH L OW}"
        )
    if not said:
        raise ValueError(f"expected words to say, got {text!r}")
    return [*said, pause or "."]


def encode(text: str) -> list[int]:
    """The ids of a text's symbols in `SYMBOLS`; see :func:`phonemes`, which also says what is raised."""
    return [_IDS[symbol] for symbol in phonemes(text)]


_IDS = {symbol: k for k, symbol in enumerate(SYMBOLS)}
_SPELLED = 4  # capitals; longer names are mostly said as words
_HALF = 4  # letters: shorter words stand in longer ones by chance
_ALIKE = 50  # words that must begin in one way
_SILENT = ("Mn", "Me", "Cf")  # accents and what is not seen
_READ = {
    **dict.fromkeys(",;:([\u2013\u2014\u2026", ","),
    **dict.fromkeys(".!?", "."),
    **dict.fromkeys("'\u2018\u2019", "'"),
    **dict.fromkeys('")]\u201c\u201d\u00ab\u00bb/_-\u2010\u2011', " "),
}


def _tokens(text: str) -> Iterator[str]:
    """Words as they are written, pauses, and phonemes in their braces."""
    for k, part in enumerate(re.split(r"\{([^{}]*)\}", text)):
        if k % 2:
            yield "{" + " ".join(_in_braces(part)) + "}"
        elif brace := re.search(r"[{}]", part):
            raise ValueError(f"a brace {brace[0]} has no other: phonemes stand in both, such as {{HH AH L OW}}")
        else:
            yield from _written(part)


def _in_braces(inside: str) -> list[str]:
    found = inside.split()
    wrong = [symbol for symbol in found if symbol not in _IDS or symbol == PAD or symbol in PAUSES]
    if wrong or not found:
        raise ValueError(
            f"expected phonemes in braces, such as {{HH AH L OW}}, got {{{inside}}}"
            + (f": {wrong[0]!r} is none (vowels are without stress)" if wrong else "")
        )
    return found


def _written(text: str) -> list[str]:
    text = re.sub(r"\.{2,}|(?<=\s)-+(?=\s)|--+", ",", text)  # what goes on, though it is written with full stops
    text = re.sub(  # their last stop ends no sentence
        r"(?<![\w'])[A-Za-z](?:\.[A-Za-z])+(?![\w'])\.?", lambda found: f" {found[0].replace('.', ' ').upper()} ", text
    )
    text = re.sub(r"(?<=\w)[.,:](?=\w)", " ", text)
    plain = "".join(map(_read, unicodedata.normalize("NFC", text)))
    plain = re.sub(r"(\d)('s\b)?", lambda found: f" {DIGITS[int(found[1])]}{found[2] or ''} ", plain)
    return [token for token in re.findall(r"[A-Za-z']+|[,.]", plain) if token.strip("'")]


def _read(char: str) -> str:
    """One character in ASCII: a letter, digit, apostrophe, pause or space; or nothing, of what has no sound."""
    if char.isspace() or char in _READ:
        return _READ.get(char, " ")
    if (digit := unicodedata.digit(char, None)) is not None:
        return str(digit)
    bare = "".join(c for c in unicodedata.normalize("NFD", char) if unicodedata.category(c) not in _SILENT)
    if not bare or (bare.isascii() and bare.isalpha()):
        return bare
    name = unicodedata.name(char, f"U+{ord(char):04X}").lower()
    raise ValueError(f"the character {char!r} ({name}) has no English reading: write it as words")


@cache
def _dictionary() -> dict[str, list[str]]:
    try:
        from pocketsphinx import get_model_path
    except ImportError:
        raise ImportError("phonemes need the library pocketsphinx: pip install 'kuosan[speech]'") from None
    lines = Path(get_model_path("en-us/cmudict-en-us.dict")).read_text("utf-8").splitlines()
    words = (line.split() for line in lines if line.strip())
    return {word: sounds for word, *sounds in words if not word.endswith(")")}  # "a(2)": another pronunciation


def _sounds(written: str) -> list[str] | None:
    """The phonemes of a word; None if they are not known."""
    if written.startswith("{"):
        return written[1:-1].split()
    known, bare = _dictionary(), written.strip("'")
    for word in (written.lower(), bare.lower()):
        if word in known:
            return known[word]
    if bare[-2:].lower() == "'s":
        stem = _sounds(bare[:-2])
        return None if stem is None else [*stem, *_possessive(stem[-1])]
    if bare.isupper() and bare.isalpha() and len(bare) <= _SPELLED:
        return [sound for letter in bare for sound in (["EY"] if letter == "A" else known[letter.lower()])]
    word = bare.lower()
    tails = [k for k in range(2, len(word) - _HALF + 1) if word[k:] in known]
    if halves := [k for k in tails if k >= _HALF and word[:k] in known]:
        k = min(halves, key=lambda k: abs(len(word) - 2 * k))
        return known[word[:k]] + known[word[k:]]
    for k in tails:
        if beginning := _beginning(word[:k]):
            return [*beginning, *known[word[k:]]]
    return None


def _possessive(last: str) -> list[str]:
    if last in HISSING:
        return ["IH", "Z"]
    return ["S"] if last in VOICELESS else ["Z"]


@cache
def _beginning(head: str) -> tuple[str, ...]:
    """How these letters are most often said before a known word in the dictionary; () if that is seldom."""
    known, found = _dictionary(), Counter[tuple[str, ...]]()
    for word, sounds in known.items():
        if word.startswith(head) and len(word) >= len(head) + _HALF:
            tail = known.get(word[len(head) :])
            if tail and len(tail) < len(sounds) and sounds[-len(tail) :] == tail:
                found[tuple(sounds[: -len(tail)])] += 1
    ((most, count),) = found.most_common(1) or [((), 0)]
    return most if count >= _ALIKE else ()
