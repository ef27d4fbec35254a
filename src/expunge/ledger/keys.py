"""Keys: one that opens all others, a folder of keys that can be destroyed one by one, and the pair that signs.

What is encrypted under a key of its own is gone, from every copy, when that key is destroyed ("crypto-shredding"). That holds
only where copies do not hold the key: keys stand in a folder of their own, apart from the database and from the log, and **that
folder must not be backed up together with them** for longer than a deletion may take.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from expunge.core.errors import InputError, MissingExtra
from expunge.ledger.errors import LedgerFailed, Shredded, no_room

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError:  # pragma: no cover
    raise MissingExtra("The ledger", "serve") from None

#: Environment variable that may hold the master key, in Base64.
VARIABLE = "EXPUNGE_MASTER_KEY"

_SIZE = 32  # bytes of a key: AES-256
_NONCE = 12
_MAGIC = b"EXK1"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,119}")


def sealed(key: bytes, data: bytes, bound: bytes) -> bytes:
    """Encrypt by AES-256-GCM under a nonce of its own; ``bound`` must be the same for :func:`opened`."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, data, bound)


def opened(key: bytes, data: bytes, bound: bytes) -> bytes:
    """What was sealed.

    Raises:
        ValueError: the key is another one, or the data have been changed.
    """
    try:
        return AESGCM(key).decrypt(data[:_NONCE], data[_NONCE:], bound)
    except (InvalidTag, ValueError):
        raise ValueError("another key, or changed data") from None


class MasterKey:
    """The key under which all others are kept.

    Args:
        key: 32 bytes.

    Raises:
        InputError: it is shorter or longer.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _SIZE:
            raise InputError(f"The master key has {len(key)} bytes; it must have {_SIZE}.", "Make one: openssl rand -base64 32.")
        self._key = key

    def __repr__(self) -> str:
        return "MasterKey(...)"

    @classmethod
    def from_file(cls, path: Path) -> MasterKey:
        """From a file that only its owner may read; one that is not there is made.

        Raises:
            InputError: others may read it, or it holds no key.
        """
        if not path.exists():
            create_private(path, base64.b64encode(secrets.token_bytes(_SIZE)) + b"\n")
        return cls(_decoded(read_private(path), str(path)))

    @classmethod
    def from_environment(cls, variable: str = VARIABLE) -> MasterKey:
        """From an environment variable.

        Raises:
            InputError: it is not set, or holds no key.
        """
        text = os.environ.get(variable, "")
        if not text:
            raise InputError(f"The environment variable {variable} is not set.", "Put the master key there, in Base64.")
        return cls(_decoded(text.encode(), variable))

    def wrap(self, key: bytes, name: str) -> bytes:
        """A key under this one, bound to its name."""
        return _MAGIC + sealed(self._key, key, b"expunge key\0" + name.encode())

    def unwrap(self, data: bytes, name: str) -> bytes:
        """The key that was wrapped.

        Raises:
            ValueError: it was wrapped under another key or name, or has been changed.
        """
        if not data.startswith(_MAGIC):
            raise ValueError("no wrapped key")
        return opened(self._key, data[len(_MAGIC) :], b"expunge key\0" + name.encode())


def _decoded(data: bytes, where: str) -> bytes:
    try:
        return base64.b64decode(data.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where} holds no key in Base64.", "Make one: openssl rand -base64 32.") from None


def read_private(path: Path) -> bytes:
    """A file that only its owner may use.

    Raises:
        InputError: others may, too.
    """
    if os.name == "posix" and (mode := path.stat().st_mode & 0o077):
        raise InputError(f"Others than its owner may use {str(path)!r} (mode {mode:o} too many).", f"chmod 600 {path}")
    return path.read_bytes()


def create_private(path: Path, data: bytes) -> bool:
    """Make a file that only its owner may read, whole or not at all; whether it was made here and not by another."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)  # unlike a rename it never replaces what another process has made meanwhile
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True
    finally:
        with suppress(FileNotFoundError):
            scratch.unlink()


def sync_folder(folder: Path) -> None:
    """Ask the disk to hold the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


class KeyStore:
    """Keys by name, each in a file of its own under the master key, so that each can be destroyed alone.

    Several processes may use one folder.

    Args:
        folder: made if it is not there, for its owner alone.
        master: what the keys are wrapped under.
    """

    def __init__(self, folder: Path, master: MasterKey) -> None:
        self.folder, self._master = folder, master
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"no name of a key: {name!r}")
        return self.folder / f"{name}.key"

    def make(self, name: str) -> bytes:
        """The key of a name, which is made if it is not there yet.

        Raises:
            LedgerFailed: it cannot be written.
            InputError: it is there and was wrapped under another master key.
        """
        key = secrets.token_bytes(_SIZE)
        try:
            made = create_private(self._path(name), self._master.wrap(key, name))
        except OSError as error:
            raise LedgerFailed(
                f"A key could not be written in {str(self.folder)!r}: {error.strerror}.", "Free some room.", full=no_room(error)
            ) from None
        return key if made else self.get(name)

    def get(self, name: str) -> bytes:
        """The key of a name.

        Raises:
            Shredded: there is none, or none any more.
            InputError: it was wrapped under another master key, or has been changed.
        """
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            raise Shredded(
                f"There is no key {name!r} in {str(self.folder)!r}.", "It was destroyed, or the folder is another."
            ) from None
        try:
            return self._master.unwrap(data, name)
        except ValueError:
            raise InputError(
                f"The key {name!r} in {str(self.folder)!r} does not open under this master key.", "Give the one it was made with."
            ) from None

    def drop(self, name: str) -> bool:
        """Destroy a key: its file is written over, then removed; whether it was there.

        On a disk that writes elsewhere than it is told (solid state, snapshots) the old content may stay where no file system
        leads to; it is still under the master key there.
        """
        path = self._path(name)
        try:
            with path.open("r+b") as file:
                file.write(secrets.token_bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
        except FileNotFoundError:
            return False
        sync_folder(self.folder)
        return True

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names of the keys that are there, in order."""
        for path in sorted(self.folder.glob("*.key")):
            if path.stem.startswith(prefix) and not path.name.startswith("."):
                yield path.stem

    def rewrap(self, master: MasterKey) -> int:
        """Put all keys under another master key; how many. One that is under it already is left: a second try goes on.

        Raises:
            InputError: a key opens under neither.
        """
        count = 0
        for name in self.names():
            path = self._path(name)
            try:
                master.unwrap(path.read_bytes(), name)
                continue
            except ValueError:
                key = self.get(name)
            scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
            create_private(scratch, master.wrap(key, name))
            os.replace(scratch, path)
            count += 1
        sync_folder(self.folder)
        self._master = master
        return count


def mac(key: bytes, purpose: str, *parts: bytes) -> bytes:
    """HMAC-SHA256 of parts under a key, for one purpose; each part follows its length, so that none runs into the next."""
    made = hmac.new(key, digestmod=hashlib.sha256)
    for part in (purpose.encode(), *parts):
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.digest()


class Signer:
    """The private half of a pair that signs (Ed25519).

    Args:
        path: file that only its owner may read; one that is not there is made, and beside it ``NAME.pub`` for auditors.

    Raises:
        InputError: others may read the file, or it holds no such key.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            fresh = Ed25519PrivateKey.generate()
            kind = serialization.PrivateFormat.PKCS8
            create_private(path, fresh.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
        try:
            key = serialization.load_pem_private_key(read_private(path), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{str(path)!r} holds no private Ed25519 key.", "Name a file that is not there: it is made.")
        self._key = key
        self.public = Public(key.public_key())
        beside = path.with_name(path.name + ".pub")
        if not beside.exists():
            create_private(beside, self.public.pem)

    def sign(self, data: bytes) -> str:
        """The signature, in Base64."""
        return base64.b64encode(self._key.sign(data)).decode()


class Public:
    """The public half: what an auditor has."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def read(cls, path: Path) -> Public:
        """From a PEM file.

        Raises:
            InputError: it holds no public Ed25519 key.
        """
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (ValueError, OSError):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise InputError(f"{str(path)!r} holds no public Ed25519 key.", "Give the .pub file of the server's key.")
        return cls(key)

    @property
    def pem(self) -> bytes:
        """As a file."""
        return self._key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the 32 bytes of the key."""
        raw = self._key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return hashlib.sha256(raw).hexdigest()

    def holds(self, data: bytes, signature: str) -> bool:
        """Whether a signature in Base64 is one of this key over these data, and spelt in the only way."""
        try:
            raw = base64.b64decode(signature, validate=True)
            if base64.b64encode(raw).decode() != signature:  # unused bits of the last letter
                return False
            self._key.verify(raw, data)
        except (InvalidSignature, ValueError, TypeError):
            return False
        return True
