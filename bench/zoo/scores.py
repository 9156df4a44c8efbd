"""How answers are scored; every function gets the examples and the answers in their order."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from examples import Example
from styles import Style

Scores = dict[str, float]

# --- descriptions -------------------------------------------------------------------------------

_NOT_FAMILY = re.compile(r"(\bnot?\b|n't|non|\bun)[\w\s,-]{0,30}?(famil|kid|child)|adult", re.I)
_FAMILY = re.compile(r"famil|kid|child", re.I)


def score_restaurant(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """BLEU against all references, and per slot the share of answers that state it rightly."""
    import sacrebleu

    width = max(len(e.references) for e in examples)
    streams = [
        [e.references[i] if i < len(e.references) else "" for e in examples] for i in range(width)
    ]
    scores = {"bleu": sacrebleu.corpus_bleu(list(outputs), streams).score}
    hits: dict[str, list[bool]] = {}
    for example, output in zip(examples, outputs, strict=True):
        for slot, value in re.findall(r"(\w[\w ]*)\[([^\]]*)\]", example.user):
            if slot in ("name", "food", "near", "area"):
                hits.setdefault(slot, []).append(value.lower() in output.lower())
            elif slot == "familyFriendly":
                friendly = bool(_FAMILY.search(output)) and not _NOT_FAMILY.search(output)
                right = friendly if value == "yes" else bool(_NOT_FAMILY.search(output))
                hits.setdefault(slot, []).append(right)
    return scores | {f"{slot}_stated": sum(h) / len(h) for slot, h in sorted(hits.items())}


# --- JSON -----------------------------------------------------------------------------------------


def parse_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object that a text is, None where it is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _pairs(slots: dict[str, Any]) -> set[tuple[str, str]]:
    """Returns (slot, value), one for each value of a list."""
    return {
        (slot, json.dumps(value))
        for slot, values in slots.items()
        for value in (values if isinstance(values, list) else [values])
    }


def score_json(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """Scores strict JSON: an output that isn't one JSON object counts as no slots at all.

    `always_empty` is what the answer {} would have of `exact`.
    """
    valid = exact = intents = hit = num_said = num_gold = empty = 0
    has_intent = '"intent"' in examples[0].target
    for example, output in zip(examples, outputs, strict=True):
        gold, said = json.loads(example.target), parse_object(output)
        valid += said is not None
        exact += said == gold
        empty += gold == {}
        said = said or {}
        if has_intent:
            intents += said.get("intent") == gold["intent"]
            inner = said.get("slots")
            gold, said = gold["slots"], inner if isinstance(inner, dict) else {}
        said_pairs, gold_pairs = _pairs(said), _pairs(gold)
        hit += len(said_pairs & gold_pairs)
        num_said += len(said_pairs)
        num_gold += len(gold_pairs)
    n = len(examples)
    f1 = 2 * hit / max(1, num_said + num_gold)
    scores = {"slot_f1": f1, "exact": exact / n, "valid_json": valid / n}
    other = {"intent_accuracy": intents / n} if has_intent else {"always_empty": empty / n}
    return scores | other


# --- labels ---------------------------------------------------------------------------------------


def score_label(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """Exact match; `most_frequent` is what the commonest label would have."""
    right = sum(o.strip() == e.target for e, o in zip(examples, outputs, strict=True))
    ((_, commonest),) = Counter(e.target for e in examples).most_common(1)
    return {"accuracy": right / len(examples), "most_frequent": commonest / len(examples)}


def score_router(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """As `score_label`, with the share of requests out of scope that are recognised."""
    pairs = zip(examples, outputs, strict=True)
    outside = [o.strip() == e.target for e, o in pairs if e.target == "out_of_scope"]
    recall = {"out_of_scope_recall": sum(outside) / len(outside)} if outside else {}
    return score_label(examples, outputs) | recall


# --- styles ---------------------------------------------------------------------------------------


def _content(text: str) -> set[str]:
    words = re.findall(r"\w+in'|\w+", text.lower())
    return {w[:-1] + "g" if w.endswith("in'") else w for w in words if len(w) > 3}


def score_style(style: Style, examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """`content_recall`: share of the plain answer's words (over 3 letters) that the output has."""
    marks = [style.num_marks(o) for o in outputs]
    num_words = sum(len(o.split()) for o in outputs)
    recalls = []
    for example, output in zip(examples, outputs, strict=True):
        gold = _content(example.references[0]) - _content(example.user)
        if gold:
            recalls.append(len(gold & _content(output)) / len(gold))
    return {
        "three_marks": sum(m >= 3 for m in marks) / len(marks),
        "marks_per_100_words": 100 * sum(marks) / max(1, num_words),
        "content_recall": sum(recalls) / max(1, len(recalls)),
    }


# --- grammar --------------------------------------------------------------------------------------

_GLEU_ORDER = 4
_GLEU_DRAWS = 200


def score_grammar(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """GLEU of Napoles et al. (2015, without tuning), and that of leaving every text as it is."""
    sources = [e.user for e in examples]
    changed = sum(o.strip() != s for s, o in zip(sources, outputs, strict=True))
    return {
        "gleu": gleu(sources, [e.references for e in examples], outputs),
        "gleu_of_source": gleu(sources, [e.references for e in examples], sources),
        "changed": changed / len(sources),
    }


def gleu(
    sources: Sequence[str], references: Sequence[Sequence[str]], outputs: Sequence[str]
) -> float:
    """Returns GLEU in percent, the mean over draws of one reference per sentence.

    n-grams shared with the reference count for an output; those that it kept from the source and
    that the reference hasn't count against it.
    """
    rows = zip(sources, references, outputs, strict=True)
    counts = [[list(_gleu_counts(s, r, o)) for r in refs] for s, refs, o in rows]
    drawn = np.random.default_rng(0)
    scores = []
    for _ in range(_GLEU_DRAWS):
        sums = np.sum([refs[drawn.integers(len(refs))] for refs in counts], axis=0)
        length, wanted = sums[:2]
        hits, totals = sums[2::2], sums[3::2]
        if length == 0 or (hits == 0).any():
            scores.append(0.0)
            continue
        scores.append(np.exp(min(0.0, 1 - wanted / length) + np.log(hits / totals).mean()))
    return float(100 * np.mean(scores))


def _gleu_counts(source: str, reference: str, output: str) -> Iterator[int]:
    s, r, o = (re.findall(r"\w+|[^\w\s]", text) for text in (source, reference, output))
    yield len(o)
    yield len(r)
    for n in range(1, _GLEU_ORDER + 1):
        s_n, r_n, o_n = (Counter(zip(*(t[i:] for i in range(n)), strict=False)) for t in (s, r, o))
        only_source = Counter({gram: count for gram, count in s_n.items() if gram not in r_n})
        yield max((o_n & r_n).total() - (o_n & only_source).total(), 0)
        yield max(len(o) + 1 - n, 0)
