"""A world of clients, one key, a clock and faults, in which every step is chosen by the checker.

The lock's functions are coroutines that suspend at each store call. A coroutine cannot be copied,
but it is determined by its arguments, by the replies that it has seen and by the clock at each of
them; so a state of the world is plain data, and a client is brought to its place by feeding it the
replies again. What a step leads to is then a function of the state, and equal states are one.

A store call is two steps: its effect, and its reply. Between any two steps time may pass across the
expiry, another client may act, or the client may crash; instead of the effect the call may fail,
and after the effect its reply may be lost.

Steps that touch nothing but the client itself (to begin a call, to be told a reply) commute with
what others do at the same time on the clock. Of such orders one is visited: a call begins just
before its first effect, and a reply arrives just after its effect, unless time passes in between.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from joblock import (
    Acquired,
    Blob,
    Held,
    JobLockHeldError,
    JobLockLostError,
    JobLockRecord,
    Lost,
    ReleaseResult,
    Renewed,
    StoreContentionError,
    _protocol,
    aio,
)
from joblock._protocol import ROUNDS

TIME_PASSES = "time passes: every lease expires"
REFUSED = "takes effect, repeated and refused"
TTL = 100
START = 1_000
UID, VAULT = "u", "v"
KEY = "index-jobs/u/v.json"
ORIGINAL_FIELDS = [
    "jobId", "canisterUid", "vaultId", "actorUid", "chunksToEmbed", "estimatedSeconds", "reason",
    "startedAt", "expiresAt",
]  # fmt: skip


class InvariantError(AssertionError):
    """The lock broke a promise, in the step that `story` tells."""

    story = ""


class StoreDownError(Exception):
    """The store call failed, or its reply was lost: the client cannot tell which."""

    noted: tuple[str, str] | None = None  # what a resume may have written, and over what


@dataclass(frozen=True)
class Algorithm:
    """What is being checked: the functions, and whether etags come back with a key.

    `keep`, `leave`, `requeue` and `undo` are what a keeper does for its run.
    """

    acquire: Callable[..., Awaitable[Acquired | Held]] = aio.acquire_job_lock
    release: Callable[..., Awaitable[ReleaseResult]] = aio.release_job_lock
    renew: Callable[..., Awaitable[Renewed | Lost]] = aio.renew_job_lock
    resume: Callable[..., Awaitable[Acquired]] = _protocol.resume
    keep: Callable[..., Awaitable[Renewed | Lost]] = _protocol.renew
    leave: Callable[..., Awaitable[ReleaseResult]] = _protocol.release
    requeue: Callable[..., Awaitable[Renewed | Lost]] = _protocol.requeue
    undo: Callable[..., Awaitable[object]] = _protocol.undo
    sweep: Callable[..., Awaitable[Blob | None]] = _protocol.sweep
    etags_repeat: bool = False
    tells: bool = False  # the store's refusal of a new key says what is there


class Limits(NamedTuple):
    """How far a search goes: operations a client, and how often each misfortune may happen."""

    operations: int
    ticks: int
    faults: int
    crashes: int
    renewals: bool = True
    without_etag: bool = True  # also release and renew without the etag that the client has
    refused: bool = False  # a fault may be that the client is refused by its own repeated write
    runs: bool = False  # clients resume job x, or hold locks of their own
    sweeps: bool = False  # whoever has no lock may remove what has expired by its clock
    at_least: int = 0  # milliseconds from its start for which a lock is kept, with `runs`
    at_most: int | None = None


# A value and its etag. In a state etags are `#n`, numbered by where they occur in it.
Stored = tuple[str, str] | None


class Call(NamedTuple):
    """One store call that a client waits for."""

    verb: str
    value: str = ""
    etag: str = ""


class Reply(NamedTuple):
    """What the store answered; `down` stands for an error."""

    kind: str  # "none", "etag", "bool", "blob", "text" or "down"
    value: str = ""
    etag: str = ""


class Op(NamedTuple):
    """One call of a joblock function."""

    kind: str
    job: str
    now: int
    client: str = ""
    etag: str = ""
    record: str = ""
    replaced: str = ""


class Client(NamedTuple):
    """One client: what it believes, and where it is in its current operation."""

    name: str
    operations: int = 0
    job: str = ""  # the job whose lock it has or may have
    lease: float = 0  # until when it believes to own it; 0 when it does not
    etag: str = ""
    record: str = ""
    op: Op | None = None
    log: tuple[tuple[Reply, int], ...] = ()
    reply: Reply | None = None  # the effect has happened, the reply is on its way
    moved_at: int = 0  # when it began a step that commutes with all but the passing of time
    present: tuple[str, ...] = ()  # the texts in the store since the operation began
    replaced: str = ""  # what its last write replaced
    undoes: tuple[str, str] | None = None  # what it may have written, and what it meant to replace
    crashed: bool = False


class State(NamedTuple):
    """Everything that decides what can happen next."""

    now: int
    stored: Stored
    clients: tuple[Client, ...]
    ticks: int
    faults: int
    crashes: int


class Action(NamedTuple):
    """One step of a schedule."""

    what: str
    client: int = -1

    def __str__(self) -> str:
        return self.what if self.client < 0 else f"{'ABCDEFGH'[self.client]}: {self.what}"


class _Suspend:
    def __init__(self, call: Call) -> None:
        self.call = call

    def __await__(self) -> Generator[Call, Any, Any]:
        return (yield self.call)


class _Store:
    """The async store that clients see: each call suspends until the checker replies."""

    async def get(self, _key: str) -> str | None:
        return await _Suspend(Call("get"))  # type: ignore[no-any-return]

    async def set(self, _key: str, value: str) -> None:
        await _Suspend(Call("set", value))

    async def delete(self, _key: str) -> None:
        await _Suspend(Call("delete"))

    async def get_with_etag(self, _key: str) -> Blob | None:
        return await _Suspend(Call("get_with_etag"))  # type: ignore[no-any-return]

    async def set_if_new(self, _key: str, value: str) -> str | None:
        return await _Suspend(Call("set_if_new", value))  # type: ignore[no-any-return]

    async def set_if_match(self, _key: str, value: str, etag: str) -> str | None:
        return await _Suspend(Call("set_if_match", value, etag))  # type: ignore[no-any-return]

    async def delete_if_match(self, _key: str, etag: str) -> bool:
        return await _Suspend(Call("delete_if_match", "", etag))  # type: ignore[no-any-return]


class _TellingStore(_Store):
    async def set_if_new_or_get(self, _key: str, value: str) -> str | Blob | None:
        return await _Suspend(Call("set_if_new_or_get", value))  # type: ignore[no-any-return]


STORE, TELLING_STORE = _Store(), _TellingStore()


class World:
    """The steps that are possible in a state, and the state that each leads to."""

    def __init__(self, algorithm: Algorithm, limits: Limits) -> None:
        self.algorithm = algorithm
        self.limits = limits
        self._runs: dict[tuple[Op, tuple[tuple[Reply, int], ...]], object] = {}

    def start(self, initial: str | None, clients: int) -> State:
        stored = None if initial is None else (initial, "#0")
        everyone = [Client("ABCDEFGH"[number]) for number in range(clients)]
        record = JobLockRecord.from_json(initial)
        if record is not None and record.is_live(START) and not self._waits(record):
            assert record.expires_at is not None
            everyone.append(Client("X", lease=record.expires_at, crashed=True))
        return State(START, stored, tuple(everyone), 0, 0, 0)

    def _waits(self, record: JobLockRecord) -> bool:
        return self.limits.runs and (record.run_id is None or record.ended_at is not None)

    def actions(self, state: State) -> Iterator[Action]:
        limits = self.limits
        busy = [client for client in state.clients if client.moved_at == state.now]
        for number, client in enumerate(state.clients):
            if client.crashed or (busy and client not in busy):
                continue
            if client.op is None:
                # The clients are alike, so they may as well begin in the order of their names.
                waits = number > 0 and not state.clients[number - 1].operations
                if client.operations < limits.operations and not waits:
                    for kind in self._next_operations(client):
                        yield Action(kind, number)
            elif client.reply is not None:
                yield Action("reply", number)
            else:
                yield Action("effect", number)
                if state.faults < limits.faults:
                    yield Action("fails", number)
                    yield Action("takes effect, reply lost", number)
                    if limits.refused:
                        yield Action(REFUSED, number)
            if state.crashes < limits.crashes and (client.op is not None or client.lease):
                yield Action("crash", number)
        if state.ticks < limits.ticks:
            yield Action(TIME_PASSES)

    def _next_operations(self, client: Client) -> Iterator[str]:
        if self.limits.sweeps and not client.job:
            yield "sweep"
        if self.limits.runs:
            if client.undoes is not None:
                yield "undo"
            elif client.record:  # believed to be its run's, perhaps for too long
                yield from ("keep with etag", "leave with etag", "requeue with etag")
            else:
                yield from ("acquire", "resume")
            return
        if not client.lease:
            yield "acquire"
        if client.job:
            yield from self._variants("release", client)
        if client.lease and self.limits.renewals:
            yield from self._variants("renew", client)

    def _variants(self, kind: str, client: Client) -> Iterator[str]:
        if client.etag:
            yield f"{kind} with etag"
        if not client.etag or self.limits.without_etag:
            yield kind

    def step(self, state: State, action: Action) -> tuple[State, str]:
        """Return the next state and what happened; raise InvariantError if a promise broke."""
        if action.client < 0:
            later = state._replace(now=state.now + TTL, ticks=state.ticks + 1)
            return later, str(action)
        client = state.clients[action.client]
        if action.what == "crash":
            crashed = client._replace(
                crashed=True, op=None, log=(), reply=None, present=(), moved_at=0
            )
            return self._with(state, crashed, crashes=state.crashes + 1), f"{client.name} crashes"
        if action.what == "reply":
            assert client.reply is not None
            log = (*client.log, (client.reply, state.now))
            moved = self._advance(state, client._replace(log=log, reply=None, moved_at=0))
            return self._checked(moved, f"{client.name} is told", client.name)
        if client.op is None:
            return self._begin(state, client, action.what)
        return self._effect(state, client, client.op, action.what)

    def _begin(self, state: State, client: Client, what: str) -> tuple[State, str]:
        kind, _, with_etag = what.partition(" with ")
        operations = client.operations + 1
        job = f"{client.name.lower()}{operations}" if kind == "acquire" else client.job
        if kind == "resume":
            job = "x"
        op = Op(kind, job, state.now, f"{client.name}{operations}" if self.limits.runs else "")
        if with_etag:
            op = op._replace(etag=client.etag, record="" if kind == "release" else client.record)
        if client.undoes is not None:
            op = op._replace(record=client.undoes[0], replaced=client.undoes[1])
        client = client._replace(operations=operations, job=job, op=op, moved_at=state.now)
        if kind not in ("renew", "keep"):  # whoever releases has stopped working
            client = client._replace(lease=0, etag="", record="", undoes=None)
        client = client._replace(present=(state.stored[0] if state.stored else "",), replaced="")
        return self._checked(
            self._advance(state, client), f"{client.name} calls {what}", client.name
        )

    def _effect(self, state: State, client: Client, op: Op, what: str) -> tuple[State, str]:
        call = self._run(op, client.log)
        assert isinstance(call, Call)
        if what == "fails":
            failed = client._replace(reply=Reply("down"), moved_at=state.now)
            after = self._with(state, failed, faults=state.faults + 1)
            return after, f"{client.name}'s {call.verb} fails"
        stored, reply = apply(state.stored, call, self.algorithm.etags_repeat, fresh(state))
        story = f"{client.name}'s {call.verb}: {shown(call, reply)}"
        if stored != state.stored:
            try:
                self._check_write(state, client, op, stored)
            except InvariantError as error:
                error.story = story
                raise
            client = client._replace(replaced=state.stored[0] if state.stored else "")
            state = state._replace(stored=stored)
            text = stored[0] if stored else ""
            state = state._replace(
                clients=tuple(
                    other._replace(present=(*other.present, text))
                    if other.op is not None and text not in other.present
                    else other
                    for other in state.clients
                )
            )
            if text not in client.present:
                client = client._replace(present=(*client.present, text))
        if what == "effect":
            return self._with(state, client._replace(reply=reply, moved_at=state.now)), story
        if what == REFUSED and reply.kind in ("etag", "bool"):
            no = Reply("none" if reply.kind == "etag" else "bool")
            if call.verb == "set_if_new_or_get" and stored:
                no = Reply("blob", *stored)
            refused = client._replace(reply=no, moved_at=state.now)
            after = self._with(state, refused, faults=state.faults + 1)
            return after, f"{story}, but repeated and refused"
        lost = client._replace(reply=Reply("down"), moved_at=state.now)
        return self._with(state, lost, faults=state.faults + 1), f"{story}, but the reply is lost"

    def _with(self, state: State, client: Client, **changes: int) -> State:
        clients = tuple(client if c.name == client.name else c for c in state.clients)
        return state._replace(clients=clients, **changes)  # type: ignore[arg-type]

    def _advance(self, state: State, client: Client) -> State:
        """Let the client go on to its next store call, or to the end of its operation."""
        op = client.op
        assert op is not None
        outcome = self._run(op, client.log)
        if isinstance(outcome, Call):
            if len(client.log) > 2 * ROUNDS:
                raise InvariantError(f"{client.name}'s {op.kind} does not end")
            return self._with(state, client)
        ended = client._replace(op=None, log=(), present=(), replaced="")
        match outcome:
            case _ if op.kind == "undo" and isinstance(outcome, ReleaseResult | Renewed | Lost):
                ended = ended._replace(job="")
            case Blob() | None if op.kind == "sweep":
                removed = "" if outcome is None else outcome.value
                check(removed == client.replaced, "a sweep removed something else than it says")
            case Acquired(job_id, record, etag, took_over):
                check(job_id == op.job, "acquired under another job's id")
                replaced = JobLockRecord.from_json(client.replaced)
                if op.kind == "resume" and replaced is not None and replaced.run_id is None:
                    replaced = None  # nobody has run it, so there is no receipt
                check(took_over == replaced, f"took_over is {took_over}, replaced was {replaced}")
                ended = believing(ended, record, etag)
            case Held(existing):
                texts = [JobLockRecord.from_json(text) for text in client.present]
                check(existing in texts, "Held shows a record that was not there")
                check(existing.job_id != op.job, "refused by its own record")
                check(existing.is_live(op.now), "Held by a record that had expired before the call")
                ended = ended._replace(job="")
            case Renewed(record, etag) if op.kind == "requeue":
                check(record.run_id is None, "requeued, and a run has it")
                ended = ended._replace(job="")
            case Renewed(record, etag):
                ended = believing(ended, record, etag)
            case Lost(_, current):
                texts = [JobLockRecord.from_json(text) for text in client.present]
                check(current in texts, "Lost shows a record that was not there")
                ended = ended._replace(lease=0, etag="", record="")
            case ReleaseResult(released=released):
                check(not released or client.replaced != "", "released without having removed it")
                ended = ended._replace(job="")
            case JobLockHeldError(existing=existing):
                texts = [JobLockRecord.from_json(text) for text in client.present]
                check(existing in texts, "refused by a record that was not there")
                check(existing.run_id is not None, "refused, and no run has the lock")
                check(existing.is_live(op.now), "refused by a run that had died before the call")
                ended = ended._replace(job="")
            case JobLockLostError(reason=reason, current=current):
                texts = [JobLockRecord.from_json(text) for text in client.present]
                check(current in texts, "not resumed because of a record that was not there")
                check(
                    current is None
                    or current.job_id != op.job
                    or current.ended_at is not None
                    or reason == "lease_expired",
                    "a job that waits to be resumed is not",
                )
                ended = ended._replace(job="")
            case StoreDownError(noted=noted) if op.kind == "resume" and noted:
                ended = ended._replace(undoes=noted)
            case StoreContentionError() | StoreDownError():
                pass  # it may have the lock or not: it may release, renew or try again
            case _:
                raise InvariantError(f"{client.name}'s {op.kind} ended with {outcome!r}")
        return self._with(state, ended)

    def _run(self, op: Op, log: tuple[tuple[Reply, int], ...]) -> object:
        """What the function does next after these replies: a Call, its result, or its error."""
        key = (op, log)
        if key not in self._runs:
            self._runs[key] = self._replay(op, log)
        return self._runs[key]

    def _replay(self, op: Op, log: tuple[tuple[Reply, int], ...]) -> object:
        times = [op.now]
        noted: list[tuple[str, str]] = []

        def note(written: JobLockRecord, replaced: JobLockRecord) -> None:
            noted.append((written.to_json(), replaced.to_json()))

        coroutine = self._coroutine(op, lambda: times[-1], note)
        try:
            call = coroutine.send(None)
            for reply, now in log:
                times.append(now)
                if reply.kind == "down":
                    call = coroutine.throw(StoreDownError())
                else:
                    call = coroutine.send(as_answer(reply))
        except StopIteration as end:
            return end.value
        except StoreDownError as error:
            error.noted = noted[-1] if noted else None
            return error
        except Exception as error:
            return error
        coroutine.close()
        return call

    def _coroutine(
        self, op: Op, clock: Callable[[], int], note: Callable[..., object]
    ) -> Coroutine[Call, object, object]:
        algorithm = self.algorithm
        awaitable: Any
        if op.kind == "acquire":
            store = TELLING_STORE if algorithm.tells else STORE
            awaitable = algorithm.acquire(
                store, UID, VAULT, ttl_ms=TTL, clock=clock, uuid_factory=lambda: op.job
            )
        elif op.kind == "release":
            awaitable = algorithm.release(
                STORE, UID, VAULT, expected_job_id=op.job, etag=op.etag or None
            )
        elif op.kind == "sweep":
            awaitable = algorithm.sweep(STORE, KEY, expired_by=clock())
        elif self.limits.runs:
            awaitable = self._of_a_run(op, clock, note)
        else:
            awaitable = algorithm.renew(
                STORE,
                UID,
                VAULT,
                expected_job_id=op.job,
                ttl_ms=TTL,
                clock=clock,
                etag=op.etag or None,
                record=JobLockRecord.from_json(op.record),
            )
        coroutine: Coroutine[Call, object, object] = awaitable
        return coroutine

    def _of_a_run(self, op: Op, clock: Callable[[], int], note: Callable[..., object]) -> Any:
        algorithm, limits = self.algorithm, self.limits
        run, etag = JobLockRecord.from_json(op.record), op.etag or None
        if op.kind == "resume":
            return algorithm.resume(
                STORE,
                UID,
                VAULT,
                expected_job_id=op.job,
                ttl_ms=TTL,
                at_most_ms=limits.at_most,
                clock_skew_ms=0,
                clock=clock,
                uuid_factory=lambda: f"run-{op.client}",
                id_is_new=True,
                writing=note,
            )
        if op.kind == "undo":
            replaced = JobLockRecord.from_json(op.replaced)
            return algorithm.undo(STORE, UID, VAULT, written=run, replaced=replaced)
        if op.kind == "requeue":
            return algorithm.requeue(
                STORE,
                UID,
                VAULT,
                run=run,
                etag=etag,
                ttl_ms=TTL,
                at_least_ms=limits.at_least,
                clock=clock,
            )
        kept: dict[str, Any] = {"expected_job_id": op.job, "clock": clock, "record": run}
        kept |= {"etag": etag, "run": run}
        if op.kind == "leave":
            return algorithm.leave(STORE, UID, VAULT, at_least_ms=limits.at_least, **kept)
        return algorithm.keep(STORE, UID, VAULT, ttl_ms=TTL, at_most_ms=limits.at_most, **kept)

    def _check_write(self, state: State, client: Client, op: Op, after: Stored) -> None:
        before = JobLockRecord.from_json(state.stored[0]) if state.stored else None
        if op.kind == "sweep":
            swept = state.stored and state.stored[0]
            check(before is not None or swept == "null", f"a sweep removed {swept!r}")
            check(before is None or not before.is_live(state.now), "a sweep removed a live lock")
            return
        if before is not None and before.job_id != op.job:
            check(op.kind == "acquire", f"{op.kind} touched the record of job {before.job_id}")
            check(
                not before.is_live(state.now), f"acquire replaced job {before.job_id}'s live lock"
            )
        if self.limits.runs:
            self._check_run(state.now, op, before, JobLockRecord.from_json(after and after[0]))
        if after is not None and after[0] != "null":
            fields = json.loads(after[0])
            check(list(fields)[:9] == ORIGINAL_FIELDS, "the original could not read this")
            check(isinstance(fields["expiresAt"], int), "the original would take this for expired")

    def _check_run(
        self, now: int, op: Op, before: JobLockRecord | None, after: JobLockRecord | None
    ) -> None:
        """What is promised of runs, of each write."""
        if before is None or op.kind == "acquire":
            return
        if op.kind == "resume":
            check(before.ended_at is None, "resumed a job that has ended")
            check(before.run_id is None or not before.is_live(now), f"ran beside {before.run_id}")
        else:
            run = JobLockRecord.from_json(op.record)
            assert run is not None
            same = (before.started_at, before.run_id) == (run.started_at, run.run_id)
            check(same, f"{op.kind} by {run.run_id} touched the record of {before.run_id}")
        if op.kind == "leave":
            least = (before.started_at or 0) + self.limits.at_least
            kept = after is not None and after.ended_at is not None and after.expires_at == least
            check(kept or least <= now, "a lock under its minimum hold was freed")
        if op.kind in ("keep", "requeue"):
            assert after is not None
            check((after.expires_at or 0) >= (before.expires_at or 0), "a deadline moved back")
        if op.kind in ("keep", "resume") and self.limits.at_most is not None:
            assert after is not None
            most = (before.started_at or 0) + self.limits.at_most
            check((after.expires_at or 0) <= most, "a deadline beyond the job's longest time")

    def _checked(self, state: State, story: str, name: str) -> tuple[State, str]:
        (client,) = [client for client in state.clients if client.name == name]
        owners = [c.name for c in state.clients if c.lease > state.now]
        check(len(owners) <= 1, f"{' and '.join(owners)} own the lock at the same time")
        if client.op is None:
            story += f" -> {'owns the lock' if client.lease else 'does not own it'}"
        return state, story


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvariantError(otherwise)


def believing(client: Client, record: JobLockRecord, etag: str | None) -> Client:
    return client._replace(
        lease=record.expires_at or 0, etag=etag or "", record=record.to_json() if etag else ""
    )


def apply(stored: Stored, call: Call, etags_repeat: bool, new: str) -> tuple[Stored, Reply]:
    """The one-key specification of the store's verbs: the state after the call, and its reply."""
    current = stored[1] if stored else None
    if etags_repeat:
        new = f"v{int(current[1:]) + 1 if current else 1}"
    none, written = Reply("none"), Reply("etag", etag=new)
    match call.verb:
        case "get":
            return stored, Reply("text", stored[0]) if stored else none
        case "get_with_etag":
            return stored, Reply("blob", *stored) if stored else none
        case "set":
            return (call.value, new), none
        case "delete":
            return None, none
        case "set_if_new":
            return (stored, none) if stored else ((call.value, new), written)
        case "set_if_new_or_get":
            blob = Reply("blob", *stored) if stored else none
            return (stored, blob) if stored else ((call.value, new), written)
        case "set_if_match":
            return ((call.value, new), written) if current == call.etag else (stored, none)
        case _:
            deleted = current == call.etag
            return (None if deleted else stored), Reply("bool", "yes" if deleted else "")


def as_answer(reply: Reply) -> object:
    match reply.kind:
        case "etag":
            return reply.etag
        case "bool":
            return reply.value == "yes"
        case "blob":
            return Blob(reply.value, reply.etag)
        case "text":
            return reply.value
        case _:
            return None


def shown(call: Call, reply: Reply) -> str:
    match reply.kind:
        case "none" if call.verb.startswith("get"):
            return "no record"
        case "none":
            return "refused" if "_if_" in call.verb else "done"
        case "etag":
            return "done"
        case "bool":
            return "done" if reply.value else "refused"
        case _:
            record = JobLockRecord.from_json(reply.value)
            return f"the lock of job {record.job_id}" if record else repr(reply.value)


def etags_in(state: State) -> Iterator[str]:
    if state.stored:
        yield state.stored[1]
    for client in state.clients:
        yield client.etag
        if client.op is not None:
            yield client.op.etag
        for reply, _ in client.log:
            yield reply.etag
        if client.reply is not None:
            yield client.reply.etag


def fresh(state: State) -> str:
    """An etag that is nowhere in the state: to the clients, one that never was."""
    used = set(etags_in(state))
    number = len(used)
    while f"#{number}" in used:
        number += 1
    return f"#{number}"


def canonical(state: State) -> State:
    """The same state with its etags numbered by where they occur, so that equal states are one."""
    names: dict[str, str] = {"": ""}
    for etag in etags_in(state):
        if etag not in names:
            names[etag] = f"#{len(names)}" if etag.startswith("#") else etag
    if all(old == new for old, new in names.items()):
        return state
    clients = tuple(
        client._replace(
            etag=names[client.etag],
            op=client.op and client.op._replace(etag=names[client.op.etag]),
            log=tuple((reply._replace(etag=names[reply.etag]), now) for reply, now in client.log),
            reply=client.reply and client.reply._replace(etag=names[client.reply.etag]),
        )
        for client in state.clients
    )
    stored = state.stored and (state.stored[0], names[state.stored[1]])
    return state._replace(stored=stored, clients=clients)


def of_job_x(expires_at: int, more: str = "") -> str:
    fields = f'"jobId":"x","canisterUid":"u","vaultId":"v","startedAt":{START}'
    return f'{{{fields},"expiresAt":{expires_at}{more}}}'


LIFE: dict[str, str | None] = {
    "no record": None,
    "taken": of_job_x(START + 2 * TTL),
    "taken, expired": of_job_x(START),
    "a live run": of_job_x(START + TTL, ',"runId":"run-X"'),
    "a dead run": of_job_x(START, ',"runId":"run-X"'),
    "ended": of_job_x(START + TTL, f',"endedAt":{START}'),
}

INITIAL: dict[str, str | None] = {
    "no record": None,
    "live": f'{{"jobId":"x","canisterUid":"u","vaultId":"v","startedAt":{START},'
    f'"expiresAt":{START + TTL}}}',
    "expired": f'{{"jobId":"x","canisterUid":"u","vaultId":"v","startedAt":{START - TTL},'
    f'"expiresAt":{START}}}',
    "malformed": "not a record{",
    "tombstone": "null",
}
