"""The shipped `cloud` profile with real certificates and the plugin; and that the judge sees what it is there for."""

from pathlib import Path

import pytest

from fleet_console.broker import find_mosquitto
from tests.campaigns import acl_matrix
from tests.campaigns.acl_matrix import PROFILE, run

if find_mosquitto() is None or next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"), None) is None:
    pytest.skip("left out: permissions need Mosquitto with its dynamic security plugin", allow_module_level=True)

# paho leaves the socket of a TLS handshake that failed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_everybody_may_do_what_the_contract_says_and_nothing_else(tmp_path):
    """Hundreds of rights, both ways, and everybody who must stay out."""
    checks = run(tmp_path)
    assert [what for what, granted, wanted in checks if granted != wanted] == []
    assert len(checks) > 900
    assert 60 < sum(wanted for *_, wanted in checks) < len(checks) / 2


def test_line_of_the_profile_is_missed(tmp_path, monkeypatch):
    """Without it a device may take another's session: the plugin compares client ids only where there are passwords."""
    profile = tmp_path / "cloud.conf"
    profile.write_text(PROFILE.read_text().replace("use_username_as_clientid true", ""))
    monkeypatch.setattr(acl_matrix, "PROFILE", profile)
    monkeypatch.setattr(acl_matrix, "table_checks", lambda _: [])
    monkeypatch.setattr(acl_matrix, "device_checks", lambda _: [])
    wrong = [what for what, granted, wanted in run(tmp_path) if granted != wanted]
    assert wrong == ["cam-1 takes the session of cam-2 by its client id"]


@pytest.mark.parametrize("name", ["site", "cloud"])
def test_profiles_agree_with_the_code(name):
    """The packet limit lets the largest payload through; nobody is anonymous; every listener asks for a certificate."""
    from shoal.codec import MAX_PAYLOAD_BYTES  # noqa: PLC0415

    lines = (PROFILE.parent / f"{name}.conf").read_text().splitlines()
    settings = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    assert int(settings["max_packet_size"]) >= MAX_PAYLOAD_BYTES + 100_000
    assert (settings["allow_anonymous"], settings["set_tcp_nodelay"]) == ("false", "true")
    listeners = sum(line.startswith("listener ") for line in lines)
    for setting in ("require_certificate true", "use_identity_as_username true", "tls_version tlsv1.2"):
        assert lines.count(setting) == listeners
    assert any(line.startswith("crlfile ") for line in lines)
