"""Ways of speaking as rules: plain answers are rewritten, and their marks are counted."""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How a plain text is rewritten word by word, framed, and recognised.

    Greeting and ending depend on the question alone, so that they can be learned.
    """

    phrases: Mapping[str, str]  # replaced first, whole words, any case
    rewrite_word: Callable[[str], str]  # gets lower-case words
    openers: Sequence[str]
    closers: Sequence[str]
    marks: re.Pattern[str]

    def apply(self, question: str, answer: str) -> str:
        """Returns the answer in this style."""
        pick = zlib.crc32(question.encode())
        body = " ".join(answer.split())
        for plain, styled in self.phrases.items():
            body = re.sub(rf"\b{plain}\b", lambda m, s=styled: _cased(m[0], s), body, flags=re.I)
        body = re.sub(r"[A-Za-z']+", self._word, body)
        opener = self.openers[pick % len(self.openers)]
        closer = self.closers[pick // 7 % len(self.closers)]
        return f"{opener} {body} {closer}".strip()

    def num_marks(self, text: str) -> int:
        """Returns how many words and sayings of the style a text has."""
        return len(self.marks.findall(text))

    def _word(self, match: re.Match[str]) -> str:
        word = match[0]
        new = self.rewrite_word(word.lower())
        return word if new == word.lower() else _cased(word, new)


def _cased(old: str, new: str) -> str:
    if not old[0].isupper():
        return new
    return "'" + new[1:].capitalize() if new.startswith("'") else new.capitalize()


_PIRATE_WORDS = {
    "the": "th'", "of": "o'", "and": "an'", "for": "fer", "is": "be", "are": "be", "am": "be",
    "you": "ye", "your": "yer", "my": "me", "there": "thar", "where": "whar", "before": "afore",
    "yes": "aye", "it's": "'tis", "friend": "matey", "friends": "mateys",
}  # fmt: skip


def _pirate_word(word: str) -> str:
    dropped = word[:-1] + "'" if len(word) > 5 and word.endswith("ing") else word
    return _PIRATE_WORDS.get(word, dropped)


PIRATE = Style(
    phrases={},
    rewrite_word=_pirate_word,
    openers=("Ahoy, matey!", "Arr!", "Aye aye!"),
    closers=("Arr!", "Yo ho ho!", "Savvy?", ""),
    marks=re.compile(
        r"(?<!\w)(ahoy|avast|aye|y?a+r+g?h?|mateys?|hearty|hearties|ye|yer|th'|o'|an'|fer|thar|"
        r"whar|afore|'tis|cap'n|scurvy|landlubbers?|booty|grog|blimey|shiver me timbers|yo ho|"
        r"savvy|\w+in')(?!\w)",
        re.I,
    ),
)

_BARD_WORDS = {
    "you": "thou", "your": "thy", "yours": "thine", "has": "hath", "does": "doth", "says": "saith",
    "said": "quoth", "before": "ere", "often": "oft", "over": "o'er", "never": "ne'er",
    "ever": "e'er", "between": "betwixt", "near": "nigh", "perhaps": "perchance", "yes": "ay",
    "no": "nay", "very": "most", "why": "wherefore", "while": "whilst", "among": "amongst",
    "written": "writ", "called": "yclept", "known": "famed", "people": "folk",
}  # fmt: skip
_BARD_VERBS = frozenset(
    """
    allows appears becomes begins believes brings causes combines comes consists contains
    creates depends describes ends falls feels flows follows gives goes grows happens helps
    holds includes involves keeps knows leads lies lives looks loves makes means moves needs
    occurs offers opens plays produces provides refers remains represents requires rises runs
    seems serves shows sits speaks stands starts takes tells turns uses varies wants wears
    works writes
    """.split()  # noqa: SIM905 - a list of 60 words is no easier to read
)


def _bard_word(word: str) -> str:
    if word in _BARD_VERBS:
        stem = word[:-3] + "i" if word.endswith("ies") else word.removesuffix("s").rstrip("e")
        return f"{stem}eth"
    return _BARD_WORDS.get(word, word)


BARD = Style(
    phrases={"it is": "'tis", "it's": "'tis", "it was": "'twas", "you are": "thou art"},
    rewrite_word=_bard_word,
    openers=("Hark, good friend!", "Prithee, lend me thine ear!", "Forsooth!"),
    closers=("Mark me well.", "Fare thee well.", "So sayeth the sage.", ""),
    marks=re.compile(
        r"(?<!\w)(hark|prithee|forsooth|verily|alas|thou|thee|thy|thine|art|hath|doth|dost|hast|"
        r"'tis|'twas|ere|oft|o'er|ne'er|e'er|betwixt|nigh|perchance|methinks|ay|nay|wherefore|"
        r"whilst|amongst|hither|thither|anon|quoth|writ|yclept|mark me well|"
        r"(?!teeth|beneath)[a-z]{2,}eth)(?!\w)",
        re.I,
    ),
)
