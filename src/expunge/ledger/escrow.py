"""A small random sample of requests in full, for an auditor's eyes alone, for a short time.

Each is encrypted to the auditor's public key (X25519 with a key pair that is made for it and thrown away, HKDF-SHA256,
AES-256-GCM): the server cannot read back what it has put there. The record in the log names the digest of the box, so that a box
that was left out or exchanged is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field

from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.ledger.canonical import canonical, now
from expunge.ledger.errors import LedgerFailed, no_room
from expunge.ledger.keys import create_private, opened, read_private, sealed

if TYPE_CHECKING:
    from expunge.guards.conversation import Conversation

_PURPOSE = b"expunge escrow 1"
_TIME = "%Y%m%dT%H%M%SZ"
_NAME = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{32}\.box")
_PAD = 1024  # boxes come in multiples, so that their size tells little of what is in them


def make_auditor_key(path: Path) -> Path:
    """Make an auditor's key pair where the auditor is: the private half in a file for its owner alone; path of the public half.

    Raises:
        InputError: the file is there already.
    """
    key = X25519PrivateKey.generate()
    pem, private, public = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.PublicFormat
    if not create_private(path, key.private_bytes(pem, private, serialization.NoEncryption())):
        raise InputError(f"{str(path)!r} is there already.", "Choose another name: a key that is written over opens nothing.")
    beside = path.with_name(path.name + ".pub")
    beside.write_bytes(key.public_key().public_bytes(pem, public.SubjectPublicKeyInfo))
    return beside


class EscrowSettings(Settings):
    """Which requests are kept in full for an auditor."""

    name: ClassVar[str] = "escrow"

    auditor: str = Field(description="file with the auditor's public key")
    share: float = Field(0.001, gt=0, le=1, description="of all requests, drawn at random")
    keep_days: float = Field(7, gt=0, description="days after which a box is removed")


class Escrow:
    """Puts requests into boxes.

    Args:
        folder: where they stand.
        public: the auditor's public key, a PEM file.
        share: how many requests of all, in (0, 1].
        keep: how long a box is kept.
        clock: what time it is.

    Raises:
        InputError: no such key, or a share out of range.
    """

    def __init__(
        self, folder: Path, public: Path, *, share: float = 0.001, keep: timedelta, clock: Callable[[], datetime] = now
    ) -> None:
        if not 0 < share <= 1:
            raise InputError(f"The share of requests in escrow is {share}; it must be in (0, 1].", "Give 0.001 for one in 1000.")
        try:
            key = serialization.load_pem_public_key(public.read_bytes())
        except (ValueError, OSError):
            key = None
        if not isinstance(key, X25519PublicKey):
            raise InputError(f"{str(public)!r} holds no public key of an auditor.", "Give the .pub file of make_auditor_key.")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder, self._public, self.share, self.keep, self._clock = folder, key, share, keep, clock

    def drawn(self) -> bool:
        """Whether the next request is of the sample: by chance that nobody can foresee."""
        return secrets.randbelow(1 << 53) < self.share * (1 << 53)

    def put(self, record: str, conversation: Conversation, answer: str | None) -> str:
        """Put a request into a box; its SHA-256.

        Raises:
            LedgerFailed: it could not be kept.
        """
        said = {"record": record, "messages": [[m.role, m.content] for m in conversation.messages], "answer": answer}
        data = canonical(said)
        once = X25519PrivateKey.generate()
        key = _shared(once, self._public, once.public_key())
        raw = once.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        box = raw + sealed(key, data + b" " * (-len(data) % _PAD), _PURPOSE)
        try:
            create_private(self.folder / f"{self._clock().astimezone(UTC).strftime(_TIME)}-{record}.box", box)
        except OSError as error:
            why = f"A box could not be kept in {str(self.folder)!r}: {error.strerror}."
            raise LedgerFailed(why, "Free some room.", full=no_room(error)) from None
        return hashlib.sha256(box).hexdigest()

    def take_back(self, record: str) -> None:
        """Remove the box of a request whose record could not be written: nothing in the log would name it."""
        for path in self.folder.glob(f"*-{record}.box"):
            path.unlink(missing_ok=True)

    def destroy_old(self) -> int:
        """Remove the boxes that have been kept for long enough; how many."""
        count = 0
        for path in sorted(self.folder.iterdir()):
            found = _NAME.fullmatch(path.name)
            if found and datetime.strptime(found[1], _TIME).replace(tzinfo=UTC) + self.keep <= self._clock():
                path.unlink(missing_ok=True)
                count += 1
        return count


def _shared(private: X25519PrivateKey, public: X25519PublicKey, once: X25519PublicKey) -> bytes:
    raw = once.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return HKDF(hashes.SHA256(), 32, raw, _PURPOSE).derive(private.exchange(public))


def open_box(path: Path, private: Path) -> tuple[dict[str, Any], str]:
    """What an auditor finds in a box: ``record`` (id), ``messages`` (role and content), ``answer``; and the box's SHA-256.

    Raises:
        InputError: the key is another auditor's, or the box was changed.
    """
    key = serialization.load_pem_private_key(read_private(private), None)
    if not isinstance(key, X25519PrivateKey):
        raise InputError(f"{str(private)!r} holds no private key of an auditor.", "Give the file of make_auditor_key.")
    box = path.read_bytes()
    try:
        once = X25519PublicKey.from_public_bytes(box[:32])
        held = json.loads(opened(_shared(key, once, once), box[32:], _PURPOSE))
    except ValueError:
        raise InputError(f"The box {path.name} does not open.", "It was made for another auditor, or changed.") from None
    return held, hashlib.sha256(box).hexdigest()
