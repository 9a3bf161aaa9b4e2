"""What is written and what is heard become the same words."""

import pytest

from kuosan.speech.words import normalised

WORDS = {
    "marks between words": ("Login incorrect.  Please try again!", "login incorrect please try again"),
    "white space": (" \tHello,\r\nWorld \n", "hello world"),
    "hyphens": ("Inter-Asterisk -- ok?", "inter asterisk ok"),
    "single letters": ("A.M. H_x", "a m h x"),
    "nothing": (" ... ", ""),
    "a straight apostrophe": ("don't", "don't"),
    "a typographic one": ("That\u2019s Don\u2019t", "that's don't"),
    "quotes": ("'party' parties' 'o'clock', rock 'n' roll", "party parties o'clock rock n roll"),
    "two apostrophes": ("a''b '' '", "a b"),
    "apostrophes at digits": ("the '90s and 5's", "the nine zero s and five s"),
    "digits": ("Dial 500, or 2 now", "dial five zero zero or two now"),
    "every digit": ("0123456789", "zero one two three four five six seven eight nine"),
    "digits in words": ("3D audio: #1_b, 3rd, H.323", "three d audio one b three rd h three two three"),
    "a decimal": ("3.14", "three one four"),
    "other digits": ("\u0665 \uff14\uff12 H\u2082O", "five four two h two o"),
    "numbers that are no digits": ("\u00bd cup of \u2167", "cup of"),
    "accents": ("Se\u00f1or, o\u00f9 \u00c9T\u00c9?", "se\u00f1or o\u00f9 \u00e9t\u00e9"),
    "an accent of its own": ("Zu\u0308rich J\u030cx", "z\u00fcrich \u01f0x"),
    "marks of letters": ("\u0928\u092e\u0938\u094d\u0924\u0947!", "\u0928\u092e\u0938\u094d\u0924\u0947"),
    "marks without a letter": ("1\ufe0f\u20e3 \u2764\ufe0f '\u0301", "one"),
    "no capitals": ("\u4f60\u597d\u3002", "\u4f60\u597d"),
}


@pytest.mark.parametrize(("text", "words"), WORDS.values(), ids=WORDS)
def test_words_are_written_as_they_are_said(text, words):
    """By hand: Arabic, wide and lowered digits; u and its dots, and j and its caron, are one letter each in NFC."""
    assert normalised(text) == words
    assert normalised(words) == words
