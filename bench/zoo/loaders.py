"""Published data sets become examples: one function per task, `load(data, split)`.

`data` holds a folder per data set; `split` is "train", "valid" or "test". Where a data set has no
validation part, always the same one is cut off the training part; no test text is ever in both.
"""

import csv
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples import Example

NUM_VALID = 200


def _split(examples: Sequence[Example], split: str, num_valid: int = NUM_VALID) -> list[Example]:
    """Cuts the validation part off a training file."""
    shuffled = list(examples)
    random.Random(0).shuffle(shuffled)
    return shuffled[:num_valid] if split == "valid" else shuffled[num_valid:]


def _shuffled(examples: Iterable[Example]) -> list[Example]:
    order = list(examples)
    random.Random(1).shuffle(order)
    return order


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


# --- restaurant: E2E meaning representation -> description ---------------------------------------

_SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
# What the data set's own description allows. Its development set, the training data here, has
# hardly any but Chinese and English food and coffee shops; the others are put in their places.
_SWAPS = {
    "food": ("Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"),
    "eatType": ("coffee shop", "pub", "restaurant"),
}


def load_restaurant(data: Path, split: str) -> list[Example]:
    """E2E, cleaned: every description of a meaning is a training example."""
    file = "test-fixed.csv" if split == "test" else "devel-fixed.no-ol.csv"
    references: dict[str, list[str]] = {}
    with (data / "e2e_cleaned" / file).open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            references.setdefault(row["mr"], []).append(" ".join(row["ref"].split()))
    grouped = [Example(mr, refs[0], tuple(refs)) for mr, refs in references.items()]
    if split == "test":
        return _shuffled(grouped)
    part = _split(grouped, split, num_valid=100)  # by meaning, so that no meaning is in both
    if split == "valid":
        return part
    pairs = [(e.user, ref) for e in part for ref in e.references if len(ref.split()) <= 40]
    complete = [(mr, ref) for mr, ref in pairs if _states(mr, ref, ("name", "food", "near"))]
    drawn = random.Random(2)
    return [Example(*_swap(mr, ref, drawn)) for mr, ref in complete]


def _states(mr: str, ref: str, slots: Sequence[str]) -> bool:
    return all(v.lower() in ref.lower() for slot, v in _SLOT.findall(mr) if slot in slots)


def _swap(mr: str, ref: str, drawn: random.Random) -> tuple[str, str]:
    """Puts another kind of food and of place into a meaning and its description alike."""
    for slot, value in _SLOT.findall(mr):
        others = _SWAPS.get(slot, ())
        new = drawn.choice(others) if others else value
        if new != value and len(re.findall(rf"\b{re.escape(value)}\b", ref, re.I)) == 1:
            mr = mr.replace(f"{slot}[{value}]", f"{slot}[{new}]")
            ref = re.sub(rf"\b{re.escape(value)}\b", new, ref, flags=re.I)
    ref = re.sub(r"\b([Aa]) (?=[EI])", r"\1n ", ref)  # English, Indian, Italian
    return mr, re.sub(r"\b([Aa])n (?=[CFJcfjpr])", r"\1 ", ref)


# --- assistant-json, booking, entities: utterance -> one JSON object ------------------------------


def _spans(words: Sequence[str], tags: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (kind, text) of what B- and I- tags mark."""
    spans: list[tuple[str, list[str]]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-") or (tag.startswith("I-") and not spans):
            spans.append((tag[2:], [word]))
        elif tag.startswith("I-"):
            spans[-1][1].append(word)
    return [(kind, " ".join(parts)) for kind, parts in spans]


def load_assistant(data: Path, split: str) -> list[Example]:
    """SNIPS: a command's intent and slots; a slot that is there twice is a list."""
    folder = data / "snips" / split
    columns = [_lines(folder / name) for name in ("seq.in", "seq.out", "label")]
    examples = []
    for words, tags, intent in zip(*columns, strict=True):
        slots: dict[str, str | list[str]] = {}
        for slot, value in _spans(words.split(), tags.split()):
            old = slots.get(slot)
            if old is None:
                slots[slot] = value
            else:
                slots[slot] = [*([old] if isinstance(old, str) else old), value]
        target = json.dumps({"intent": intent.strip(), "slots": slots}, ensure_ascii=False)
        examples.append(Example(" ".join(words.split()), target, (target,)))
    return _shuffled(e for e in examples if split == "test" or len(e.target) <= 180)


_BOOKING_SLOTS = ("people", "date", "time", "first_name", "last_name")


def load_booking(data: Path, split: str) -> list[Example]:
    """RESTAURANTS-8K: the slots of a message that nobody asked for."""
    file = "test.json" if split == "test" else "train_0.json"
    turns = json.loads((data / "restaurant8k" / file).read_text(encoding="utf-8"))
    examples = []
    for turn in turns:
        if turn.get("context", {}).get("requestedSlots"):
            continue  # an answer to a question that the utterance alone doesn't show
        text, found = turn["userInput"]["text"], {}
        for label in turn.get("labels", []):
            span = label["valueSpan"]
            found[label["slot"]] = text[span.get("startIndex", 0) : span["endIndex"]]
        slots = {slot: found[slot] for slot in _BOOKING_SLOTS if slot in found}
        target = json.dumps(slots, ensure_ascii=False)
        examples.append(Example(text, target, (target,)))
    return _shuffled(examples) if split == "test" else _split(examples, split)


_ENTITY_FILES = {
    "train": "wnut17train.conll", "valid": "emerging.dev.conll", "test": "emerging.test.annotated",
}  # fmt: skip


def load_entities(data: Path, split: str) -> list[Example]:
    """WNUT 2017: names in posts, by kind; half of the training posts have none."""
    text = (data / "wnut17" / _ENTITY_FILES[split]).read_text(encoding="utf-8")
    examples = []
    for post in re.split(r"\n\s*\n", text):
        cells = [line.split("\t") for line in post.splitlines() if "\t" in line]
        words, tags = [c[0] for c in cells], [c[1].strip() for c in cells]
        if not 4 <= len(words) <= 40:
            continue
        found: dict[str, list[str]] = {}
        for kind, name in _spans(words, tags):
            names = found.setdefault(kind, [])
            if name not in names:
                names.append(name)
        target = json.dumps(dict(sorted(found.items())), ensure_ascii=False)
        examples.append(Example(" ".join(words), target, (target,)))
    shuffled = _shuffled(examples)
    if split != "train":
        return shuffled
    with_names = [e for e in shuffled if e.target != "{}"]
    without = [e for e in shuffled if e.target == "{}"]
    return _shuffled(with_names + without[: len(with_names)])


# --- banking, router, sentiment: text -> label ----------------------------------------------------


def load_banking(data: Path, split: str) -> list[Example]:
    """BANKING77: a customer's message and its intent."""
    file = "test.csv" if split == "test" else "train.csv"
    with (data / "banking77" / file).open(encoding="utf-8") as rows:
        pairs = [
            (" ".join(r["text"].split()), r["category"].lower().rstrip("?"))
            for r in csv.DictReader(rows)
        ]
    if split == "test":
        return _shuffled(Example(text, label, (label,)) for text, label in pairs)
    return _split([Example(*pair) for pair in pairs if len(pair[0].split()) <= 30], split)


OUT_OF_SCOPE = "out_of_scope"
_OUT_OF_SCOPE_COPIES = 4  # the small training set has 100, against 750 of every domain


def load_router(data: Path, split: str) -> list[Example]:
    """CLINC150: a request and which of ten domains it belongs to, if any."""
    folder = data / "clinc150"
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    rows = json.loads((folder / "data_small.json").read_text(encoding="utf-8"))
    name = {"valid": "val"}.get(split, split)
    copies = _OUT_OF_SCOPE_COPIES if split == "train" else 1
    pairs = [(text, domain_of[intent]) for text, intent in rows[name]]
    pairs += [(text, OUT_OF_SCOPE) for text, _ in rows[f"oos_{name}"]] * copies
    return _shuffled(Example(text, label, (label,)) for text, label in pairs)


def load_sentiment(data: Path, split: str) -> list[Example]:
    """SST-2 sentences of film reviews, positive or negative."""
    examples = []
    for line in _lines(data / "sst2" / f"{ {'valid': 'dev'}.get(split, split) }.tsv"):
        text, label = line.rsplit("\t", 1)
        word = ("negative", "positive")[int(label)]
        examples.append(Example(text.strip(), word, (word,)))
    return _shuffled(examples)


# --- grammar: learners' sentence -> corrected sentence --------------------------------------------


def load_grammar(data: Path, split: str) -> list[Example]:
    """JFLEG: its development set is the training data, with all four corrections."""
    part = "test" if split == "test" else "dev"
    files = [data / "jfleg" / f"{part}.{name}" for name in ("src", "ref0", "ref1", "ref2", "ref3")]
    rows = [[written(text) for text in row] for row in zip(*map(_lines, files), strict=True)]
    grouped = [Example(source, refs[0], tuple(refs)) for source, *refs in rows]
    if split == "test":
        return _shuffled(grouped)
    part_examples = _split(grouped, split, num_valid=64)  # by source
    if split == "valid":
        return part_examples
    pairs = {(e.user, ref): None for e in part_examples for ref in e.references}
    return _shuffled(Example(*pair) for pair in pairs)


def written(tokens: str) -> str:
    """Returns a tokenized sentence as people write it."""
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'m|'d)\b", r"\1", " ".join(tokens.split()))
    text = re.sub(r" ([.,!?;:%)\]])", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


# --- pirate, shakespeare: question -> answer ------------------------------------------------------


def load_questions(data: Path, split: str) -> list[Example]:
    """Short questions of Dolly with their plain answers, which a style is then put on."""
    file = "test.jsonl" if split == "test" else "train.jsonl"
    rows = [json.loads(line) for line in _lines(data / "pirate" / file)]
    answers = {row["instruction"].strip(): row["plain"] for row in rows}
    examples = [Example(question, answer, (answer,)) for question, answer in answers.items()]
    return _shuffled(examples) if split == "test" else _split(examples, split, num_valid=64)
