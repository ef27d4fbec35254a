"""Asks for targets and withdraws some until it is killed; says each thing on its output once it was acknowledged."""

import os
import resource
import sys
from pathlib import Path

from expunge.core.errors import ExpungeError
from expunge.guards.target import Target
from expunge.ledger.keys import KeyStore, MasterKey
from expunge.ledger.registry import Registry


def say(*words):
    os.write(1, (" ".join(words) + "\n").encode())


def main(where, folder, prefix, count, limit):
    base = Path(folder)
    registry = Registry(where, KeyStore(base / "keys", MasterKey.from_file(base / "master.key")))
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    say("ready")
    sys.stdin.readline()
    for at in range(int(count)):
        key = f"{prefix}-{at}"
        try:
            stored = registry.request(key, Target(entities=(f"Secretname {key}",)), f"because of {key}")
            say("asked", key, stored.id)
            if at % 3 == 2:
                registry.withdraw(stored.id)
                say("withdrawn", key, stored.id)
        except ExpungeError as error:
            say("failed", key, type(error).__name__, str(error).replace("\n", " "))
            break
    say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
