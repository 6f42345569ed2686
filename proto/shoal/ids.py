"""Names that travel in topics."""

import re
from functools import lru_cache

from shoal.errors import PayloadError

# AWS IoT Core, the narrowest broker we know, allows 128 bytes of client id; 63 is also what a DNS label allows.
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


# Pure, and asked several times for every message; bounded, because senders choose what is remembered.
@lru_cache(maxsize=4096)
def parse_id(text: str, field: str) -> str:
    """Return `text` when it is a valid node, site, service or model id.

    Raises:
        PayloadError: it is not; `field` is named.
    """
    if not _ID.fullmatch(text):
        raise PayloadError(f"{text!r} is not an id ([a-z0-9][a-z0-9_-]{{0,62}})", field=field)
    return text
