"""How much a generation keeps on the broker, and whether that is too much. Pure."""

from collections.abc import Callable, Mapping

from cloud.repository import Generation
from shoal.errors import ModelError
from shoal.release.chunks import manifest_of


def retained_blobs(generation: Generation, load: Callable[[bytes], bytes]) -> dict[bytes, int]:
    """Every blob of a generation and its length: metadata, plans, specs and artefacts, in chunks.

    Equal ones are one. The bundle and the timestamp come on top: at most one message each.

    Args:
        generation: published, or about to be.
        load: returns a target's bytes by its digest.
    """
    files = [*generation.files().values()]
    files += [load(bytes.fromhex(info.hashes["sha256"])) for info in generation.targets().values()]
    manifests = [manifest_of(data) for data in files]
    return {item: found.length_of(index) for found in manifests for index, item in enumerate(found.digests)}


def check_budget(before: Mapping[bytes, int], after: Mapping[bytes, int], budget_bytes: int) -> None:
    """Refuse a release that keeps more than the budget on the broker, if only until it is complete.

    New blobs are published before old ones are cleared, so both count. What makes nothing grow is never refused: a
    budget that was made smaller must not keep anybody from taking releases back.

    Raises:
        ModelError: with what there would be and what there may be.
    """
    peak = sum({**before, **after}.values())
    if peak > budget_bytes and sum(after.values()) > sum(before.values()):
        raise ModelError(
            f"{peak} bytes would be retained while this is published ({sum(after.values())} after it, "
            f"{sum(before.values())} now), the budget is {budget_bytes}: raise retained_budget_bytes, "
            "or end plans that keep old releases alive"
        )
