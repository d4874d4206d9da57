"""CURVE keys: their files, and the learner's list of keys that may connect.

A key is a pair. ``NAME.key`` holds its public half and goes to the other side; ``NAME.key_secret``
holds both and stays where it was made, readable by its user only. Both are text files in pyzmq's
certificate format; keys are written in Z85, 40 characters.
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import zmq
from zmq.auth import load_certificate

from protocol.errors import ConfigError

log = logging.getLogger("learner")

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"  # noqa: S105
CHECK_INTERVAL_S = 1.0
_MAX_FILE_BYTES = 1 << 16

_Z85 = frozenset(
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
)

_Listing: TypeAlias = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One side's own key, both halves in Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ActorKeys:
    """An actor's own key, and the public key that the learner must have."""

    own: KeyPair
    learner: str


def create_key(path: Path) -> tuple[Path, Path]:
    """Write a new key as ``PATH.key`` and ``PATH.key_secret``; returns these two.

    Nobody else can read the secret file, from its first moment on. Raises `ConfigError` if either
    exists or cannot be written.
    """
    public_file = path.with_name(path.name + PUBLIC_SUFFIX)
    secret_file = path.with_name(path.name + SECRET_SUFFIX)
    for file in (public_file, secret_file):
        if file.exists():
            raise ConfigError(f"{file} exists; choose another name, a key is never overwritten")
    public, secret = (half.decode() for half in zmq.curve_keypair())
    text = public_key_text(public)
    _create(secret_file, f'{text}    secret-key = "{secret}"\n', 0o600)
    _create(public_file, text, 0o644)
    return public_file, secret_file


def public_key_text(public: str) -> str:
    """Content of a ``.key`` file."""
    return f'curve\n    public-key = "{public}"\n'


def load_key(file: Path) -> KeyPair:
    """Read a ``.key_secret`` file; raises `ConfigError`, also if others may read it."""
    public, secret = _read(file)
    if secret is None:
        raise ConfigError(
            f"{file} holds a public key only; here the secret one is needed ({SECRET_SUFFIX})"
        )
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"others may read the secret key (mode {mode:04o}): chmod 600 {file}")
    try:
        matches = zmq.curve_public(secret.encode()).decode() == public
    except (ValueError, zmq.ZMQError):
        matches = False
    if not matches:
        raise ConfigError(f"{file} is damaged: its two halves do not belong together")
    return KeyPair(public, secret)


def load_public_key(file: Path) -> str:
    """Read a ``.key`` file; raises `ConfigError`, also for a secret one in its place."""
    public, secret = _read(file)
    if secret is not None:
        raise ConfigError(
            f"{file} holds a secret key, which is not for the other side; give the public one "
            f"({PUBLIC_SUFFIX})"
        )
    return public


def load_actor_keys(key: Path | None, learner_key: Path | None) -> ActorKeys | None:
    """The keys that an actor's command line names; None without any. Raises `ConfigError`."""
    if key is None and learner_key is None:
        return None
    if key is None or learner_key is None:
        raise ConfigError(
            "give both or none: --key (this actor's .key_secret) and --learner-key (the "
            "learner's .key)"
        )
    return ActorKeys(load_key(key), load_public_key(learner_key))


class AllowList:
    """The public keys in a folder's ``.key`` files, which may come and go.

    A change counts within `CHECK_INTERVAL_S`. It fails closed: a file that cannot be read allows
    nobody, and neither does a folder that cannot be listed.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._next_look = clock()
        self._listing: _Listing | None = ()
        self._keys: frozenset[str] = frozenset()

    def __len__(self) -> int:
        self._look()
        return len(self._keys)

    def allows(self, public: str) -> bool:
        """Whether a key, in Z85, is listed."""
        self._look()
        return public in self._keys

    def _look(self) -> None:
        """Read the files again if the folder changed, but do not look at it all the time."""
        if self._clock() < self._next_look:
            return
        self._next_look = self._clock() + CHECK_INTERVAL_S
        listing = self._list()
        if listing != self._listing:
            self._listing = listing
            self._keys = frozenset(self._load(name) for name, *_ in listing or ()) - {""}

    def _list(self) -> _Listing | None:
        """Name, inode, time and size of each key file; None if the folder cannot be listed."""
        listing = []
        try:
            for file in os.scandir(self._folder):
                # One that vanishes while we look was withdrawn.
                with contextlib.suppress(FileNotFoundError):
                    if file.name.endswith(PUBLIC_SUFFIX) and file.is_file():
                        status = file.stat()
                        listing.append(
                            (file.name, status.st_ino, status.st_mtime_ns, status.st_size)
                        )
        except OSError as error:
            if self._listing is not None:
                log.error("nobody may connect: cannot list %s: %s", self._folder, error.strerror)
            return None
        return tuple(sorted(listing))

    def _load(self, name: str) -> str:
        """A file's key, empty if it has none."""
        try:
            return load_public_key(self._folder / name)
        except ConfigError as error:
            log.warning("a key file that allows nobody: %s", error)
            return ""


def _create(file: Path, text: str, mode: int) -> None:
    try:
        # O_EXCL: nobody's file or link is written through, and the mode holds from the start.
        with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w") as output:
            output.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


def _read(file: Path) -> tuple[str, str | None]:
    """Public and, if it is there, secret half; raises `ConfigError`."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{file} is no key file; make one with: gdpo keygen")
        public, secret = load_certificate(file)
    except OSError as error:
        raise ConfigError(f"cannot read the key {file}: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{file} is no key file; make one with: gdpo keygen") from error
    for half in (public, secret):
        if half is not None and not _is_z85(half):
            raise ConfigError(f"{file} is damaged: a key has 40 characters of Z85")
    return public.decode(), secret.decode() if secret is not None else None


def _is_z85(half: bytes) -> bool:
    return len(half) == 40 and half.isascii() and all(c in _Z85 for c in half)
