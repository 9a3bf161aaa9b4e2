"""Text becomes the phonemes that are said."""

import sys

import pytest

from kuosan.speech import phonemes as module
from kuosan.speech.phonemes import PAD, SYMBOLS, encode, phonemes

SAID = {
    "a word": ("Hello", ". HH AH L OW ."),
    "two words": ("hello world", ". HH AH L OW | W ER L D ."),
    "a comma": ("yes, no", ". Y EH S , N OW ."),
    "a semicolon, a colon": ("yes; no: yes", ". Y EH S , N OW , Y EH S ."),
    "ends of sentences": ("Yes. No! Yes?", ". Y EH S . N OW . Y EH S ."),
    "the greatest of several marks": ('"yes", (no). "Yes"', ". Y EH S , N OW . Y EH S ."),
    "a lesser mark after a greater": ("yes. (no) [no]", ". Y EH S . N OW , N OW ."),
    "marks of excitement": ("no!!! yes?!", ". N OW . Y EH S ."),
    "what goes on": ("...no, yes...", ", N OW , Y EH S ,"),
    "one character for it": ("\u2026no\u2026", ", N OW ,"),
    "a dash": ("yes\u2014no -- yes - no", ". Y EH S , N OW , Y EH S , N OW ."),
    "a hyphen": ("yes-no", ". Y EH S | N OW ."),
    "line breaks": (" yes\r\n\tno\n", ". Y EH S | N OW ."),
    "every digit alone": ("7", ". S EH V AH N ."),
    "digits one by one": ("42", ". F AO R | T UW ."),
    "a subscript": ("H\u2082O", ". EY CH | T UW | OW ."),
    "a mark inside a number": ("3.14", ". TH R IY | W AH N | F AO R ."),
    "the article": ("a plan", ". AH | P L AE N ."),
    "the article before phonemes": ("a {P L AE N}", ". AH | P L AE N ."),
    "a as a letter": ("plan a, a", ". P L AE N | EY , EY ."),
    "capital letters": ("plan A or B", ". P L AE N | EY | AO R | B IY ."),
    "letters with stops": ("A.M. no", ". EY | EH M | N OW ."),
    "small letters with stops": ("a.m", ". EY | EH M ."),
    "capitals": ("PBX", ". P IY B IY EH K S ."),
    "capitals with a": ("IAX", ". AY EY EH K S ."),
    "capitals that are a word": ("YES", ". Y EH S ."),
    "a contraction": ("Don't", ". D OW N T ."),
    "a typographic apostrophe": ("don\u2019t", ". D OW N T ."),
    "quotes": ("'yes' \u2018no\u2019 ' plans'", ". Y EH S | N OW | P L AE N Z ."),
    "the possessive after a voice": ("smartphone's", ". S M AA R T F OW N Z ."),
    "without one": ("touchgate's", ". T AH CH G EY T S ."),
    "after a hiss": ("lowercase's", ". L OW ER K EY S IH Z ."),
    "the possessive of a digit": ("5's", ". F AY V Z ."),
    "two words in one": ("touchtone", ". T AH CH T OW N ."),
    "the most even halves": ("buttonboard", ". B AH T AH N B AO R D ."),
    "a beginning": ("unmute", ". AH N M Y UW T ."),
    "an accent": ("se\u00f1or sen\u0303or", ". S IY N Y AO R | S IY N Y AO R ."),
    "phonemes": ("{HH AH L OW}", ". HH AH L OW ."),
    "phonemes among words": ("no,{ HH  AH }yes", ". N OW , HH AH | Y EH S ."),
}

WRONG = {
    "nothing": ("", "expected words to say, got ''"),
    "only marks": (" ... ' - ", "expected words to say"),
    "a word that nobody knows": ("yes blorptix", r"known of 'blorptix': .*in braces, such as \{HH AH L OW\}"),
    "five of them": ("xqa xqb xqc xqd xqe", "'xqa', 'xqb', 'xqc', 'xqd', 'xqe': write"),
    "more than five, each once": ("xqa xqb xqc xqa xqd xqe xqf xqg", "'xqa', 'xqb', 'xqc', 'xqd', 'xqe' and 2 more"),
    "long capitals": ("DAHDI", "'DAHDI'"),
    "a possessive of it": ("blorptix's", '"blorptix\'s"'),
    "halves that are too short": ("zenoxbo", "'zenoxbo'"),
    "Chinese": ("yes \u4e2d", "'\u4e2d'.* has no English reading"),
    "a currency": ("5 \u20ac", "'\u20ac' \\(euro sign\\)"),
    "a fraction": ("\u00bd", "'\u00bd'"),
    "a sign": ("no #", "'#' \\(number sign\\)"),
    "Greek": ("\u03b1", "'\u03b1'"),
    "a bell": ("\x07", "u\\+0007"),
    "an open brace": ("{HH AH", "a brace { has no other"),
    "a closed one": ("HH}", "a brace } has no other"),
    "empty braces": ("{ }", "expected phonemes in braces"),
    "stress": ("{HH AH0}", "'AH0' is none .vowels are without stress"),
    "a pause in braces": ("{HH , AH}", "',' is none"),
    "padding in braces": ("{_}", "'_' is none"),
}


@pytest.mark.parametrize(("text", "said"), SAID.values(), ids=SAID)
def test_text_is_said(text, said):
    """As written in the dictionary's file, or by its conventions; | stands for the pause between words."""
    assert phonemes(text) == [" " if symbol == "|" else symbol for symbol in said.split()]


@pytest.mark.parametrize(("text", "why"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_said_is_named(text, why):
    with pytest.raises(ValueError, match=why):
        phonemes(text)


def test_symbols_are_arpabet_and_pauses():
    """24 consonants and 15 vowels (CMU's phone list); the first four are fixed, as trained models know them by id."""
    assert SYMBOLS[:4] == (PAD, " ", ",", ".")
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 4 + 24 + 15
    assert {"AH", "ZH", "NG", "OY"} < set(SYMBOLS)
    assert "AH0" not in SYMBOLS


def test_ids_are_places_among_the_symbols():
    ids = encode("Yes, a no")
    assert [SYMBOLS[k] for k in ids] == [".", "Y", "EH", "S", ",", "AH", " ", "N", "OW", "."]
    assert 0 not in ids


def test_every_word_of_the_dictionary_is_made_of_symbols():
    known = module._dictionary()
    assert len(known) > 100_000
    assert {sound for sounds in known.values() for sound in sounds} <= set(SYMBOLS[4:])


def test_what_is_returned_is_the_callers_own():
    phonemes("hello").clear()
    encode("hello").clear()
    assert phonemes("hello") == [".", "HH", "AH", "L", "OW", "."]


def test_a_missing_dictionary_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    module._dictionary.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pocketsphinx: pip install 'kuosan\[speech\]'"):
            phonemes("hello")
        assert phonemes("{HH AY}") == [".", "HH", "AY", "."]
    finally:
        module._dictionary.cache_clear()
