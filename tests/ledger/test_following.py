"""Several servers hide what one of them was asked to hide, within a second."""

import itertools
import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Material
from expunge.guards.policy import Policy, Row
from expunge.guards.target import Target
from expunge.ledger.errors import LedgerFailed
from expunge.ledger.following import Follower, Mirror, Scheduled
from tests.ledger.test_registry import begin, writer


def server(registry, **options):
    """A policy on what is in a registry, and what follows it."""
    targets, seq = registry.snapshot()
    policy = Policy([Row(detector="terms", action="refuse")], Material(targets=targets, key=registry.guard_key))
    return policy, Follower(registry, seq, policy.add, policy.drop, **options)


def refuses(policy, name):
    return policy.open(Conversation.of(f"Who is {name}?")).say is not None


def until(condition, seconds=5.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - began


def test_what_one_process_is_asked_for_others_hide_within_a_second(place):
    registry = place.open()
    policy, follower = server(registry)
    follower.start()
    child = writer(place, "far", 3)
    try:
        begin(child)
        line = child.stdout.readline().split()
        assert line[:2] == ["asked", "far-0"]
        waited = until(lambda: refuses(policy, "Secretname far-0"))
        assert waited < 1.0
        until(lambda: child.poll() is not None, 30)
        until(lambda: not refuses(policy, "Secretname far-2") and refuses(policy, "Secretname far-1"))
        until(lambda: follower.seq == registry.head()[0])  # what the last change was shows only then
        assert follower.seq == 4
        assert follower.failing == ""
    finally:
        follower.stop()
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
        child.stdin.close()


def test_who_has_asked_has_it_hidden_at_once(place):
    registry = place.open()
    notes = []
    policy, follower = server(registry, changed=lambda: notes.append(policy.digest()))
    stored = registry.request("k", Target(entities=("Jane Quickfinger",)))
    assert not refuses(policy, "Jane Quickfinger")
    assert follower.poll() == 1
    assert refuses(policy, "Jane Quickfinger")
    assert follower.poll() == 0
    registry.withdraw(stored.id)
    assert follower.poll() == 1
    assert not refuses(policy, "Jane Quickfinger")
    assert len(notes) == 2, "the log is told of changes only"


def test_a_restart_begins_with_what_is_hidden(place):
    registry = place.open()
    registry.request("k", Target(entities=("Jane Quickfinger",)))
    key = registry.guard_key
    registry.close()
    policy, follower = server(place.open())
    assert refuses(policy, "Jane Quickfinger")
    assert follower.poll() == 0
    assert place.open().guard_key == key


def test_what_is_over_is_dropped(local):
    at = [datetime(2026, 11, 28, 12, tzinfo=UTC)]
    registry = local.open(clock=lambda: at[0])
    registry.request("k", Target(entities=("Jane Quickfinger",)), until=at[0] + timedelta(minutes=1))
    policy, follower = server(registry)
    follower.poll()
    assert refuses(policy, "Jane Quickfinger")
    at[0] += timedelta(minutes=1)
    assert follower.poll() == 1
    assert not refuses(policy, "Jane Quickfinger")


def test_one_target_that_cannot_be_taken_in_does_not_keep_the_others_out(local):
    registry = local.open()
    policy, _ = server(registry)

    def add(target):
        if "Bad" in target.entities[0]:
            raise InputError("no")
        policy.add(target)

    follower = Follower(registry, 0, add, policy.drop)
    bad = registry.request("a", Target(entities=("Bad Apple",)))
    registry.request("b", Target(entities=("Jane Quickfinger",)))
    assert follower.poll() == 2
    assert refuses(policy, "Jane Quickfinger")
    assert follower.refused == {bad.id: "InputError"}
    registry.withdraw(bad.id)
    follower.poll()
    assert follower.refused == {}


def test_a_registry_that_fails_is_said_to_and_followed_again(local):
    registry = local.open()
    policy, follower = server(registry, interval=0.02)
    registry.request("a", Target(entities=("Jane Quickfinger",)))
    follower.start()
    until(lambda: refuses(policy, "Jane Quickfinger"))
    with sqlite3.connect(local.where) as connection:
        connection.execute("ALTER TABLE expunge_targets RENAME TO hidden")
    until(lambda: "could not be read" in follower.failing)
    assert refuses(policy, "Jane Quickfinger"), "what is known stays hidden"
    time.sleep(0.1)
    assert follower.age > 0.1
    with sqlite3.connect(local.where) as connection:
        connection.execute("ALTER TABLE hidden RENAME TO expunge_targets")
    registry.request("b", Target(entities=("Omar Longshanks",)))
    until(lambda: refuses(policy, "Omar Longshanks"))
    assert follower.failing == ""
    follower.stop()


def test_a_note_that_failed_is_made_up_for(local):
    registry = local.open()
    tries = []

    def note():
        tries.append(1)
        if len(tries) == 1:
            raise LedgerFailed("full")

    _, follower = server(registry, changed=note)
    registry.request("a", Target(entities=("Jane Quickfinger",)))
    with pytest.raises(LedgerFailed):
        follower.poll()
    assert follower.poll() == 0
    follower.poll()
    assert len(tries) == 2


def test_a_mirror_decrypts_each_target_once(place, monkeypatch):
    at = [datetime(2026, 11, 28, 12, tzinfo=UTC)]
    registry, other = place.open(clock=lambda: at[0]), place.open(clock=lambda: at[0])
    names = [f"Person Number{n}" for n in range(4)]
    ids = [other.request(n, Target(entities=(n,))).id for n in names]
    mirror, opened, real = Mirror(registry), [], registry._opened
    monkeypatch.setattr(registry, "_opened", lambda row: (opened.append(row.id), real(row))[1])
    assert [t.id for t in mirror.active()] == ids
    assert opened == []
    late = other.request("late", Target(entities=("Late Comer",)), until=at[0] + timedelta(hours=1))
    other.withdraw(ids[1])
    assert [t.id for t in mirror.active()] == [ids[0], *ids[2:], late.id] == [t.id for t in registry.active()]
    assert set(opened[: -len(ids)]) == {late.id}
    at[0] += timedelta(hours=1)
    assert [t.id for t in mirror.active()] == [ids[0], *ids[2:]]
    assert other.show(late.id).state == "expired"


def test_jobs_run_on_their_schedule_and_outlive_errors():
    calls, gone = [], threading.Event()

    def job():
        calls.append(time.monotonic())
        if len(calls) == 2:
            raise RuntimeError("Jane Quickfinger")
        if len(calls) == 4:
            gone.set()

    timed = Scheduled(job, 0.02, jitter=0.2)
    timed.start()
    until(lambda: timed.failing == "RuntimeError")
    assert gone.wait(5)
    timed.stop()
    assert timed.failing == ""
    count = len(calls)
    time.sleep(0.1)
    assert len(calls) == count
    assert all(b - a >= 0.015 for a, b in itertools.pairwise(calls))
    late = Scheduled(job, 30, at_once=False)
    late.start()
    late.stop()
    assert len(calls) == count
