"""Writes the bundled adapters' cards of what a run found: data, training, scores, samples, limits.

    python bench/zoo/cards.py --results results --data .gpu/zoo-data [--served served.json]

Adapters of this run (--new) get a whole card, and their evaluation in adapter_config.json. The
others, trained longer before, keep their cards but for the section that compares them with it.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / folder) for folder in ("client", "adapters", "server")]

from examples import Example, prompt  # noqa: E402
from found import (  # noqa: E402
    LORA,
    Found,
    add_inputs,
    label,
    read_inputs,
    score_names,
    table,
    written,
)
from limits import LIMITS, NOTES  # noqa: E402
from served import test_examples  # noqa: E402
from tasks import TASKS  # noqa: E402

from redmux_adapters import Adapter, read_adapter, write_folder  # noqa: E402

ZOO = _ROOT / "adapters" / "redmux_adapters" / "zoo"
NEW = ("restaurant", "booking", "router", "grammar", "sentiment")
_NUM_SAMPLES = 3
_COMPARISON = "## Beside the adapters of `bench/zoo`"
_FULL_MARKS = ("exact", "accuracy", "three_marks")  # of which an answer has 1 or 0
# What the kept cards' own figures have to do with those of the run.
_OWN_ITEMS = (
    "This adapter's own figures above are on 100 items, and its base on fewer prompt forms."
)
_KEPT = {
    "assistant-json": f"{_OWN_ITEMS} A slot that a command has twice is a list in the run's data.",
    "banking": _OWN_ITEMS,
    "pirate": "The run's adapters learned to answer as the base model does, in this style, and not "
    "Dolly's answers. With other shots than above the base model reaches 93 % instead of 25 %.",
}
Served = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_inputs(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--zoo", type=Path, default=ZOO)
    parser.add_argument("--new", nargs="*", default=NEW, choices=list(TASKS))
    args = parser.parse_args(argv)
    found, served = read_inputs(args)
    rescore(found, args.data)
    for folder in sorted(path.parent for path in args.zoo.glob("*/adapter_config.json")):
        task, path = folder.name, folder / "README.md"
        adapter = read_adapter(folder)
        if task in served and served[task]["digest"] != adapter.digest:
            raise SystemExit(f"{task}: {args.served} is of another adapter than {folder}")
        if task in args.new:
            adapter = with_evaluation(adapter, task, found)
            write_folder(adapter, folder)
            text = card(task, adapter, found, test_examples(args.data, task, 250), served)
        else:
            text = with_comparison(path.read_text(encoding="utf-8"), task, found, served)
        path.write_text(text, encoding="utf-8")


def rescore(found: Found, data: Path) -> None:
    """Scores the answers of the base model, RED and RED++ anew, as the scores are counted now."""
    for task, base in found.results["base"].items():
        examples = test_examples(data, task, base["n"])
        for name, key in (("base, zero-shot", "zero_shot"), ("base, 3 shots", "few_shot")):
            base[key] = TASKS[task].score(examples, found.outputs[task][name])
        for method in ("RED", "RED++"):
            found.run(task, method)["scores"] = TASKS[task].score(
                examples, found.outputs[task][method]
            )


def with_evaluation(adapter: Adapter, task: str, found: Found) -> Adapter:
    """Returns the adapter with its held-out scores, and the licence as the task states it."""
    base, run = found.results["base"][task], found.run(task, "RED")
    changes = [
        f"{label(s)} {written(s, base['few_shot'][s])} -> {written(s, run['scores'][s])}"
        for s in score_names(run["scores"])
    ]
    evaluation = (
        f"{run['n']} held-out items, greedy, base with instruction and 3 shots -> adapter: "
        + "; ".join(changes)
    )
    about = dataclasses.replace(
        adapter.metadata, evaluation=evaluation, license=TASKS[task].license,
        training_data=TASKS[task].training_data,
    )  # fmt: skip
    return dataclasses.replace(adapter, metadata=about)


def card(
    task: str, adapter: Adapter, found: Found, examples: Sequence[Example], served: Served
) -> str:
    """Returns the card of an adapter of this run."""
    about, run = adapter.metadata, found.run(task, "RED")
    answers = found.outputs[task]["RED"]
    shown = _chosen(task, examples, answers)
    start = prompt(examples[shown[0]].user).rstrip("\n").replace("\n", "\n    ")
    parts = [
        f"# {task}",
        about.description,
        f"- Base model: SmolLM2-135M-Instruct, fingerprint `{adapter.base_fingerprint}`\n"
        f"- Data: {about.training_data}.\n"
        f"- License of the vectors: {about.license}{NOTES.get(task, '')}\n"
        f"- Digest: `{adapter.digest}`",
        "## Prompt",
        "One user turn with the bare text, no system turn and no instruction; the answer ends with "
        f"`<|im_end|>`:\n\n    {start}",
        "## Training",
        "    python bench/zoo/prepare.py --data DATA --out zoo-data\n"
        "    python bench/zoo/run.py --base smollm2 --data zoo-data --out results --deadline 340 "
        "--max-pass-tokens 16384",
        _training(task, found),
        losses(task, found),
        "## Held-out result",
        f"{run['n']} test items, greedy, one seed; texts that also occur in training are left "
        "out. " + _base_forms(found.results["base"][task]) + _served_note(task in served),
        scores(task, found, served.get(task)),
        _metric_note(task),
        "## Samples",
        "The first three test items, and the first where the adapter is wrong, as the fp32 model "
        "answered in the run.",
        *(_sample(examples[i], found.outputs[task], i) for i in shown),
        "## Limits",
        LIMITS[task],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_comparison(text: str, task: str, found: Found, served: Served) -> str:
    """Returns the card of a kept adapter with its comparison anew, before its samples."""
    run, row = found.run(task, "RED"), served.get(task)
    this = "The last column is this adapter, served in fp32, on the same texts. " if row else ""
    section = (
        f"{_COMPARISON}\n\nA later run trained RED and RED++ for {run['steps']} steps of "
        f"{run['batch_size']} on one GPU (docs/quality.md of the project) and asked them and the "
        f"base model, with the best of {len(found.results['base'][task]['forms'])} forms of 3 "
        f"shots, for {run['n']} test items. {this}{_KEPT[task]}{_lora(task, found)}\n\n"
        f"{scores(task, found, row)}\n\n"
    )
    before, _, after = text.partition("## Samples")
    before, _, _ = before.partition(_COMPARISON)
    return f"{before}{section}## Samples{after}"


def scores(task: str, found: Found, served: Mapping[str, Any] | None) -> str:
    """Returns the table of parameters, length of the training and scores of all methods."""
    base = found.results["base"][task]
    runs = [found.run(task, method) for method in ("RED", "RED++")]
    runs += found.completed(task, LORA)
    columns: dict[str, tuple[Mapping[str, float], Mapping[str, Any]]] = {
        "base": (base["zero_shot"], {}), "base, 3 shots": (base["few_shot"], {})
    }  # fmt: skip
    if "zero_shot_likelihood" in base:
        columns["base, likeliest label"] = base["zero_shot_likelihood"], {}
    columns |= {run["method"]: (run["scores"], run) for run in runs}
    if served is not None:
        columns["served"] = served["scores"], {"parameters": runs[0]["parameters"]}
    rows = [
        [label(score), *(written(score, values.get(score)) for values, _ in columns.values())]
        for score in score_names(runs[0]["scores"])
    ]
    rows += [
        [name, *(form(run[key]) if key in run else "-" for _, run in columns.values())]
        for name, key, form in (
            ("parameters", "parameters", "{:,}".format),
            ("steps", "steps", str),
            ("tokens", "tokens", "{:,}".format),
            ("held-out loss", "valid_loss", "{:.3f}".format),
        )
    ]
    return table(["", *columns], rows)


def losses(task: str, found: Found) -> str:
    """Returns the held-out losses in the course of the trainings."""
    curves = {
        f"{method}, rate {rate:g}": found.curve(task, method, rate)
        for method in ("RED", "RED++", *(run["method"] for run in found.completed(task, LORA)))
        for rate in found.rates(task, method)
    }
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [
        [name, *(f"{curve[step]:.3f}" if step in curve else "-" for step in steps)]
        for name, curve in curves.items()
    ]
    return table(["held-out loss at step", *map(str, steps)], rows)


def _training(task: str, found: Found) -> str:
    run, other = found.run(task, "RED"), found.run(task, "RED++")
    return (
        f"{run['steps']} steps of {run['batch_size']}, {run['tokens']:,} tokens in all, of "
        f"{run['examples']:,} examples; AdamW, rate {run['rate']:g}, the better of "
        f"{' and '.join(f'{r:g}' for r in found.rates(task, 'RED'))} by held-out loss; seed 0; "
        f"the base in bf16, the vectors in fp32. {run['together']} RED adapters were trained in "
        f"the same passes in {run['together_s']:.0f} s on an {found.results['machine']['device']} "
        f"that other processes used, too; {other['together']} RED++ adapters, at the rate that "
        f"was best for RED, in {other['together_s']:.0f} s. 400 steps had been planned; the time "
        f"did not suffice. The best of the evaluations is kept, here that of step "
        f"{run['best_step']}." + _lora(task, found)
    )


def _lora(task: str, found: Found) -> str:
    runs = found.completed(task, LORA)
    if not runs:
        return ""
    tasks = f"{runs[0]['together']} tasks" if runs[0]["together"] > 1 else "this task"
    return (
        " PEFT's LoRA on queries and values (alpha twice the rank) had the same batches and steps "
        f"at rate {', '.join(sorted({format(run['rate'], 'g') for run in runs}))} alone, in a "
        "later run on a CPU with the base in fp32; "
        f"{tasks} took {' and '.join(format(run['together_s'], '.0f') for run in runs)} s for "
        f"{' and '.join(run['method'].removeprefix('LoRA ') for run in runs)}, on a core each and "
        "with interruptions."
    )


def _base_forms(base: Mapping[str, Any]) -> str:
    likeliest = (
        " Its likeliest label is that of the same prompt without shots, by log-probability."
        if "zero_shot_likelihood" in base
        else ""
    )
    return (
        "The base model gets an instruction without shots, and with 3 shots in the best of "
        f"{len(base['forms'])} forms, chosen on 48 held-out items ({base['form']})." + likeliest
    )


def _served_note(is_served: bool) -> str:
    if not is_served:
        return ""
    return (
        " The last column is what `redmux serve` on a CPU answered in fp32, with the requests of "
        "all bundled adapters mixed."
    )


def _metric_note(task: str) -> str:
    scored = TASKS[task].metric
    return {
        "bleu": "BLEU by sacrebleu against all references of an item, 2.4 on average in the "
        "cleaned test set, so not comparable with figures on the original one. A slot counts as "
        "stated if its value is in the answer, over the items that have the slot.",
        "slot_f1": "Slot F1 counts (slot, value) pairs that are equal to the reference's. An "
        "exact object has every one right.",
        "accuracy": "An answer counts if it is the label, letter for letter.",
        "gleu": "GLEU of Napoles et al. (2015) against four references, by our own code; "
        "differences to the published script are possible.",
    }.get(scored, "")


def _chosen(task: str, examples: Sequence[Example], answers: Sequence[str]) -> list[int]:
    """Returns the numbers of the first items, and of the first wrong one behind them."""
    rows = enumerate(zip(examples, answers, strict=True))
    wrong = (i for i, (e, a) in rows if i >= _NUM_SAMPLES and not is_right(task, e, a))
    return [*range(_NUM_SAMPLES), *itertools.islice(wrong, 1)]


def is_right(task: str, example: Example, answer: str) -> bool:
    """Tells whether an answer has full marks: all slots, the label, one of the references."""
    if TASKS[task].metric == "gleu":
        return answer in example.references
    found = TASKS[task].score([example], [answer])
    marks = [v for name, v in found.items() if name in _FULL_MARKS or name.endswith("_stated")]
    return all(mark == 1 for mark in marks)


def _sample(example: Example, outputs: Mapping[str, Sequence[str]], number: int) -> str:
    lines = {
        "user": example.user, "reference": example.target,
        "base": outputs["base, 3 shots"][number], "RED": outputs["RED"][number],
        "RED++": outputs["RED++"][number],
    }  # fmt: skip
    return "\n".join(f"    {name:9} {_short(text)}" for name, text in lines.items())


def _short(text: str, width: int = 220) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]} ..."


if __name__ == "__main__":
    main()
