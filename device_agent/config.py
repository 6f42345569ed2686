"""What one device is told, whether it runs alone or among thousands in a simulator."""

from dataclasses import dataclass, field

from device_agent.change import ChangeSettings, DeadBandSettings
from device_agent.policy import PolicyConfig
from device_agent.runtime import RuntimeKind


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device's settings; see docs/device.md.

    Attributes:
        answer_within_ms: how long the application waits for the gateway's answer; 0 is no hurry.
        retry_after_s: a question without a reply is asked again after this; also its message expiry.
        linger_s: questions wait this long for company in one message.
        max_rows: of one message.
    """

    site: str
    node: str
    model: str
    change: ChangeSettings = field(default_factory=DeadBandSettings)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    answer_within_ms: int = 0
    retry_after_s: float = 10.0
    linger_s: float = 0.0
    max_rows: int = 32
    state_interval_s: float = 60.0
    runtime: RuntimeKind = RuntimeKind.AUTO
