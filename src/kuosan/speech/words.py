"""The words of a text, as they are said: one spelling for what is written and for what a recogniser hears."""

import re
import unicodedata

#: The names of 0 to 9, in this order.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def normalised(text: str) -> str:
    """A text as lower-case words in Unicode's form NFC, one space between them.

    Letters stay, with their marks, and apostrophes between two of them ("don't"), which become straight. Each digit, of
    any script, becomes its English name: "42" is "four two". All else parts words, so that "A.M." is "a m".
    """
    plain = ""
    for char in unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'"):
        kind, digit = unicodedata.category(char)[0], unicodedata.digit(char, None)
        if digit is not None:
            plain += f" {DIGITS[digit]} "
        elif kind == "L" or char == "'" or (kind == "M" and plain and plain[-1] not in " '"):
            plain += char
        else:
            plain += " "
    return " ".join(re.sub(r"(?<![^ '])'|'(?![^ '])", " ", plain).split())
