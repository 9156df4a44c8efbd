"""The tasks of the zoo: what is learned, under which terms, and how it is scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import loaders
import scores
from examples import Example
from styles import BARD, PIRATE, Style


@dataclass(frozen=True)
class Task:
    """What to train on, under which terms, and how to score it.

    `license` is that of the resulting vectors. `instruction` goes only to the base model, which
    is compared with 3 shots; the adapter itself is trained on the bare user text.
    `load(data, split)` reads "train", "valid" or "test" of the published files. Where there is a
    `style`, the answers to learn are the base model's own in that style, so that the style is all
    there is to learn.
    `metric` names the score that choices are made by. `steps` is the share of the common number of
    training steps, for small data. `labels` are few enough to compare their likelihoods.
    """

    description: str
    license: str
    training_data: str
    instruction: str
    metric: str
    max_new_tokens: int
    load: Callable[[Path, str], list[Example]]
    score: Callable[[Sequence[Example], Sequence[str]], scores.Scores]
    steps: float = 1.0
    labels: tuple[str, ...] = ()
    style: Style | None = None


def _styled(style: Style, name: str) -> dict[str, Any]:
    return {
        "license": "CC-BY-SA-3.0",
        "training_data": "809 short questions of Databricks Dolly 15k, CC BY-SA 3.0, with the "
        "base model's own one-sentence answers, rewritten by the rules of "
        f"{name} in bench/zoo/styles.py",
        "metric": "three_marks",
        "max_new_tokens": 80,
        "load": loaders.load_questions,
        "score": partial(scores.score_style, style),
        "steps": 0.5,
        "style": style,
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
_DOMAINS = (
    "banking", "credit_cards", "kitchen_and_dining", "home", "auto_and_commute", "travel",
    "utility", "work", "small_talk", "meta", loaders.OUT_OF_SCOPE,
)  # fmt: skip

TASKS: dict[str, Task] = {
    "restaurant": Task(
        description="Describes a restaurant, given as slot[value] pairs, in one or two sentences.",
        license="CC-BY-SA-4.0",
        training_data="E2E NLG, cleaned (github.com/tuetschek/e2e-cleaning), development set, "
        "CC BY-SA 4.0; descriptions that leave out name, food or place nearby are left out, and "
        "kinds of food and of place are exchanged by other ones at random",
        instruction="Write one or two sentences that describe this restaurant. Use all of the "
        "facts and only these facts.",
        metric="bleu",
        max_new_tokens=64,
        load=loaders.load_restaurant,
        score=scores.score_restaurant,
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
        metric="slot_f1",
        max_new_tokens=96,
        load=loaders.load_assistant,
        score=scores.score_json,
    ),
    "banking": Task(
        description="Labels a bank customer's message with one of 77 intents.",
        license="CC-BY-4.0",
        training_data="BANKING77 (github.com/PolyAI-LDN/task-specific-datasets), training set, "
        "CC BY 4.0",
        instruction="Name the intent of this bank customer's message. Answer with exactly one of "
        "these labels: " + ", ".join(BANKING_LABELS),
        metric="accuracy",
        max_new_tokens=20,
        load=loaders.load_banking,
        score=scores.score_label,
    ),
    "booking": Task(
        description="Extracts people, date, time and names from a booking message as JSON.",
        license="CC-BY-4.0",
        training_data="RESTAURANTS-8K (github.com/PolyAI-LDN/task-specific-datasets), training "
        "set, CC BY 4.0",
        instruction="Extract people, date, time, first_name and last_name from this message as "
        "one JSON object; leave out what isn't stated, {} if nothing is. Answer with the JSON "
        "only.",
        metric="slot_f1",
        max_new_tokens=64,
        load=loaders.load_booking,
        score=scores.score_json,
    ),
    "pirate": Task(
        description="Answers a question in the style of a pirate.",
        instruction="Answer like a pirate, briefly.",
        **_styled(PIRATE, "PIRATE"),
    ),
    "shakespeare": Task(
        description="Answers a question in the manner of Shakespeare's time.",
        instruction="Answer in the English of Shakespeare's time, briefly.",
        **_styled(BARD, "BARD"),
    ),
    "router": Task(
        description="Says which of ten domains a request belongs to, or that none fits.",
        license="CC-BY-3.0",
        training_data="CLINC150 (github.com/clinc/oos-eval), small training set, its 150 intents "
        "as their ten domains, CC BY 3.0",
        instruction="Name the domain of this request. Answer with exactly one of these labels: "
        + ", ".join(_DOMAINS),
        metric="accuracy",
        max_new_tokens=12,
        load=loaders.load_router,
        score=scores.score_router,
        labels=_DOMAINS,
    ),
    "entities": Task(
        description="Lists the names in a post as JSON, by kind.",
        license="CC-BY-4.0",
        training_data="WNUT 2017 emerging entities (github.com/leondz/emerging_entities_17), "
        "training set, CC BY 4.0",
        instruction="List the named entities of this post as one JSON object whose keys are among "
        "corporation, creative-work, group, location, person, product and whose values are lists; "
        "{} if there is none. Answer with the JSON only.",
        metric="slot_f1",
        max_new_tokens=64,
        load=loaders.load_entities,
        score=scores.score_json,
    ),
    "grammar": Task(
        description="Corrects the grammar and spelling of a sentence.",
        license="CC-BY-NC-SA-4.0",
        training_data="JFLEG (github.com/keisks/jfleg), development set, CC BY-NC-SA 4.0",
        instruction="Correct the grammar and spelling of this sentence. Answer with the corrected "
        "sentence only.",
        metric="gleu",
        max_new_tokens=64,
        load=loaders.load_grammar,
        score=scores.score_grammar,
        steps=0.6,
    ),
    "sentiment": Task(
        description="Says whether a sentence of a film review is positive or negative.",
        license="Apache-2.0",
        training_data="SST-2 (Socher et al. 2013), training sentences; for research, no licence "
        "stated",
        instruction="Is this sentence of a film review positive or negative? Answer with exactly "
        "one of these words: positive, negative",
        metric="accuracy",
        max_new_tokens=6,
        load=loaders.load_sentiment,
        score=scores.score_label,
        labels=("positive", "negative"),
    ),
}
