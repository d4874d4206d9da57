"""The errors of the system, except plain ``ValueError`` from pure functions.

AsyncGdpoError
├── ConfigError          what the user wrote (configuration, command line, data)
├── ProtocolError
│   ├── BadMessage       a peer sent bytes that are no valid message
│   ├── CollectiveError  a broadcast between several processes did not come about, or broke off
│   └── Refused          the other side refused us, and says why
├── PeerLost             the other side is unreachable, or silent for too long
├── EngineError          the inference engine failed
├── RewardError          a reward function raised, hung or returned nonsense
└── TrainingError        training cannot continue (non-finite loss, nothing left to train on)

The command line prints the message of any of these as one line and exits non-zero; every other
exception is a bug and keeps its stack trace.
"""


class AsyncGdpoError(Exception):
    """Root of the tree; catching it catches everything foreseen."""


class ConfigError(AsyncGdpoError, ValueError):
    """The user's configuration, command line or data is wrong; the text says what to change."""


class ProtocolError(AsyncGdpoError):
    """Something went wrong between two processes."""


class BadMessage(ProtocolError):
    """A peer sent frames that are not a valid message. Never trained on, never a crash."""


class CollectiveError(ProtocolError):
    """A member of a collective is gone or late, which ends it for all members."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        """``missing`` are the ranks that did not come, if that is what went wrong."""
        super().__init__(message)
        self.missing = missing


class Refused(ProtocolError):
    """The other side refused what we asked for."""


class PeerLost(ProtocolError):
    """The other side did not answer within its deadline."""


class EngineError(AsyncGdpoError):
    """The inference engine cannot generate."""


class RewardError(AsyncGdpoError):
    """A reward function could not be loaded, or failed on a group."""


class TrainingError(AsyncGdpoError):
    """Training cannot continue; the run ends with a non-zero exit."""


def brief(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, not too long to be shown or sent; its type if empty."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return one_line(line, limit)


def one_line(text: str, limit: int = 300) -> str:
    """A peer's text made fit for a log: short, with whatever does not print escaped."""
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
