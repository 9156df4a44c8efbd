"""The five scores of the E2E NLG challenge: two from packages, three that no kept package has."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from nltk.stem.snowball import SnowballStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from redmux_bench.ngram_scores import cider, nist
from redmux_bench.rouge_l import rouge_l

# What is dropped before METEOR, ROUGE-L and CIDEr: that of the COCO caption evaluation.
_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-",
     ".", "?", "!", ",", ":", "-", "--", "...", ";")
)  # fmt: skip
# Those of METEOR 1.5 for English.
_METEOR = {"alpha": 0.85, "beta": 0.2, "gamma": 0.6}


@dataclass(frozen=True, slots=True)
class Scores:
    """BLEU, METEOR and ROUGE-L in percent, NIST and CIDEr as they are: the paper's units."""

    bleu: float
    nist: float
    meteor: float
    rouge_l: float
    cider: float
    bleu_signature: str  # sacrebleu's, which tells all that its figure depends on


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Returns the scores of texts, each against its one or more references."""
    bleu = BLEU(lowercase=True, tokenize="13a")
    # sacrebleu takes the first reference of every text, the second of every text, and so on.
    streams = list(zip_longest(*references)) if references else []
    bleu_score = bleu.corpus_score(list(hypotheses), streams).score
    tokens = [mteval_tokens(text) for text in hypotheses]
    token_references = [[mteval_tokens(text) for text in texts] for texts in references]
    words = [caption_words(text) for text in hypotheses]
    word_references = [[caption_words(text) for text in texts] for texts in references]
    return Scores(
        bleu=bleu_score,
        nist=nist(tokens, token_references),
        meteor=100 * meteor(words, word_references),
        rouge_l=100 * rouge_l(words, word_references),
        cider=cider(words, word_references),
        bleu_signature=str(bleu.get_signature()),
    )


def mteval_tokens(text: str) -> list[str]:
    """Returns the lower-case tokens of a text as mteval-v13a has them, for BLEU and NIST."""
    tokenized: str = _TOKENIZER_13A(text.lower())
    return tokenized.split()


def caption_words(text: str) -> list[str]:
    """Returns the lower-case words of a text, without punctuation, as COCO caption evaluation.

    Stands in for Stanford's tokenizer, which needs Java: the same Treebank rules, with a full stop
    that ends a sentence inside the text and a pound sign as tokens of their own.
    """
    text = re.sub(r"\.(?=\s)", " . ", text).replace("£", " £ ")
    tokens = _TREEBANK.tokenize(text, convert_parentheses=True)
    words = (token.rstrip("-").lower() for token in tokens if token not in _PUNCTUATION)
    return [word for word in words if word]


def meteor(words: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Returns the mean METEOR of texts by NLTK, with the parameters of METEOR 1.5 for English.

    Words match where they or their stems are equal; WordNet, which NLTK would look up for
    synonyms, would have to be downloaded.
    """
    return statistics.fmean(
        meteor_score(list(texts), text, stemmer=_STEMMER, wordnet=_NoSynonyms(), **_METEOR)
        for text, texts in zip(words, references, strict=True)
    )


class _NoSynonyms:
    """Stands in for WordNet and knows no word."""

    def synsets(self, word: str) -> Sequence[object]:
        """Returns no meaning of the word."""
        return ()


_TOKENIZER_13A = Tokenizer13a()  # type: ignore[no-untyped-call]
_TREEBANK = NLTKWordTokenizer()
_STEMMER = SnowballStemmer("english")
