import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from redmux_server.engine.detokenize import Detokenizer, StopMatcher
from redmux_server.engine.stop_pattern import MAX_MATCH, StopPattern

quick = settings(deadline=None, database=None, max_examples=200)


def byte_tokenizer():
    """Every byte is a token, and a few merges make tokens that end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = []
    for text in ("th", "the", "\u00e9", "\u20ac", "\U0001f600"):
        [(chars, _)] = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
        for end in range(2, len(chars) + 1):
            if chars[:end] not in vocab:
                vocab[chars[:end]] = len(vocab)
                merges.append((chars[: end - 1], chars[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()
token_ids = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30)
texts = st.text(st.sampled_from("ab the\u00e9\u20ac\U0001f600\u0301\ufffd\n"), max_size=15)


def decode(ids):
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def stream(ids, sizes=(1,), decode=decode):
    """What a detokenizer gives out, push by push, in chunks of these sizes in turn."""
    detokenizer, given, start, turn = Detokenizer(decode), [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        given.append(detokenizer.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*given, detokenizer.flush()]


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(token_ids, sizes)
@quick
def test_any_tokens_stream_to_what_they_decode_to_at_once(ids, sizes):
    assert "".join(stream(ids, sizes)) == decode(ids)


@given(texts, sizes)
@quick
def test_any_text_streams_to_itself(text, sizes):
    assert "".join(stream(TOKENIZER.encode(text).ids, sizes)) == text


@given(texts.filter(lambda t: "\ufffd" not in t))
@quick
def test_no_push_gives_out_half_a_character(text):
    assert not any("\ufffd" in part for part in stream(TOKENIZER.encode(text).ids))


def test_text_is_given_out_as_soon_as_it_is_complete():
    parts = stream(TOKENIZER.encode("ab").ids)
    assert parts == ["a", "b", ""]


def test_a_character_left_incomplete_is_flushed_as_a_replacement():
    ids = TOKENIZER.encode("a\u20ac").ids[:1] + TOKENIZER.encode("\u4e2d").ids[:2]
    assert stream(ids) == ["a", "", "", "\ufffd"]


def test_flushing_twice_gives_nothing_the_second_time():
    detokenizer = Detokenizer(decode)
    detokenizer.push(TOKENIZER.encode("\u4e2d").ids[:1])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@given(st.lists(st.integers(0, 3), max_size=8))
@quick
def test_a_space_that_decoding_drops_at_the_start_is_kept_in_the_middle(ids):
    """SentencePiece tokens carry the space before them, which only the first one loses."""
    vocab = {"\u2581a": 0, "\u2581b": 1, "c": 2, "\u2581": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    assert "".join(stream(ids, decode=tokenizer.decode)) == tokenizer.decode(ids)


def test_tokens_without_text_lose_nothing_around_them():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<mark>"])
    mark = tokenizer.token_to_id("<mark>")
    half, rest = tokenizer.encode("\u4e2d").ids[:1], tokenizer.encode("\u4e2d").ids[1:]
    parts = stream([mark, *half, *rest, mark, *tokenizer.encode("a").ids], decode=tokenizer.decode)
    assert "".join(parts) == "\u4e2da"


def fallback_tokenizer():
    """Characters that are no tokens are written as bytes, as in Llama 2's tokenizer."""
    vocab = {"<unk>": 0, "a": 1, "b": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


HALF = TOKENIZER.encode("\u4e2d").ids[:1]
# Tokens that each end one character and begin the next.
STRADDLING = Tokenizer(models.BPE(vocab={"\u00e4": 0, "\u00b8\u0143\u00e4": 1}, merges=[]))
STRADDLING.decoder = decoders.ByteLevel()
broken = st.lists(st.sampled_from(TOKENIZER.encode("\u4e2d\U0001f600a\u00e9").ids), max_size=90)


@given(broken, sizes)
@quick
def test_long_runs_of_broken_characters_stream_to_what_they_decode_to_at_once(ids, sizes):
    assert "".join(stream(ids, sizes)) == decode(ids)


@pytest.mark.parametrize("length", [1, 7, 60])
def test_characters_that_share_every_token_stream_to_what_they_decode_to_at_once(length):
    ids = [0] + [1] * length
    assert "".join(stream(ids, decode=STRADDLING.decode)) == STRADDLING.decode(ids)


@pytest.mark.parametrize("number", range(40))
def test_no_text_is_lost_behind_bytes_that_make_no_character(number):
    tokenizer = fallback_tokenizer()
    character = tokenizer.encode("\u4e2d").ids
    ids = character[:1] * number + tokenizer.encode("\u4e2dab\u4e2db").ids
    assert "".join(stream(ids, decode=tokenizer.decode)).endswith("ab\u4e2db")


def silent(ids):
    return decode([i for i in ids if i < 9999])


@pytest.mark.parametrize(
    ("decode", "ids"),
    [
        (decode, HALF),
        (decode, TOKENIZER.encode("\U0001f600").ids[:1]),
        (STRADDLING.decode, [1]),
        (fallback_tokenizer().decode, fallback_tokenizer().encode("\u4e2d").ids[:1]),
        (silent, [9999]),
        (silent, [*HALF, 9999, 9999, 9999, 9999, 9999, 9999, 9999]),
        (decode, TOKENIZER.encode("the \u4e2d").ids),
    ],
)
def test_what_is_decoded_grows_with_the_tokens_and_not_faster(decode, ids):
    decoded = 0

    def counting(window):
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    ids = ids * (2000 // len(ids))
    stream(ids, decode=counting)
    assert decoded <= 40 * len(ids)


@given(st.lists(st.sampled_from([1, 2, *range(195, 259)]), max_size=60))
@quick
def test_no_token_is_decoded_more_than_a_bounded_number_of_times(ids):
    longest, tokenizer = 0, fallback_tokenizer()

    def watching(window):
        nonlocal longest
        longest = max(longest, len(window))
        return tokenizer.decode(window)

    stream(ids, decode=watching)
    assert longest <= 2 * 16 + 2


# -- stop texts -------------------------------------------------------------------------------

letters = st.text(st.sampled_from("ab\u00e9"), max_size=12)
stop_lists = st.lists(st.text(st.sampled_from("ab\u00e9"), min_size=1, max_size=4), max_size=3)


def cut(text, stops):
    """The reference: grow the text letter by letter until it ends in a stop text."""
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            stop = max(endings, key=len)
            return text[: end - len(stop)], stop
    return text, None


@st.composite
def chunked(draw, letters=letters):
    text = draw(letters)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def match(chunks, stops):
    matcher = StopMatcher(stops)
    given = [matcher.push(chunk) for chunk in chunks]
    return [*given, matcher.flush()], matcher.matched


@given(chunked(), stop_lists)
@quick
def test_the_cut_is_that_of_the_reference_however_text_arrives(chunks, stops):
    parts, matched = match(chunks, stops)
    assert ("".join(parts), matched) == cut("".join(chunks), stops)


@given(chunked(), stop_lists)
@quick
def test_no_text_given_out_contains_a_stop_text(chunks, stops):
    parts, _ = match(chunks, stops)
    assert not any(stop in "".join(parts) for stop in stops)


@given(chunked(), stop_lists)
@quick
def test_only_what_may_begin_a_stop_text_is_held_back(chunks, stops):
    matcher = StopMatcher(stops)
    text, given_out = "", ""
    for chunk in chunks:
        text, given_out = text + chunk, given_out + matcher.push(chunk)
        if matcher.matched is None:
            held = text[len(given_out) :]
            assert not held or any(stop.startswith(held) for stop in stops)


def test_held_back_text_is_flushed():
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.flush() == "EN"


def test_nothing_is_given_out_after_a_match():
    matcher = StopMatcher(["|"])
    assert matcher.push("a|b") == "a"
    assert matcher.push("c") == ""
    assert matcher.flush() == ""
    assert matcher.matched == "|"


def test_of_two_stop_texts_that_end_together_the_longer_wins():
    assert match(["xab"], ["b", "ab"]) == (["x", ""], "ab")


@pytest.mark.parametrize("stops", [["abc", "b"], ["b", "abc"]])
def test_the_stop_text_that_is_complete_first_wins(stops):
    assert match(["abc"], stops) == (["a", ""], "b")


def test_without_stop_texts_everything_passes_at_once():
    assert StopMatcher([]).push("abc") == "abc"


@given(chunked(), stop_lists, st.integers(0, 12))
@quick
def test_a_stop_text_that_ends_too_early_ends_nothing(chunks, stops, number):
    """It may begin there, in text that nobody looks at for stop texts that end in it."""
    matcher = StopMatcher(stops)
    given = [matcher.push(c, may_stop=i >= number) for i, c in enumerate(chunks)]
    text, first = "".join(chunks), len("".join(chunks[:number]))
    found = [(end, -len(stop), stop) for stop in stops
             for end in range(first + 1, len(text) + 1) if text[:end].endswith(stop)]  # fmt: skip
    if found:
        end, _, stop = min(found)
        assert (matcher.matched, "".join(given)) == (stop, text[: end - len(stop)])
    else:
        assert (matcher.matched, "".join(given) + matcher.flush()) == (None, text)


@given(chunked(), stop_lists)
@quick
def test_an_included_stop_text_is_the_end_of_the_text(chunks, stops):
    matcher = StopMatcher(stops, included=True)
    given = "".join([matcher.push(chunk) for chunk in chunks] + [matcher.flush()])
    text, matched = cut("".join(chunks), stops)
    assert (given, matcher.matched) == (text + (matched or ""), matched)


lines = st.text(st.sampled_from("abcAB\u00e9\n"), max_size=14)
PATTERNS = ["a+b", "ab|ba", "[ab]c", "a{2,3}", "^b", "(?m)^a", "a.*b", "(?i)AB", "b[^a]+c"]


def cut_by_pattern(text, pattern):
    """The definition, by Python's own engine."""
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - MAX_MATCH), end):
            if re.compile(pattern).fullmatch(text, start, end):
                return text[:start], text[start:end]
    return text, None


@pytest.mark.parametrize("pattern", PATTERNS)
@given(chunked(lines))
@quick
def test_a_pattern_cuts_as_the_reference_does_however_text_arrives(pattern, chunks):
    matcher = StopMatcher([], StopPattern(pattern))
    given = "".join([matcher.push(chunk) for chunk in chunks] + [matcher.flush()])
    assert (given, matcher.matched) == cut_by_pattern("".join(chunks), pattern)


@given(chunked(lines), stop_lists)
@quick
def test_of_stop_texts_and_a_pattern_whichever_is_complete_first_ends_the_text(chunks, stops):
    matcher = StopMatcher(stops, StopPattern("[ab]c"))
    given = "".join([matcher.push(chunk) for chunk in chunks] + [matcher.flush()])
    assert (given, matcher.matched) == cut("".join(chunks), [*stops, "ac", "bc"])


def test_a_pattern_holds_back_no_more_than_its_longest_match():
    assert StopMatcher([], StopPattern("x{3}")).push("abcdef") == "abcd"
    assert StopMatcher([], StopPattern("x")).push("abcdef") == "abcdef"
    assert StopMatcher([], StopPattern("x.*y")).push("a" * 200) == "a" * (200 - MAX_MATCH + 1)


@pytest.mark.parametrize("size", [1, 7, 300])
def test_a_match_that_is_too_long_is_none_however_it_arrives(size):
    matcher = StopMatcher([], StopPattern("xa*y"))
    text = "x" + "a" * MAX_MATCH + "y" + "xaay" + "z"
    given = [matcher.push(text[i : i + size]) for i in range(0, len(text), size)]
    assert ("".join(given), matcher.matched) == (text[: MAX_MATCH + 2], "xaay")


def test_the_worst_of_patterns_costs_time_in_proportion_to_the_text():
    """Ten thousand characters, through which an engine that goes back would not come."""
    matcher = StopMatcher([], StopPattern("(a?){30}a{30}b"))
    for _ in range(10_000):
        matcher.push("a")
    assert matcher.matched is None
