"""`redmux bench nlg`: scores of generated texts against references, as the E2E NLG challenge."""

import argparse
from dataclasses import asdict

from redmux_bench import report
from redmux_bench.machine import versions
from redmux_bench.nlg_files import read_hypotheses, read_references
from redmux_bench.nlg_scores import score
from redmux_bench.tables import print_table


def run(options: argparse.Namespace) -> int:
    """Scores --hypotheses against --references and prints one figure for each metric."""
    hypotheses = read_hypotheses(options.hypotheses)
    references = read_references(options.references, len(hypotheses))
    scores = score(hypotheses, references)
    num_references = sum(map(len, references))
    print(f"{len(hypotheses)} texts, {num_references} references")
    print_table(
        ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"),
        [[f"{value:.2f}" for value in (
            scores.bleu, scores.nist, scores.meteor, scores.rouge_l, scores.cider,
        )]],
    )  # fmt: skip
    results = {
        "num_texts": len(hypotheses),
        "num_references": num_references,
        "scores": asdict(scores),
        "scorers": versions("sacrebleu", "nltk"),
    }
    report.write_json(options, None, results)
    return 0
