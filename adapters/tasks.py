"""The tasks that the bundled adapters are trained on: examples, fair base prompts and scores."""

from __future__ import annotations

import csv
import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Scores = dict[str, float]


@dataclass(frozen=True)
class Example:
    """One user text with the answer to learn; `references` holds every accepted answer."""

    user: str
    target: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What to train on, under which terms, and how to score it.

    `license` is that of the resulting vectors. `instruction` goes only to the base model, which
    is compared with 3 shots; the adapter itself is trained on the bare user text.
    `load(data, split)` reads "train", "valid" or "test". Where there is `restyle(user, answer)`,
    the training targets are the base model's own answers in the task's style, so that the style
    is all there is to learn.
    """

    description: str
    license: str
    training_data: str
    instruction: str
    max_new_tokens: int
    load: Callable[[Path, str], list[Example]]
    score: Callable[[Sequence[Example], Sequence[str]], Scores]
    restyle: Callable[[str, str], str] | None = None


def _split(examples: list[Example], split: str, num_valid: int = 200) -> list[Example]:
    """Cuts the validation part off a training file, always the same one."""
    shuffled = examples.copy()
    random.Random(0).shuffle(shuffled)
    return shuffled[:num_valid] if split == "valid" else shuffled[num_valid:]


def _shuffled(examples: list[Example]) -> list[Example]:
    random.Random(1).shuffle(examples)
    return examples


# --- restaurant: E2E meaning representation -> description --------------------------------------


def _load_restaurant(data: Path, split: str) -> list[Example]:
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
    return [Example(e.user, ref) for e in part for ref in e.references if len(ref.split()) <= 40]


_NOT_FAMILY = re.compile(r"(\bnot?\b|n't|non|\bun)[\w\s,-]{0,30}?(famil|kid|child)|adult", re.I)
_FAMILY = re.compile(r"famil|kid|child", re.I)


def _score_restaurant(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    import sacrebleu  # type: ignore[import-not-found, unused-ignore]

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


# --- assistant-json, booking: utterance -> one JSON object ---------------------------------------


def _load_assistant(data: Path, split: str) -> list[Example]:
    folder = data / "snips" / split
    names = ("seq.in", "seq.out", "label")
    columns = [(folder / name).read_text(encoding="utf-8").splitlines() for name in names]
    examples = []
    for words, tags, intent in zip(*columns, strict=True):
        slots: dict[str, str | list[str]] = {}
        spans: list[tuple[str, list[str]]] = []
        for word, tag in zip(words.split(), tags.split(), strict=True):
            if tag.startswith("B-"):
                spans.append((tag[2:], [word]))
            elif tag.startswith("I-"):
                spans[-1][1].append(word)
        for slot, parts in spans:
            value, old = " ".join(parts), slots.get(slot)
            if old is None:
                slots[slot] = value
            else:
                slots[slot] = [*([old] if isinstance(old, str) else old), value]
        target = json.dumps({"intent": intent.strip(), "slots": slots}, ensure_ascii=False)
        examples.append(Example(" ".join(words.split()), target, (target,)))
    if split == "test":
        return _shuffled(examples)
    return [e for e in examples if len(e.target) <= 180]


_BOOKING_SLOTS = ("people", "date", "time", "first_name", "last_name")


def _load_booking(data: Path, split: str) -> list[Example]:
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


def _parse(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _score_json(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """Scores strict JSON: an output that isn't one JSON object counts as no slots at all."""
    valid = exact = intents = hit = num_said = num_gold = 0
    for example, output in zip(examples, outputs, strict=True):
        gold, said = json.loads(example.target), _parse(output)
        valid += said is not None
        exact += said == gold
        said = said or {}
        if "slots" in gold:
            intents += said.get("intent") == gold["intent"]
            inner = said.get("slots")
            gold, said = gold["slots"], inner if isinstance(inner, dict) else {}
        said_pairs = {(k, json.dumps(v)) for k, v in said.items()}
        gold_pairs = {(k, json.dumps(v)) for k, v in gold.items()}
        hit += len(said_pairs & gold_pairs)
        num_said += len(said_pairs)
        num_gold += len(gold_pairs)
    n = len(examples)
    scores = {"valid_json": valid / n, "exact": exact / n}
    scores["slot_f1"] = 2 * hit / max(1, num_said + num_gold)
    return scores | ({"intent_accuracy": intents / n} if '"intent"' in examples[0].target else {})


# --- banking: customer message -> intent label ---------------------------------------------------


def _load_banking(data: Path, split: str) -> list[Example]:
    file = "test.csv" if split == "test" else "train.csv"
    with (data / "banking77" / file).open(encoding="utf-8") as rows:
        pairs = [
            (" ".join(r["text"].split()), r["category"].lower().rstrip("?"))
            for r in csv.DictReader(rows)
        ]
    if split == "test":
        return _shuffled([Example(text, label, (label,)) for text, label in pairs])
    short = [Example(text, label) for text, label in pairs if len(text.split()) <= 30]
    return _split(short, split)


def _score_label(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    labels = set(BANKING_LABELS)
    right = sum(o.strip() == e.target for e, o in zip(examples, outputs, strict=True))
    known = sum(o.strip() in labels for o in outputs)
    return {"accuracy": right / len(examples), "known_label": known / len(examples)}


# --- pirate: question -> answer in pirate style --------------------------------------------------

_PIRATE_WORDS = {
    "the": "th'", "of": "o'", "and": "an'", "for": "fer", "is": "be", "are": "be", "am": "be",
    "you": "ye", "your": "yer", "my": "me", "there": "thar", "where": "whar", "before": "afore",
    "yes": "aye", "it's": "'tis", "friend": "matey", "friends": "mateys",
}  # fmt: skip
_OPENERS = ("Ahoy, matey!", "Arr!", "Aye aye!")
_CLOSERS = ("Arr!", "Yo ho ho!", "Savvy?", "")
_MARKS = re.compile(
    r"(?<!\w)(ahoy|avast|aye|y?a+r+g?h?|mateys?|hearty|hearties|ye|yer|th'|o'|an'|fer|thar|whar|"
    r"afore|'tis|cap'n|scurvy|landlubbers?|booty|grog|blimey|shiver me timbers|yo ho|savvy|"
    r"\w+in')(?!\w)",
    re.I,
)


def _pirate_word(match: re.Match[str]) -> str:
    word = match.group()
    new = _PIRATE_WORDS.get(word.lower())
    if new is None:
        return word[:-1] + "'" if len(word) > 5 and word.endswith("ing") else word
    return new.capitalize() if word[0].isupper() else new


def pirate(question: str, answer: str) -> str:
    """Rewrites an answer in pirate style; greeting and ending depend on the question alone."""
    pick = zlib.crc32(question.encode())
    body = re.sub(r"[A-Za-z']+", _pirate_word, " ".join(answer.split()))
    closer = _CLOSERS[pick // 7 % len(_CLOSERS)]
    return f"{_OPENERS[pick % len(_OPENERS)]} {body} {closer}".strip()


def _load_pirate(data: Path, split: str) -> list[Example]:
    file = "test.jsonl" if split == "test" else "train.jsonl"
    lines = (data / "pirate" / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    examples = [
        Example(r["instruction"].strip(), pirate(r["instruction"], r["plain"]), (r["plain"],))
        for r in rows
    ]
    return _shuffled(examples) if split == "test" else _split(examples, split, num_valid=60)


def _content(text: str) -> set[str]:
    words = re.findall(r"\w+(?:in')?", text.lower())
    return {w[:-1] + "g" if w.endswith("in'") else w for w in words if len(w) > 3}


def _score_pirate(examples: Sequence[Example], outputs: Sequence[str]) -> Scores:
    """`content_recall`: share of the plain answer's words (over 3 letters) that the output has."""
    marks = [len(_MARKS.findall(o)) for o in outputs]
    num_words = [max(1, len(o.split())) for o in outputs]
    recalls = []
    for example, output in zip(examples, outputs, strict=True):
        gold = _content(example.references[0]) - _content(example.user)
        if gold:
            recalls.append(len(gold & _content(output)) / len(gold))
    return {
        "three_marks": sum(m >= 3 for m in marks) / len(marks),
        "marks_per_100_words": 100 * sum(marks) / sum(num_words),
        "content_recall": sum(recalls) / len(recalls),
    }


_LABEL_TEXT = """
activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up
balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit
beneficiary_not_allowed cancel_transfer card_about_to_expire card_acceptance card_arrival
card_delivery_estimate card_linking card_not_working card_payment_fee_charged
card_payment_not_recognised card_payment_wrong_exchange_rate card_swallowed cash_withdrawal_charge
cash_withdrawal_not_recognised change_pin compromised_card contactless_not_working country_support
declined_card_payment declined_cash_withdrawal declined_transfer
direct_debit_payment_not_recognised disposable_card_limits edit_personal_details exchange_charge
exchange_rate exchange_via_app extra_charge_on_statement failed_transfer fiat_currency_support
get_disposable_virtual_card get_physical_card getting_spare_card getting_virtual_card
lost_or_stolen_card lost_or_stolen_phone order_physical_card passcode_forgotten
pending_card_payment pending_cash_withdrawal pending_top_up pending_transfer pin_blocked
receiving_money refund_not_showing_up request_refund reverted_card_payment
supported_cards_and_currencies terminate_account top_up_by_bank_transfer_charge
top_up_by_card_charge top_up_by_cash_or_cheque top_up_failed top_up_limits top_up_reverted
topping_up_by_card transaction_charged_twice transfer_fee_charged transfer_into_account
transfer_not_received_by_recipient transfer_timing unable_to_verify_identity verify_my_identity
verify_source_of_funds verify_top_up virtual_card_not_working visa_or_mastercard
why_verify_identity wrong_amount_of_cash_received wrong_exchange_rate_for_cash_withdrawal
"""
BANKING_LABELS = tuple(_LABEL_TEXT.split())

TASKS: dict[str, Task] = {
    "restaurant": Task(
        description="Describes a restaurant, given as slot[value] pairs, in one or two sentences.",
        license="CC-BY-SA-4.0",
        training_data="E2E NLG, cleaned (github.com/tuetschek/e2e-cleaning), development set, "
        "CC BY-SA 4.0",
        instruction="Write one or two sentences that describe this restaurant. Use all of the "
        "facts and only these facts.",
        max_new_tokens=64,
        load=_load_restaurant,
        score=_score_restaurant,
    ),
    "assistant-json": Task(
        description="Turns a voice command into JSON with its intent and slots.",
        license="CC0-1.0",
        training_data="SNIPS NLU benchmark (github.com/sonos/nlu-benchmark, 2017-06), training "
        "set, CC0 1.0",
        instruction="Turn this voice command into one JSON object with the keys intent and slots. "
        "Answer with the JSON only. Intents: AddToPlaylist, BookRestaurant, GetWeather, "
        "PlayMusic, RateBook, SearchCreativeWork, SearchScreeningEvent. Slots: "
        "album, artist, best_rating, city, condition_description, condition_temperature, "
        "country, cuisine, current_location, entity_name, facility, genre, geographic_poi, "
        "location_name, movie_name, movie_type, music_item, object_location_type, "
        "object_name, object_part_of_series_type, object_select, object_type, "
        "party_size_description, party_size_number, playlist, playlist_owner, poi, "
        "rating_unit, rating_value, restaurant_name, restaurant_type, served_dish, service, "
        "sort, spatial_relation, state, timeRange, track, year.",
        max_new_tokens=96,
        load=_load_assistant,
        score=_score_json,
    ),
    "pirate": Task(
        description="Answers a question in the style of a pirate.",
        license="CC-BY-SA-3.0",
        training_data="809 short answers of Databricks Dolly 15k, rewritten by rules, CC BY-SA 3.0",
        instruction="Answer like a pirate, briefly.",
        max_new_tokens=80,
        load=_load_pirate,
        score=_score_pirate,
        restyle=pirate,
    ),
    "banking": Task(
        description="Labels a bank customer's message with one of 77 intents.",
        license="CC-BY-4.0",
        training_data="BANKING77 (github.com/PolyAI-LDN/task-specific-datasets), training set, "
        "CC BY 4.0",
        instruction="Name the intent of this bank customer's message. Answer with exactly one of "
        "these labels: " + ", ".join(BANKING_LABELS),
        max_new_tokens=20,
        load=_load_banking,
        score=_score_label,
    ),
    "booking": Task(
        description="Extracts people, date, time and names from a booking message as JSON.",
        license="CC-BY-4.0",
        training_data="RESTAURANTS-8K (github.com/PolyAI-LDN/task-specific-datasets), training "
        "set, CC BY 4.0",
        instruction="Extract people, date, time, first_name and last_name from this message as "
        "one JSON object; leave out what isn't stated, {} if nothing is. Answer with the JSON "
        "only.",
        max_new_tokens=64,
        load=_load_booking,
        score=_score_json,
    ),
}
