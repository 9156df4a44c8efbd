"""What `redmux train` takes, and the job that it stands for."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from redmux.errors import InvalidArgumentError

from .job import DATA_KEYS, RUN_KEYS, Job, make_task, read_job
from .options import HEADS, METRICS, OPTION_NAMES, PARTS, SCHEDULES, TrainingOptions

_Group = argparse._ArgumentGroup


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed arguments; wrong usage ends in SystemExit, as argparse has it."""
    return option_parser().parse_args(argv)


def option_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="redmux train",
        description="Train RED adapters on a frozen base model, one or many in the same passes. "
        "Formats, job files and a complete example: docs/training.md.",
        argument_default=argparse.SUPPRESS,  # what is not given leaves the option's own default
    )
    parser.add_argument("data", nargs="?", help=".jsonl or .csv file, or datasets:NAME[:SPLIT]")
    parser.add_argument("--job", metavar="FILE", help="a .toml or .json file of many tasks instead")
    _add_run(parser.add_argument_group("run"))
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))
    return parser


def job_of(arguments: argparse.Namespace) -> Job:
    """Returns the job that parsed arguments describe; raises InvalidArgumentError."""
    values = vars(arguments)
    run = {key: values[key] for key in RUN_KEYS if key in values}
    if "job" in values:
        given = [key for key in ("data", *DATA_KEYS, *OPTION_NAMES) if key in values]
        if given:
            raise InvalidArgumentError(
                f"{', '.join(given)}: with --job, options of tasks are set in the job file"
            )
        job = read_job(values["job"], run)
    else:
        if "data" not in values or "output" not in values:
            raise InvalidArgumentError("give DATA and --output, or --job FILE")
        task = {key: values[key] for key in (*DATA_KEYS, *OPTION_NAMES) if key in values}
        job = Job((make_task(values.get("name", "adapter"), task),), **run)
    return job.sweep(values["sweep"]) if "sweep" in values else job


def _add_run(group: _Group) -> None:
    group.add_argument("--output", metavar="FOLDER", help="where adapters and metrics go")
    group.add_argument("--base", metavar="MODEL", help="the base model; default: smollm2")
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or hub id; default: the base's own"
    )
    group.add_argument(
        "--sweep", type=_rates, metavar="RATE,...",
        help="train every task once for each learning rate, all in the same passes",
    )  # fmt: skip
    group.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --output, if any"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="check the data and print the estimate only"
    )
    group.add_argument(
        "--check-data", action="store_true",
        help="check data and options only, without loading the base's weights",
    )  # fmt: skip
    group.add_argument("--checkpoint-every", type=int, metavar="N", help="steps; default: 50")
    group.add_argument(
        "--max-pass-tokens", type=int, metavar="N",
        help="positions in memory at a time, larger batches are accumulated; default: 2048",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="of the base's weights, the vectors are fp32 always; default: float32",
    )  # fmt: skip
    group.add_argument(
        "--autocast", action="store_true", help="compute the base's products in bf16"
    )
    group.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cpu")
    group.add_argument("--threads", type=int, metavar="N", help="of torch; default: its own")
    group.add_argument(
        "--tensorboard", action="store_true", help="write events for TensorBoard, too"
    )


def _add_data(group: _Group) -> None:
    group.add_argument("--name", help="of the task in metrics; default: adapter")
    group.add_argument("--valid", metavar="FILE", help="held-out data; default: a share of DATA")
    group.add_argument(
        "--valid-share", type=float, metavar="X",
        help="share of DATA that is held out, at most 200 examples; default: 0.1",
    )  # fmt: skip
    group.add_argument(
        "--columns", type=_pairs, metavar="NAME=COLUMN,...",
        help="the data's own names for prompt, prompt_pair, completion, messages, text, text_pair, "
        "label or score",
    )  # fmt: skip
    group.add_argument(
        "--prompt-format", choices=("auto", "template", "chatml", "raw"),
        help="how prompts are written: the base's chat template, ChatML turns, the bare text; "
        "default: auto, the template if there is one",
    )  # fmt: skip
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of an example; default: 512"
    )
    group.add_argument(
        "--labels", type=lambda text: tuple(text.split(",")), metavar="NAME,...",
        help="of a classifier; default: those that occur",
    )  # fmt: skip
    group.add_argument(
        "--start", metavar="PATH", help="an adapter whose vectors and head the training starts from"
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="leave unusable records out instead of refusing"
    )
    for name in ("description", "license", "training-data"):
        group.add_argument(f"--{name}", metavar="TEXT", help="for the adapter's metadata")


def _add_training(group: _Group) -> None:
    numbers: list[tuple[str, type, str]] = [
        (
            "learning-rate",
            float,
            "default: 0.02, less for encoders and from a billion parameters on",
        ),
        ("head-learning-rate", float, "of a classification head"),
        ("steps", int, "optimizer steps; default: what --epochs takes"),
        ("epochs", float, "times through the data"),
        ("batch-size", int, "examples per optimizer step"),
        ("warmup", float, "share of the steps in which the rate rises"),
        ("warmup-steps", int, "number of these steps, instead of --warmup"),
        ("weight-decay", float, "pull of scales to 1 and biases to 0"),
        ("clip-norm", float, "largest norm of a step's gradient, 0: any"),
        ("label-smoothing", float, "share of the loss that goes to all tokens or labels alike"),
        ("eval-every", int, "steps between evaluations on held-out data"),
        ("patience", int, "evaluations without gain that end the training, 0: any"),
        ("seed", int, "of the order of the data and the held-out share"),
    ]
    for name, kind, text in numbers:
        _add(group, name, text, type=kind, metavar="N" if kind is int else "X")
    _add(group, "schedule", "of the rate behind the warm-up", choices=SCHEDULES)
    _add(
        group,
        "metric",
        "by which the best vectors are kept; matthews is for labels, pearson for scores",
        choices=METRICS,
    )
    _add(
        group,
        "train",
        "the vectors that are trained; ln: both, and a LayerNorm behind them",
        choices=PARTS,
    )
    _add(group, "head", "kind of a classification head", choices=HEADS)
    _add(
        group,
        "sites",
        "ffn, attn, ffn_attn, more (RED++), res, res_with_attn, all, or patterns of module paths, "
        "comma-separated",
        metavar="NAMES",
    )
    _add(group, "layers", 'all, or numbers and ranges such as "0-5,11"', metavar="RANGES")
    _add(
        group,
        "apply",
        "which tokens are edited: all, prompt, generation (from the prompt's last one on) or "
        "after:TEXT; default: as the adapter that it starts from, else all",
        metavar="WHERE",
    )


def _add(group: _Group, name: str, text: str, **options: Any) -> None:
    default = getattr(TrainingOptions(), name.replace("-", "_"))
    shown = "" if default is None else f"; default: {default}"
    group.add_argument(f"--{name}", help=text + shown, **options)


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(math.isfinite(rate) and rate > 0 for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(text)
    return rates


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(","))
