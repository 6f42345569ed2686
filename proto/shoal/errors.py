"""Every error Shoal raises on purpose, by who must react.

Misuse by our own code is `ValueError` or `RuntimeError` and is never caught.
"""

# 256 rows with a message each must fit one reply.
MAX_MESSAGE_CHARS = 300


class ShoalError(Exception):
    """The root of them all; caught only where a role reports to people."""


class PayloadError(ShoalError):
    """A peer sent bytes that cannot be used: count it, answer it, go on.

    The message goes back to that peer and may quote it, so it is cut at `MAX_MESSAGE_CHARS`.

    Attributes:
        field: path of the offending field, as the schema spells it; empty when the whole message is at fault.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__((f"{field}: {message}" if field else message)[:MAX_MESSAGE_CHARS])
        self.field = field


class LinkError(ShoalError):
    """The transport failed or refused: back off and retry, unless the refusal is permanent.

    Attributes:
        permanent: the broker would refuse the same message again: quarantine it.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ModelError(ShoalError):
    """An artefact or release is refused: keep the old model and report."""


class TrustError(ModelError):
    """Signed metadata is missing, forged, stale or inconsistent: keep what runs."""


class ConfigError(ShoalError):
    """The operator must change something: one line, exit 2."""
