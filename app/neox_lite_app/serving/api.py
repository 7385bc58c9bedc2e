"""The OpenAI-compatible API as Starlette routes over one engine. Knows nothing of keys, hosts and origins: see security.py."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from neox_lite.errors import ContextLengthError, NeoxLiteError
from neox_lite.version import __version__

from ..conversations.prompt_forms import Reader, form_of
from ..conversations.turn import Turn, end_ids, prepare
from . import schema
from .engine import Busy, Engine, NotLoaded
from .grammar import Grammar, Vocabulary
from .jobs import Job, Ticket, Update, arrivals
from .responses import Chats, Choice, Completions, Responses, Scored, Tokens, event, usage
from .schema import GenerationRequest, RequestError

if TYPE_CHECKING:
    from .metrics import Metrics

KEEP_ALIVE_S = 10.0  # silence after which a comment is sent, so that nobody between takes the connection for dead
CLOSED = 499  # nginx's number for a request whose client has gone
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # for nginx, which would hold it back
]
T = TypeVar("T")


class Prompt(NamedTuple):
    ids: list[int]
    text: str | None  # as echo shows it


class Api:
    """Routes and what they share. form: a prompt form's name that goes before the recognized one."""

    def __init__(self, engine: Engine, metrics: Metrics | None = None, form: str | None = None) -> None:
        self._engine, self._metrics, self._form = engine, metrics, form
        self._started = int(time.time())
        self._work = ThreadPoolExecutor(2, "api")  # tokenizing a megabyte or building a grammar takes a second
        self._model: _Model | None = None

    def app(self) -> Starlette:
        v1 = [
            Route("/models", self.models, methods=["GET"]),
            Route("/models/{id:path}", self.model, methods=["GET"]),
            Route("/completions", self.completions, methods=["POST"]),
            Route("/chat/completions", self.chat, methods=["POST"]),
        ]
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Mount("/v1", routes=v1),
        ]
        return Starlette(
            routes=routes, exception_handlers=dict.fromkeys((NeoxLiteError, HTTPException, Exception), _failed)
        )

    # Routes -----------------------------------------------------------------------------------------------------------

    async def health(self, http_request: Request) -> Response:
        """Whether a request would be answered now."""
        status = self._engine.status()
        well = status.state in ("ready", "idle")
        body = {"status": status.state, "active": status.active, "waiting": status.waiting}
        return JSONResponse(body, 200 if well else 503, {"cache-control": "no-store"})

    async def show_metrics(self, http_request: Request) -> Response:
        if self._metrics is None:
            raise RequestError("metrics need prometheus-client: pip install 'neox-lite[page]'", status=501)
        from .metrics import CONTENT_TYPE

        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(self, http_request: Request) -> Response:
        name = self._engine.name
        return JSONResponse({"object": "list", "data": [] if name is None else [self._describe(name)]})

    async def model(self, http_request: Request) -> Response:
        return JSONResponse(self._describe(self._check_model(http_request.path_params["id"])))

    def _describe(self, name: str) -> dict[str, Any]:
        about = {"id": _short(name), "object": "model", "created": self._started, "owned_by": "neox-lite"}
        with contextlib.suppress(NotLoaded):  # just then unloaded
            about["max_model_len"] = self._engine.context
        return about

    async def completions(self, http_request: Request) -> Response:
        request = schema.completion(await _body(http_request))
        model = self._current(self._check_model(request.model))
        prompts = [await self._aside(model.prompt, prompt) for prompt in request.prompts]
        return await self._answer(http_request, request, model, Completions, prompts, request.options)

    async def chat(self, http_request: Request) -> Response:
        request = schema.chat(await _body(http_request))
        model = self._current(self._check_model(request.model))
        turn = await self._aside(model.turn, request)
        # The text of a grammar stays as it is.
        reader = turn.reader if request.constraint is None else None
        return await self._answer(http_request, request, model, Chats, [Prompt(turn.ids, None)], turn.options, reader)

    def _check_model(self, requested: str | None) -> str:
        """The loaded model's name. Raises NotLoaded, or RequestError where another is requested."""
        name = self._engine.name
        if name is None:
            raise NotLoaded("no model is loaded; choose one on the Model tab, or start with neox-lite serve MODEL")
        if requested in (None, "", name, _short(name)):
            return name
        raise RequestError(
            f"the model {requested[:200]!r} is not here; this server has {_short(name)!r}",
            "model",
            "model_not_found",
            404,
        )

    def _current(self, name: str) -> _Model:
        """What is derived from the loaded model, made anew when that is another."""
        if self._model is None or self._model.tokenizer is not self._engine.tokenizer or self._model.name != name:
            self._model = _Model(name, self._engine, self._form)
        return self._model

    async def _aside(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._work, function, *args)

    # From jobs to answers ---------------------------------------------------------------------------------------------

    async def _answer(
        self,
        http_request: Request,
        request: GenerationRequest,
        model: _Model,
        shapes: type[Responses],
        prompts: Sequence[Prompt],
        options: Any,
        reader: Callable[[], Reader] | None = None,
    ) -> Response:
        """reader: makes what tidies an answer in the model's prompt form."""
        grammars: list[Grammar] = []
        if request.constraint is not None:
            grammar = await self._aside(model.grammar, request.constraint, options)
            grammars = [grammar.copy() for _ in range(len(prompts) * request.n)]
        client = f"api {http_request.client.host if http_request.client else ''} {request.user}"
        tickets = self._submit(_jobs(request, prompts, options, grammars, client))
        texts = [prompts[index // request.n].text if request.echo else None for index in range(len(tickets))]
        choices = [
            Choice(index, ticket, model.tokenizer, text, request.top, reader() if reader is not None else None)
            for index, (ticket, text) in enumerate(zip(tickets, texts, strict=True))
        ]
        responses = shapes(model.tokens, model.id, model.fingerprint, request.include_usage)
        answer = _Answer(request, choices, responses, grammars, self._metrics)
        return answer if request.stream else await answer.whole(http_request.receive, self._aside)

    def _submit(self, jobs: Sequence[Job]) -> list[Ticket]:
        """All of a request's jobs, or none."""
        tickets: list[Ticket] = []
        try:
            for job in jobs:
                tickets.append(self._engine.submit(job))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets


class _Model:
    """What requests need of the loaded model beside the engine."""

    def __init__(self, name: str, engine: Engine, form: str | None) -> None:
        self.name, self.id = name, _short(name)
        self.tokenizer = engine.tokenizer
        self.tokens = Tokens(self.tokenizer)
        self.generation_config, self.context = engine.generation_config, engine.context
        self._vocabulary_size = engine.config.vocab_size
        self._start = self.generation_config.bos_token_id
        self._form = form_of(name, self.tokenizer, form)
        self._vocabularies: dict[tuple[int, ...], Vocabulary] = {}
        identity = json.dumps([__version__, name, vars(engine.config)], default=str)
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    def prompt(self, given: str | list[int]) -> Prompt:
        """Ids of a text or as they are; an empty one starts with the model's own start."""
        ids = self.tokenizer(given).input_ids if isinstance(given, str) else given
        if unknown := next((i for i in ids if i >= self._vocabulary_size), None):
            raise RequestError(
                f"prompt has the token id {unknown}, but this model's ids end at {self._vocabulary_size - 1}", "prompt"
            )
        text = given if isinstance(given, str) else self.tokenizer.decode(given)
        if not ids and self._start is None:
            raise RequestError("prompt is empty, and this model names no token to start from", "prompt")
        return Prompt(ids or [self._start], text)

    def turn(self, request: GenerationRequest) -> Turn:
        """The turn that the messages ask for, in the model's prompt form."""
        messages, answer = request.messages, None
        if request.continue_final_message:
            messages, answer = messages[:-1], messages[-1]["content"]
        constrained = request.constraint is not None
        return prepare(
            self, self._form, messages, request.options, open_answer=answer, strict=True, constrained=constrained
        )

    def grammar(self, constraint: schema.Constraint, options: Any) -> Grammar:
        ends = tuple(end_ids(options, self.generation_config))
        if ends not in self._vocabularies:
            self._vocabularies[ends] = Vocabulary(self.tokenizer, self._vocabulary_size, ends)
        return Grammar(self._vocabularies[ends], constraint)


def _jobs(
    request: GenerationRequest, prompts: Sequence[Prompt], options: Any, grammars: Sequence[Grammar], client: str
) -> list[Job]:
    """One job for each choice; of one seed, the choices are different samples."""
    own = {**options, "max_new_tokens": request.max_tokens}
    if own["do_sample"]:
        own["seed"] = (secrets.randbits(63) if request.seed is None else request.seed) % 2**64
    prompt_logprobs = request.top if request.echo else None
    jobs = []
    for number in range(len(prompts) * request.n):
        constrained = {"logits_processor": [grammars[number]]} if grammars else {}
        ids, stream = prompts[number // request.n].ids, number % request.n
        jobs.append(Job(ids, own | constrained, client, request.top, prompt_logprobs, stream))
    return jobs


class ClientGone(Exception):
    """The connection was closed before the answer was there."""


class _Answer(Response):
    """What the tickets of one request bring, as one body, or (called as an ASGI application) as server-sent events."""

    def __init__(
        self,
        request: GenerationRequest,
        choices: Sequence[Choice],
        responses: Responses,
        grammars: Sequence[Grammar],
        metrics: Metrics | None,
    ) -> None:
        self._request, self._choices, self._responses = request, choices, responses
        self._grammars, self._metrics = grammars, metrics

    async def whole(self, receive: Receive, aside: Callable[..., Awaitable[Response]]) -> Response:
        """Everything in one piece. aside: runs a function beside the event loop; a batch of scored prompts takes seconds."""
        parts: list[list[tuple[str, Scored]]] = [[] for _ in self._choices]
        try:
            async with contextlib.aclosing(self._updates(receive)) as updates:
                async for choice, update in updates:
                    if update is not None:
                        parts[choice.index].append(choice.take(update))
        except ClientGone:
            return Response(status_code=CLOSED)
        return await aside(self._render, parts)

    def _render(self, parts: Sequence[Sequence[tuple[str, Scored]]]) -> Response:
        shown = []
        for choice, some in zip(self._choices, parts, strict=True):
            text, scored = "".join(text for text, _ in some), [one for _, scored in some for one in scored]
            reported = scored if choice.top is not None else None
            shown.append(self._responses.choice(choice.index, text, reported, choice.finish_reason))
        return JSONResponse(self._responses.whole(shown, usage(self._choices, self._request.n)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An error that comes before anything else has its own status, and is an event later."""
        opened = set[int]()
        begun = False
        try:
            async with contextlib.aclosing(self._updates(receive)) as updates:
                async for choice, update in updates:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
                        begun = True
                    part = b": still working\n\n" if update is None else self._event(choice, update, opened)
                    if part:
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            end = self._responses.last_chunk(usage(self._choices, self._request.n))
        except ClientGone:
            if not begun:
                return await Response(status_code=CLOSED)(scope, receive, send)
            end = b""
        except NeoxLiteError as error:
            if not begun:
                return await (await _failed(None, error))(scope, receive, send)
            end = event(_error_body(error))
        return await send({"type": "http.response.body", "body": end})

    def _event(self, choice: Choice, update: Update, opened: set[int]) -> bytes:
        text, scored = choice.take(update)
        part = b"" if choice.index in opened else self._responses.opening(choice.index)
        opened.add(choice.index)
        if text or scored:
            reported = scored if choice.top is not None else None
            part += self._responses.chunk(self._responses.delta(choice.index, text, reported, None))
        # The end has a chunk of its own: clients stop reading at it, whatever text it has.
        if choice.finish_reason:
            part += self._responses.chunk(self._responses.delta(choice.index, "", None, choice.finish_reason))
        return part

    async def _updates(self, receive: Receive) -> AsyncGenerator[tuple[Choice, Update | None], None]:
        """What comes for each choice; None after some silence. The tickets are cancelled when the client goes, or this ends."""
        tickets, gone = [choice.ticket for choice in self._choices], False

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            for ticket in tickets:
                ticket.cancel()

        watcher = asyncio.create_task(watch())
        try:
            async with contextlib.aclosing(arrivals(tickets, KEEP_ALIVE_S)) as found:
                async for number, update in found:
                    if gone:
                        raise ClientGone
                    choice = self._choices[number]
                    if update is not None:
                        self._check(choice, update)
                    yield choice, update
        finally:
            watcher.cancel()
            for ticket in tickets:
                ticket.cancel()

    def _check(self, choice: Choice, update: Update) -> None:
        """Count a token. Raises NeoxLiteError for an answer that ended otherwise than it should."""
        if self._metrics is not None and update.token is not None:
            choice.last_s = self._metrics.token(choice.ticket, choice.last_s)
        if update.finish_reason is None:
            return
        if update.finish_reason == "error":
            raise RequestError(update.error or "the engine failed", None, "engine_error", 503, "server_error")
        if update.finish_reason == "cancelled":
            raise RequestError("the model was unloaded; ask again", None, "model_not_loaded", 503, "server_error")
        if self._grammars and (error := self._grammars[choice.index].error):
            param = self._request.constraint.param if self._request.constraint else None
            raise RequestError(f"{param}: given up while the answer was written: {error}", param)


# Bodies and errors ----------------------------------------------------------------------------------------------------


async def _body(http_request: Request) -> dict[str, Any]:
    kind = http_request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the body's Content-Type is {kind[:100]!r}, expected application/json", status=415)
    return schema.read_json(await http_request.body())


def _short(name: str) -> str:
    """What clients call a model: of a folder, its last part; a hub id as it is."""
    path = name.rstrip("/\\")
    is_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return path if is_id else path.replace("\\", "/").rpartition("/")[2] or name


def _error_of(error: Exception) -> RequestError:
    """Any error in the API's terms."""
    match error:
        case RequestError():
            return error
        case Busy():
            return RequestError(str(error), None, "rate_limit_exceeded", 429, "rate_limit_error")
        case NotLoaded():
            return RequestError(str(error), None, "model_not_loaded", 503, "server_error")
        case ContextLengthError():
            return RequestError(str(error), None, "context_length_exceeded")
        case HTTPException():
            return RequestError(f"{error.detail}: see docs/api.md for what there is", status=error.status_code)
        case NeoxLiteError() as bad if isinstance(bad, ValueError | NotImplementedError):
            return RequestError(str(bad))
        case NeoxLiteError():
            return RequestError(str(error), None, "engine_error", 503, "server_error")
    return RequestError("the server failed; its terminal says where", None, "internal_error", 500, "server_error")


def _error_body(error: Exception) -> dict[str, Any]:
    known = _error_of(error)
    return {"error": {"message": str(known), "type": known.type, "param": known.param, "code": known.code}}


async def _failed(http_http_request: Request | None, error: Exception) -> Response:
    known = _error_of(error)
    headers = dict(getattr(error, "headers", None) or {})
    if known.status in (429, 503):
        headers["retry-after"] = "1"
    return JSONResponse(_error_body(error), known.status, headers)
