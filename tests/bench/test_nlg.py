"""`redmux bench nlg`: every score against values worked out by hand, and on the authors' files."""

import json
import math

import pytest
from official import official

from redmux.cli import main
from redmux_bench.ngram_scores import cider, nist
from redmux_bench.nlg_scores import caption_words, meteor, mteval_tokens, score
from redmux_bench.rouge_l import rouge_l


def words(*texts):
    return [text.split() for text in texts]


def test_bleu_is_that_of_mteval_without_case():
    got = score(["A b C d e", "x"], [["a b c d F"], ["y", "z z"]]).bleu
    # The second text shares nothing: 4 of 6 tokens, then 3 of 4, 2 of 3 and 1 of 2 longer n-grams.
    assert got == pytest.approx(100 * (4 / 6 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_nist_weighs_ngrams_by_what_their_last_token_tells():
    # Of 4 reference tokens 2 are a and 1 is b: log2(4 / 2) and log2(4 / 1); log2(2 / 1) for a b.
    assert nist(words("a b"), [words("a b", "a c")]) == pytest.approx((1 + 2) / 2 + 1)


def test_nist_halves_a_text_of_two_thirds_of_the_mean_length_of_its_references():
    # a and b are 2 of 6 tokens each; b always follows a, which tells nothing.
    assert nist(words("a b"), [words("a b c d", "a b")]) == pytest.approx(math.log2(6 / 2) / 2)


def test_nist_counts_an_ngram_as_often_as_one_reference_has_it():
    once, twice = nist(words("a a"), [words("a b")]), nist(words("a a"), [words("a a", "a b")])
    assert once == pytest.approx(math.log2(2 / 1) / 2)
    assert twice == pytest.approx(math.log2(4 / 3) + math.log2(3 / 1))


def test_rouge_l_takes_the_best_precision_and_the_best_recall():
    # Common to "a x c": a c, a recall of 2/3; to the long one: a b c d, a precision of 1.
    got = rouge_l(words("a b c d"), [words("a x c", "a b c d e f g h")])
    assert got == pytest.approx((1 + 1.44) * (2 / 3) / (2 / 3 + 1.44))


def test_rouge_l_wants_the_words_in_order_but_not_side_by_side():
    assert rouge_l(words("a b c"), [words("c b a")]) == pytest.approx(1 / 3)
    assert rouge_l(words("a b c"), [words("a x b y c")]) == pytest.approx(2.44 * 0.6 / (0.6 + 1.44))


def test_cider_is_ten_times_the_mean_cosine_of_four_orders():
    # One word each, found in one of two texts: a cosine of 1 for single words, 0 for longer ones.
    assert cider(words("a", "b"), [words("a"), words("b")]) == pytest.approx(10 / 4)


def test_cider_clips_repetitions_and_damps_other_lengths():
    # Weights 2 w against w: w * w / (2 w * w), and one word too many.
    repeated = 10 / 4 * 1 / 2 * math.exp(-1 / 72)
    assert cider(words("a a", "b"), [words("a"), words("b")]) == pytest.approx((repeated + 2.5) / 2)


def test_cider_gives_nothing_for_what_the_references_of_every_text_say():
    assert cider(words("a", "a"), [words("a"), words("a", "b")]) == 0


def test_meteor_is_precision_and_recall_less_a_penalty_for_chunks(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])  # needs no data of NLTK
    one_chunk = 1 - 0.6 * (1 / 3) ** 0.2
    assert meteor(words("the cat sat"), [words("the cat sat")]) == pytest.approx(one_chunk)
    assert meteor(words("the cats sat"), [words("x", "the cat sat")]) == pytest.approx(one_chunk)
    # Precision 2/3, recall 1, in two chunks.
    f = (2 / 3) / (0.85 * 2 / 3 + 0.15)
    assert meteor(words("a x b"), [words("a b")]) == pytest.approx(f * (1 - 0.6 * (2 / 2) ** 0.2))


def test_a_text_of_no_words_scores_nothing_and_spoils_no_other():
    got = score(["", "a nice pub"], [["a pub"], ["a nice pub"]])
    alone = score(["a nice pub"], [["a nice pub"]])
    assert got.rouge_l == alone.rouge_l / 2
    assert got.meteor == pytest.approx(alone.meteor / 2)
    assert all(math.isfinite(value) for value in (got.bleu, got.nist, got.cider))


def test_texts_are_cut_into_the_tokens_of_the_challenge_s_tools():
    text = "It's near \"The Rice Boat\". Price: £20-25, non-family (don't go)!"
    assert " ".join(mteval_tokens(text)) == (
        "it's near \" the rice boat \" . price : £20 - 25 , non-family ( don't go ) !"
    )
    assert " ".join(caption_words(text)) == (
        "it 's near the rice boat price £ 20-25 non-family do n't go"
    )


@pytest.fixture
def nlg(tmp_path):
    """Runs the command on two texts; returns its exit code."""
    files = [tmp_path / "hypotheses.txt", tmp_path / "references.txt"]

    def run(hypotheses, references, *arguments):
        for file, text in zip(files, (hypotheses, references), strict=True):
            file.write_bytes(text)
        return main(
            ["bench", "nlg", "--hypotheses", str(files[0]), "--references", str(files[1]),
             *arguments]
        )  # fmt: skip

    return run


def test_the_command_prints_the_scores_and_writes_how_they_were_got(nlg, tmp_path, capsys):
    file = tmp_path / "scores.json"
    code = nlg(b"A b c d e\n\n", b"a b c d f\na b\n\nx\n", "--json", str(file))
    assert code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 texts, 3 references"
    assert out[1].split() == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    got = json.loads(file.read_text())
    expected = score(["A b c d e", ""], [["a b c d f", "a b"], ["x"]])
    assert got["scores"]["bleu"] == expected.bleu
    assert float(out[2].split()[1]) == pytest.approx(expected.nist, abs=0.005)
    assert (got["num_texts"], got["num_references"]) == (2, 3)
    assert "tok:13a" in got["scores"]["bleu_signature"]
    assert "model" not in got


def test_a_file_without_empty_lines_has_one_reference_a_text(nlg, capsys):
    assert nlg(b"a\nb\n", b"a\nb\n") == 0
    assert "2 texts, 2 references" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (b"a\nb\n", b"a\n\nb\n\nc\n", "references of 3 texts, but there are 2 texts"),
        (b"a\nb\n", b"a\n\n\nb\n", "line 3: no reference before this empty line"),
        (b"\n\n", b"a\nb\n", "holds no text"),
        (b"a\xff\n", b"a\n", "is not UTF-8: bad byte at 1"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    nlg, hypotheses, references, message, capsys
):
    assert nlg(hypotheses, references) == 5
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told(tmp_path, capsys):
    path = str(tmp_path / "none.txt")
    assert main(["bench", "nlg", "--hypotheses", path, "--references", path]) == 5
    assert f"cannot read {path}: No such file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_authors_texts_score_what_the_challenge_s_own_tool_gives_them(capsys):
    """BLEU and NIST of mteval-v13a-sig.pl, the rest of its COCO scripts with Stanford's tokenizer.

    The paper's table has 64.86, 8.36, 44.99, 67.62 and 2.28, over several training runs.
    """
    texts, references = (official("gpt2-medium-e2e", name) for name in ("pred.txt", "label.txt"))
    assert main(["bench", "nlg", "--hypotheses", str(texts), "--references", str(references)]) == 0
    bleu, nist, meteor, rouge_l, cider = map(float, capsys.readouterr().out.split()[-5:])
    assert (bleu, nist, rouge_l, cider) == (65.00, 8.39, 67.61, 2.23)
    assert meteor == pytest.approx(45.03, abs=3.5)  # without synonyms and paraphrases
