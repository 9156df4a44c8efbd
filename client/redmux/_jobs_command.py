"""`redmux jobs`: trains adapters on a server and tells how it goes."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from redmux._connecting import connect
from redmux._exit_codes import FAILED, exit_code
from redmux._job_calls import OPTION_FIELDS
from redmux._job_files import JobFiles, read_tasks
from redmux._printing import print_table
from redmux.errors import InvalidArgumentError
from redmux.job_types import Job, JobEvent, JobTask, TrainingStep

_STEP_EVERY_S = 2.0  # least time between two lines that tell a step


def add_jobs(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    server: argparse.ArgumentParser,
) -> None:
    """Adds the command; `server` has the options of the connection."""
    parser = commands.add_parser("jobs", help="train adapters on the server, beside serving")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verb = verbs.add_parser(
        "create", parents=[server], help="train one adapter, or several by --job, and publish them"
    )
    verb.set_defaults(run=_create)
    _add_create(verb)
    verb = verbs.add_parser("watch", parents=[server], help="tell how a job goes, to its end")
    verb.set_defaults(run=_watch)
    verb.add_argument("id", metavar="ID")
    verb = verbs.add_parser("list", parents=[server], help="list your jobs, the newest first")
    verb.set_defaults(run=_list)
    verb = verbs.add_parser("get", parents=[server], help="tell about one job")
    verb.set_defaults(run=_get)
    verb.add_argument("id", metavar="ID")
    verb = verbs.add_parser("cancel", parents=[server], help="end a job, or some of its adapters")
    verb.set_defaults(run=_cancel)
    verb.add_argument("id", metavar="ID")
    verb.add_argument("adapters", metavar="NAME", nargs="*", help="default: all")


def _add_create(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("name", metavar="NAME", nargs="?", help="of the adapter")
    verb.add_argument("data", metavar="DATA", nargs="?", help="a .jsonl or .csv file")
    verb.add_argument("--valid", metavar="FILE", help="held-out data; default: a share of DATA")
    verb.add_argument("--job", metavar="FILE", help="a .toml or .json file with several tasks")
    verb.add_argument("--replace", action="store_true", help="replace adapters of these names")
    verb.add_argument("--watch", action="store_true", help="tell how it goes, to its end")
    group = verb.add_argument_group("training", "as for `redmux train`, which explains each")
    for name, field in OPTION_FIELDS.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "labels":
            group.add_argument(flag, type=lambda text: text.split(","), metavar="NAME,...")
        elif field.cpp_type == field.CPPTYPE_DOUBLE:
            group.add_argument(flag, type=float, metavar="X")
        elif field.cpp_type == field.CPPTYPE_STRING:
            group.add_argument(flag, metavar="TEXT")
        else:
            group.add_argument(flag, type=int, metavar="N")


def _create(options: argparse.Namespace) -> int:
    with connect(options) as client:
        files = _files(options)
        try:
            files.check()
            job = client.jobs.create(files.tasks, replace=options.replace)
        except InvalidArgumentError as error:  # a line for each unusable record
            print(f"redmux: {files.with_lines(error.message)}", file=sys.stderr)
            return exit_code(error)
        if not options.watch:
            return _print_job(job, options.json)
        print(job.id, file=sys.stderr)
        return _follow(client.jobs.watch(job.id), options.json)


def _files(options: argparse.Namespace) -> JobFiles:
    given = {name: getattr(options, name) for name in OPTION_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.job is not None:
        if options.name is not None or options.valid is not None:
            raise InvalidArgumentError("give NAME and DATA, or --job, which names them for each")
        return read_tasks(Path(options.job), given)
    if options.data is None:
        raise InvalidArgumentError("give NAME and DATA, or --job")
    files = JobFiles()
    valid = None if options.valid is None else Path(options.valid)
    files.add(options.name, Path(options.data), valid, given)
    return files


def _watch(options: argparse.Namespace) -> int:
    with connect(options) as client:
        return _follow(client.jobs.watch(options.id, timeout_s=options.timeout), options.json)


def _follow(events: Iterator[JobEvent], as_json: bool) -> int:
    """Prints what happens; returns 0 if every adapter of the job is published in the end."""
    job: Job | None = None
    teller = _Teller()
    for event in events:
        if isinstance(event, Job):
            job = event
        if as_json:
            print(_json(event), flush=True)
        else:
            teller.tell(event)
    if job is None or not job.has_ended:
        return FAILED
    if not as_json:
        print(f"job {job.state}{_because(job.detail)}")
    return 0 if job.state == "finished" and job.is_success else FAILED


class _Teller:
    """Tells events in lines: all evaluations and changes, and a step now and then."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}  # adapter -> what was told last
        self._step_told_s = 0.0

    def tell(self, event: JobEvent) -> None:
        if isinstance(event, Job):
            self._tell_changes(event)
        elif isinstance(event, TrainingStep):
            now_s = time.monotonic()
            if now_s - self._step_told_s >= _STEP_EVERY_S or event.step == event.num_steps:
                self._step_told_s = now_s
                print(
                    f"{event.adapter} step {event.step} of {event.num_steps}: "
                    f"loss {event.loss:.4f}",
                    flush=True,
                )
        else:
            accuracy = "" if event.accuracy is None else f", accuracy {100 * event.accuracy:.1f} %"
            if event.correlation is not None:
                accuracy += f", correlation {event.correlation:.3f}"
            best = ", best so far" if event.is_best else ""
            print(
                f"{event.adapter} step {event.step}: held out {event.loss:.4f}{accuracy}{best}",
                flush=True,
            )

    def _tell_changes(self, job: Job) -> None:
        if job.state == "queued":
            print(f"queued, {job.num_ahead} ahead", flush=True)
        for task in job.tasks:
            if task.state not in ("queued", self._states.get(task.adapter)):
                digest = "" if task.digest is None else f", {task.digest}"
                print(
                    f"{task.adapter} {_words(task.state)} at step {task.step} of {task.num_steps}"
                    f"{digest}{_because(task.detail)}",
                    flush=True,
                )
            self._states[task.adapter] = task.state


def _list(options: argparse.Namespace) -> int:
    with connect(options) as client:
        if options.json:
            for job in client.jobs:
                print(_json(job))
            return 0
        jobs = list(client.jobs)
    rows = [("ID", "STATE", "CREATED", "ADAPTERS")]
    for job in jobs:
        adapters = ", ".join(_progress(task) for task in job.tasks)
        rows.append((job.id, job.state, f"{job.created_at:%Y-%m-%d %H:%M}", adapters))
    print_table(rows)
    return 0


def _get(options: argparse.Namespace) -> int:
    with connect(options) as client:
        return _print_job(client.jobs.get(options.id), options.json)


def _cancel(options: argparse.Namespace) -> int:
    with connect(options) as client:
        return _print_job(client.jobs.cancel(options.id, options.adapters), options.json)


def _print_job(job: Job, as_json: bool) -> int:
    if as_json:
        print(_json(job))
        return 0
    print(f"id: {job.id}\nstate: {job.state}{_because(job.detail)}")
    for task in job.tasks:
        loss = "" if task.loss is None else f", loss {task.loss:.4f}"
        best = "" if task.best is None else f", held out {task.best.loss:.4f}"
        digest = "" if task.digest is None else f", {task.digest}"
        print(f"{_progress(task)}{loss}{best}{digest}{_because(task.detail)}")
    return 0


def _progress(task: JobTask) -> str:
    return f"{task.adapter} {_words(task.state)} {task.step}/{task.num_steps}"


def _words(state: str) -> str:
    return state.replace("_", " ")


def _because(detail: str) -> str:
    return f": {detail}" if detail else ""


def _json(value: JobEvent) -> str:
    fields = asdict(value)
    return json.dumps({"event": type(value).__name__, **fields}, default=datetime.isoformat)
