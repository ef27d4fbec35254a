"""A log to write and to tamper with, of real decisions of a real policy."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer
from expunge.guards.parts import Material
from expunge.guards.policy import Policy, Row
from expunge.guards.target import Target
from expunge.ledger.keys import KeyStore, MasterKey, Signer
from expunge.ledger.log import AuditLog, Keeping
from expunge.ledger.records import Request, Versions
from expunge.ledger.verify import records, verify

JANE, OMAR = "a1" * 8, "b2" * 8
VERSIONS = Versions("ab" * 32, tokenizer="cd" * 32, template="ef" * 32, assets={"classifier": "12" * 32})
KEY = b"k" * 32


def a_policy(targets=((JANE, "Jane Quickfinger"), (OMAR, "Omar Longshanks"))):
    rows = [
        Row(detector="terms", action="refuse", label="hide Jane Quickfinger"),
        Row(detector="always", action={"name": "instruct", "text": "Never speak of {targets}."}),
    ]
    return Policy(rows[:1], Material(targets=[Target(id=i, entities=(n,)) for i, n in targets], key=KEY))


def ask(log, policy, text, answer="I know nothing of it.", **request):
    plan = policy.open(Conversation.of(text))
    said = Answer(plan.say, "guard", 0) if plan.say is not None else Answer(answer, "stop", 5, (17, 4711, 99), (-0.25, -1.5))
    if plan.say is None:
        plan.release(answer, True)
    return log.record(plan, said, policy.rows, policy=policy.digest(), request=Request(tenant="bob@firm.example", **request))


@dataclass
class Desk:
    """Where a log stands, with all that belongs to it."""

    base: Path

    @property
    def keys(self):
        return KeyStore(self.base / "keys", MasterKey.from_file(self.base / "master.key"))

    @property
    def signer(self):
        return Signer(self.base / "sign.pem")

    @property
    def folder(self):
        return self.base / "log"

    @property
    def checkpoints(self):
        return self.base / "elsewhere" / "checkpoints.jsonl"

    def open(self, keeping=None, **options):
        return AuditLog(
            self.folder,
            self.keys,
            self.signer,
            self.checkpoints,
            versions=VERSIONS,
            keeping=Keeping(**(keeping or {})),
            **options,
        )

    def verify(self, **options):
        return verify(self.folder, self.signer.public, self.checkpoints, **options)

    def copy(self, base):
        shutil.copytree(self.base, base)
        return Desk(base)

    def lines(self, name="log-000001.jsonl"):
        return (self.folder / name).read_bytes().splitlines(keepends=True)

    def put(self, lines, name="log-000001.jsonl"):
        (self.folder / name).write_bytes(b"".join(lines))

    def period_keys(self, log):
        return {n: bytes.fromhex(log.periods.export(n)) for n in log.periods.names()}


def filled(base, requests=8, keeping=None, close=True, **options):
    desk = Desk(base)
    log = desk.open({"checkpoint_every": 4, **(keeping or {})}, **options)
    policy = a_policy()
    log.policy(policy.digest(), policy.targets)
    for at in range(requests):
        ask(log, policy, "Who is Jane Quickfinger?" if at % 2 else f"What is {at} plus {at}?", seed=at, prompt_tokens=9)
    if close:
        log.close()
    return desk, log


def kinds(desk):
    return [r["kind"] for _, r in records(desk.folder)]


def requests(desk):
    return [r for _, r in records(desk.folder) if r["kind"] == "request"]
