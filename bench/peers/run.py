"""Times redmux and its peers side by side: one engine under load at a time, in turns.

All engines are started and stay; between its turns an engine is stopped with SIGSTOP. In every
round each engine gets one wave per workload and concurrency: that many requests at once, random
prompts that no request shares, greedy, end-of-text ignored. In the workload "adapters" request i
uses adapter i. Medians over rounds; ratios are taken within a round, then their median.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from check import Answers, agreement, fixed_answers
from engines import KINDS, RedmuxPeer
from peer import Limits, Peer, PeerError, cpu_seconds
from table import summary

IDLE_S = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.json:
        args.json.touch()  # fails before anything is measured
    peers = make_peers(args)
    # An engine left behind would stay stopped, and hold its memory, for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "machine": machine(),
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "reference": next((p.name for p in peers if isinstance(p, RedmuxPeer)), peers[0].name),
        "peers": {},
        "waves": [],
    }
    try:
        answers = {}
        for peer in peers:
            report["peers"][peer.name], answers[peer.name] = start(peer, args)
        lora = [
            p.name for p in peers if "adapters" in answers[p.name] and not isinstance(p, RedmuxPeer)
        ]
        report["agreement"] = agreement(answers, report["reference"], lora)
        print(json.dumps(report["agreement"], indent=1))
        for number in range(args.rounds):
            for peer in peers:
                report["waves"] += turn(peer, number, args)
            save(report, args.json)
            say(f"round {number + 1} of {args.rounds} done")
    finally:
        for peer in peers:
            peer.stop()
    if report["waves"]:
        print(summary(report))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return sorted(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="TOML file, see peers.example.toml")
    parser.add_argument("--peers", default="", help="names from the file; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="0 only checks the answers")
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32])
    parser.add_argument(
        "--distinct", type=numbers, default=[],
        help="numbers of distinct adapters to try at the highest concurrency, beside all distinct",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="file for every number")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/redmux-peers"))
    return parser.parse_args(argv)


def make_peers(args: argparse.Namespace) -> list[Peer]:
    """Returns the chosen engines in the order of the file; raises SystemExit for a mistake."""
    config = tomllib.loads(args.config.read_text())
    models = Path(config.pop("models"))
    names = args.peers.split(",") if args.peers else list(config)
    if unknown := set(names) - set(config):
        raise SystemExit(f"no such peers: {sorted(unknown)}; {args.config} has {list(config)}")
    most = args.concurrency[-1]
    # The fixed prompt of the agreement check and its answer have to fit, too.
    limits = Limits(most, max(256, args.prompt_tokens + args.output_tokens), most)
    args.logs.mkdir(parents=True, exist_ok=True)
    return [
        KINDS[config[name]["kind"]](name, config[name], models, limits, args.logs)
        for name in config
        if name in names
    ]


def start(peer: Peer, args: argparse.Namespace) -> tuple[dict[str, Any], Answers]:
    """Starts and warms one engine, sees that it answers properly, and puts it to sleep."""
    say(f"starting {peer.name}")
    started = time.monotonic()
    peer.start()
    start_s = time.monotonic() - started
    answers = fixed_answers(peer)
    for workload in peer.workloads:
        for concurrency in args.concurrency:
            wave(peer, workload, concurrency, concurrency, args, args.output_tokens, label="warm")
    before = cpu_seconds(peer.processes(), with_ended_children=False)
    time.sleep(IDLE_S)
    idle_s = cpu_seconds(peer.processes(), with_ended_children=False) - before
    idle_cores = idle_s / IDLE_S
    facts = {
        "kind": peer.options["kind"],
        "workloads": peer.workloads,
        "options": dict(peer.options),
        "command": peer.command,
        "environment": peer.environment,
        "versions": peer.versions(),
        "start_s": round(start_s, 2),
        "idle_cores": round(idle_cores, 3),
        "memory_mb_after_start": peer.memory_mb(),
    }
    peer.pause()
    say(f"{peer.name}: ready after {start_s:.1f} s, {facts['memory_mb_after_start']} MB, "
        f"idle it takes {idle_cores:.2f} cores")  # fmt: skip
    return facts, answers


def turn(peer: Peer, number: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One engine's part of a round."""
    peer.resume()
    wave(peer, "base", 1, 0, args, output_tokens=4, label="wake")
    for workload, concurrency, distinct in plan(peer.workloads, args):
        record = wave(peer, workload, concurrency, distinct, args, args.output_tokens, number)
        yield record | {"round": number, "memory_mb": peer.memory_mb()}
    peer.pause()


def plan(workloads: Iterable[str], args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yields (workload, concurrency, distinct adapters) of one engine's turn."""
    for workload in workloads:
        for concurrency in args.concurrency:
            yield workload, concurrency, concurrency if workload == "adapters" else 0
        if workload == "adapters":
            most = args.concurrency[-1]
            for distinct in args.distinct:
                if 0 < distinct < most:
                    yield workload, most, distinct


def wave(
    peer: Peer,
    workload: str,
    concurrency: int,
    distinct: int,
    args: argparse.Namespace,
    output_tokens: int,
    label: object,
) -> dict[str, Any]:
    """Sends one wave and returns its record; raises PeerError for an answer of wrong length."""
    seed = f"{peer.name} {workload} {concurrency} {distinct} {label}"
    draw = random.Random(seed)
    prompts = [[draw.randrange(1000, 48000) for _ in range(args.prompt_tokens)]
               for _ in range(concurrency)]  # fmt: skip
    adapters = [i % distinct if workload == "adapters" else None for i in range(concurrency)]
    foreign_before = foreign_cpu_seconds(peer)
    answer = peer.wave(prompts, output_tokens, adapters)
    foreign_s = foreign_cpu_seconds(peer) - foreign_before
    lengths = [len(ids) for ids in answer.token_ids]
    if lengths != [output_tokens] * concurrency:
        raise PeerError(f"{peer.name} gave {lengths} tokens, {output_tokens} each were asked for")
    return {
        "peer": peer.name,
        "workload": workload,
        "concurrency": concurrency,
        "distinct": distinct,
        "seconds": round(answer.seconds, 4),
        "tokens_per_s": round(concurrency * output_tokens / answer.seconds, 2),
        # Taken by other processes meanwhile: near 0 where the figure can be trusted.
        "foreign_cores": round(foreign_s / answer.seconds, 3),
    }


def foreign_cpu_seconds(peer: Peer) -> float:
    """Returns what all processes but this one and the engine's have used."""
    own = [psutil.Process(), *peer.processes()]
    return cpu_seconds(psutil.process_iter(), with_ended_children=True) - cpu_seconds(
        own, with_ended_children=True
    )


def machine() -> dict[str, Any]:
    """Returns what the numbers were taken on."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    cpu = {name.strip(): value.strip() for name, value in
           (line.split(":", 1) for line in first.splitlines())}  # fmt: skip
    interesting = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    kilobytes = Path("/proc/meminfo").read_text().split("\n", 1)[0].split()[1]
    return {
        "cpu": f"{cpu['model name']} (family {cpu['cpu family']}, model {cpu['model']})",
        "cores": os.cpu_count(),
        "instruction_sets": [flag for flag in interesting if flag in cpu["flags"].split()],
        "memory_gib": round(int(kilobytes) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def save(report: Mapping[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
