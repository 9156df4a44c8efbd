"""A scriptable redmux server without an engine, and both clients behind one blocking interface."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import trustme
from client.terminal import Terminal
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

import redmux
from redmux.cli import main
from redmux.v1 import adapter_service_pb2 as adapters_pb
from redmux.v1 import adapter_service_pb2_grpc as adapters_grpc
from redmux.v1 import admin_service_pb2 as admin_pb
from redmux.v1 import admin_service_pb2_grpc as admin_grpc
from redmux.v1 import inference_service_pb2 as inference_pb
from redmux.v1 import inference_service_pb2_grpc as inference_grpc
from redmux.v1 import training_service_pb2 as training_pb
from redmux.v1 import training_service_pb2_grpc as training_grpc

DIGEST = "sha256:" + "ab" * 32


@dataclass
class Call:
    """What the server saw of one attempt, and when it ended for the server."""

    method: str
    request: Any
    metadata: dict[str, str]
    time_remaining_s: float
    has_ended: threading.Event


Messages = Iterator[inference_pb.GenerateResponse]
Script = Callable[[inference_pb.Generation, Call], Messages]


@dataclass
class FakeServer(
    inference_grpc.InferenceServiceServicer,
    adapters_grpc.AdapterServiceServicer,
    admin_grpc.AdminServiceServicer,
    training_grpc.TrainingServiceServicer,
):
    """Answers every method; `script` and `fail` are set by tests."""

    calls: list[Call] = field(default_factory=list)
    adapters: dict[str, adapters_pb.Adapter] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    jobs: dict[str, training_pb.Job] = field(default_factory=dict)
    job_events: list[training_pb.WatchJobResponse] = field(default_factory=list)
    info: admin_pb.ServerInfo = field(default_factory=admin_pb.ServerInfo)
    health: HealthServicer = field(default_factory=HealthServicer)
    page_size: int = 100
    problem_type: int = inference_pb.PROBLEM_TYPE_SINGLE_LABEL

    def __post_init__(self) -> None:
        # What Generate yields and Complete joins.
        self.script: Script = self.two_messages
        # Runs before every answer and may abort the call.
        self.fail: Callable[[Call, grpc.ServicerContext], None] = lambda call, context: None
        # Frees the port; set where the server is started.
        self.stop: Callable[[], object] = lambda: None

    @staticmethod
    def two_messages(generation: inference_pb.Generation, call: Call) -> Messages:
        """ "Hello" and " world"."""
        applied = inference_pb.AppliedAdapter(
            name=generation.adapter, digest=DIGEST if generation.adapter else ""
        )
        yield inference_pb.GenerateResponse(
            text="Hello",
            token_ids=[7],
            logprobs=[-0.5] if generation.logprobs else [],
            adapter=applied,
        )
        yield inference_pb.GenerateResponse(
            text=" world",
            token_ids=[8, 9],
            logprobs=[-0.25, -2.0] if generation.logprobs else [],
            adapter=applied,
            finish=inference_pb.Finish(
                reason=inference_pb.FINISH_REASON_STOP,
                stop="\n",
                usage=inference_pb.Usage(
                    prompt_tokens=4,
                    completion_tokens=3,
                    cached_prompt_tokens=2,
                    added_special_tokens=1,
                ),
            ),
        )

    @classmethod
    def first_message(cls, generation: inference_pb.Generation, call: Call) -> Messages:
        """One message; the stream ends well, but without a finish."""
        yield next(cls.two_messages(generation, call))

    @classmethod
    def first_then_silence(cls, generation: inference_pb.Generation, call: Call) -> Messages:
        """One message, then nothing until the client ends the call."""
        yield next(cls.two_messages(generation, call))
        assert call.has_ended.wait(30)

    @staticmethod
    def adapter(name: str) -> adapters_pb.Adapter:
        message = adapters_pb.Adapter(
            name=name,
            digest=DIGEST,
            base_fingerprint="base-1",
            num_sites=30,
            num_parameters=34_560,
            size_bytes=138_240,
            description="in rhyme",
            base_match="same",
            apply="all",
            version=3,
            aliases=[
                adapters_pb.AdapterAlias(name="next", version=3),
                adapters_pb.AdapterAlias(name="prod", version=2),
            ],
        )
        message.created_at.FromJsonString("2026-01-02T03:04:05Z")
        return message

    def seen(self, method: str) -> list[Call]:
        """All attempts at a method."""
        return [call for call in self.calls if call.method == method]

    def _enter(self, method: str, request: Any, context: grpc.ServicerContext) -> Call:
        call = Call(
            method,
            request,
            {datum.key: datum.value for datum in context.invocation_metadata()},
            context.time_remaining(),
            threading.Event(),
        )
        if not context.add_callback(call.has_ended.set):
            call.has_ended.set()
        self.calls.append(call)
        self.fail(call, context)
        return call

    def Generate(self, request, context):
        call = self._enter("Generate", request, context)
        yield from self.script(request.generation, call)

    def Complete(self, request, context):
        call = self._enter("Complete", request, context)
        parts = list(self.script(request.generation, call))
        return inference_pb.CompleteResponse(
            text="".join(part.text for part in parts),
            token_ids=[token_id for part in parts for token_id in part.token_ids],
            logprobs=[logprob for part in parts for logprob in part.logprobs],
            adapter=parts[-1].adapter,
            finish=parts[-1].finish,
        )

    def Classify(self, request, context):
        self._enter("Classify", request, context)
        rows = [([0.25, 0.75], [-1.0, 0.5]) for _ in request.inputs]
        return inference_pb.ClassifyResponse(
            classifications=[
                inference_pb.Classification(scores=scores, logits=logits) for scores, logits in rows
            ],
            labels=["no", "yes"],
            problem_type=self.problem_type,
            adapter=inference_pb.AppliedAdapter(name=request.adapter, digest=DIGEST),
            usage=inference_pb.Usage(prompt_tokens=7),
        )

    def Embed(self, request, context):
        self._enter("Embed", request, context)
        return inference_pb.EmbedResponse(
            embeddings=[inference_pb.Embedding(values=[0.5, -1.5]) for _ in request.inputs],
            adapter=inference_pb.AppliedAdapter(
                name=request.adapter, digest=DIGEST if request.adapter else ""
            ),
            usage=inference_pb.Usage(prompt_tokens=7),
        )

    def Score(self, request, context):
        self._enter("Score", request, context)
        scores = inference_pb.TokenScores(
            token_ids=[7, 8], logprobs=[-0.5, -0.25], is_greedy=[True, False]
        )
        return inference_pb.ScoreResponse(
            continuations=[scores for _ in request.continuations],
            prompt=scores if request.prompt_logprobs else None,
            adapter=inference_pb.AppliedAdapter(name=request.adapter),
            usage=inference_pb.Usage(prompt_tokens=4, completion_tokens=2),
        )

    def Tokenize(self, request, context):
        self._enter("Tokenize", request, context)
        return inference_pb.TokenizeResponse(
            token_ids=[1, 7], token_texts=["<s>", '"a'] if request.token_texts else [],
            added_special_tokens=1, max_context=256,
            adapter=inference_pb.AppliedAdapter(name=request.adapter),
        )  # fmt: skip

    def Detokenize(self, request, context):
        self._enter("Detokenize", request, context)
        return inference_pb.DetokenizeResponse(text="héllo")

    def PutAdapter(self, request, context):
        self._enter("PutAdapter", request, context)
        created = request.name not in self.adapters
        self.adapters[request.name] = self.adapter(request.name)
        return adapters_pb.PutAdapterResponse(adapter=self.adapters[request.name], created=created)

    def GetAdapter(self, request, context):
        self._enter("GetAdapter", request, context)
        if request.name not in self.adapters:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no adapter '{request.name}'")
        return adapters_pb.GetAdapterResponse(adapter=self.adapters[request.name])

    def ListAdapters(self, request, context):
        self._enter("ListAdapters", request, context)
        start = int(request.page_token or 0)
        end = start + self.page_size
        return adapters_pb.ListAdaptersResponse(
            adapters=list(self.adapters.values())[start:end],
            next_page_token=str(end) if end < len(self.adapters) else "",
        )

    def DownloadAdapter(self, request, context):
        self._enter("DownloadAdapter", request, context)
        return adapters_pb.DownloadAdapterResponse(safetensors=b"vectors")

    def SetAlias(self, request, context):
        self._enter("SetAlias", request, context)
        self.aliases[request.name, request.alias] = request.version
        return adapters_pb.SetAliasResponse(adapter=self.adapters[request.name])

    def DeleteAlias(self, request, context):
        self._enter("DeleteAlias", request, context)
        del self.aliases[request.name, request.alias]
        return adapters_pb.DeleteAliasResponse()

    def DeleteAdapter(self, request, context):
        self._enter("DeleteAdapter", request, context)
        if request.name not in self.adapters:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no adapter '{request.name}'")
        return adapters_pb.DeleteAdapterResponse(adapter=self.adapters.pop(request.name))

    @staticmethod
    def job(job_id: str, *names: str, **fields: Any) -> training_pb.Job:
        """A job that waits, unless `fields` say otherwise."""
        tasks = [
            training_pb.JobTask(
                adapter=name, state=training_pb.TASK_STATE_QUEUED, num_steps=8, num_examples=9
            )
            for name in names
        ]
        values = {"state": training_pb.JOB_STATE_QUEUED, "num_ahead": 1, "tasks": tasks} | fields
        message = training_pb.Job(id=job_id, **values)
        message.created_at.FromJsonString("2026-01-02T03:04:05Z")
        return message

    def CreateJob(self, request, context):
        self._enter("CreateJob", request, context)
        job = self.job(f"job-{len(self.jobs)}", *(task.adapter for task in request.tasks))
        self.jobs[job.id] = job
        return training_pb.CreateJobResponse(job=job)

    def GetJob(self, request, context):
        self._enter("GetJob", request, context)
        if request.id not in self.jobs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no job '{request.id}'")
        return training_pb.GetJobResponse(job=self.jobs[request.id])

    def ListJobs(self, request, context):
        self._enter("ListJobs", request, context)
        start = int(request.page_token or 0)
        end = start + self.page_size
        return training_pb.ListJobsResponse(
            jobs=list(self.jobs.values())[start:end],
            next_page_token=str(end) if end < len(self.jobs) else "",
        )

    def WatchJob(self, request, context):
        self._enter("WatchJob", request, context)
        yield from self.job_events

    def CancelJob(self, request, context):
        self._enter("CancelJob", request, context)
        self.jobs[request.id].state = training_pb.JOB_STATE_CANCELLED
        return training_pb.CancelJobResponse(job=self.jobs[request.id])

    def GetServerInfo(self, request, context):
        self._enter("GetServerInfo", request, context)
        return admin_pb.GetServerInfoResponse(info=self.info)


class Blocking:
    """Makes an AsyncClient look like a Client, so that one test holds for both."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if not callable(attribute):
            return Blocking(attribute, self._runner)

        def call(*arguments: Any, **options: Any) -> Any:
            result = attribute(*arguments, **options)
            if inspect.isasyncgen(result):
                return self._iterate(result)
            return self._runner.run(result)

        return call

    def _iterate(self, items: Any) -> Iterator[Any]:
        async def advance() -> Any:
            return await anext(items, self)

        try:
            while (item := self._runner.run(advance())) is not self:
                yield item
        finally:
            self._runner.run(items.aclose())

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Serve = Callable[..., str]
Connect = Callable[..., redmux.Client]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDMUX_TARGET", raising=False)
    monkeypatch.delenv("REDMUX_API_KEY", raising=False)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers on ports the system picks and returns their targets."""
    servers: list[grpc.Server] = []

    def start(
        fake: FakeServer, credentials: grpc.ServerCredentials | None = None, port: int = 0
    ) -> str:
        server = grpc.server(ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
        inference_grpc.add_InferenceServiceServicer_to_server(fake, server)
        adapters_grpc.add_AdapterServiceServicer_to_server(fake, server)
        admin_grpc.add_AdminServiceServicer_to_server(fake, server)
        training_grpc.add_TrainingServiceServicer_to_server(fake, server)
        health_pb2_grpc.add_HealthServicer_to_server(fake.health, server)
        if credentials is None:
            port = server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        fake.stop = lambda: server.stop(1).wait()
        servers.append(server)
        return f"localhost:{port}" if credentials else f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def target(server: FakeServer, serve: Serve) -> str:
    return serve(server)


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one flavour and closes them."""
    clients: list[Any] = []
    with asyncio.Runner() as runner:

        def make(target: str, **options: Any) -> Any:
            if request.param == "sync":
                clients.append(redmux.Client(target, **options))
            else:
                clients.append(Blocking(redmux.AsyncClient(target, **options), runner))
            return clients[-1]

        yield make
        for client in clients:
            client.close()


@pytest.fixture
def client(connect: Connect, target: str) -> redmux.Client:
    return connect(target)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_target(authority: trustme.CA, server: FakeServer, serve: Serve) -> str:
    certificate = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    return serve(server, credentials)


@pytest.fixture
def run(target: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command against the server; returns its exit code, stdout and stderr."""

    def run(*arguments: str, options: list[str] | None = None) -> tuple[int, str, str]:
        code = main([*arguments, *(["--target", target] if options is None else options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def terminal(target: str) -> Iterator[Callable[..., Terminal]]:
    """Runs commands on terminals of their own."""
    opened: list[Terminal] = []

    def start(*arguments: str, **size: int) -> Terminal:
        opened.append(Terminal(*arguments, "--target", target, **size))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
