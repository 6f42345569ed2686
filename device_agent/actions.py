"""What a device does on command. `CommandDesk` has seen to it that no command is retained, expired or done twice."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from device_agent.device import Device
from device_agent.logs import LEVELS
from shoal.commands import Action
from shoal.errors import PayloadError
from shoal.release.client import UpdateClient
from shoal.v1 import command_pb2 as pb

log = logging.getLogger(__name__)


class Actions:
    """A device's actions beside `report_state`.

    Args:
        restart: ends the process soon, for its service to start it again.
    """

    def __init__(self, device: Device, updates: UpdateClient, restart: Callable[[], None]) -> None:
        self._device = device
        self._updates = updates
        self._restart = restart

    def table(self) -> Mapping[str, Action]:
        """By the names of `Command.action`."""
        return {
            "rebirth": self._rebirth,
            "set_log_level": self._set_log_level,
            "set_policy": self._set_policy,
            "snapshot": self._snapshot,
            "drop_release": self._drop_release,
            "restart": self._restart_soon,
            "report_metrics": self._report_metrics,
        }

    def _rebirth(self, _: pb.Rebirth) -> str:
        self._device.link.announce()
        self._device.report_soon()
        return "presence and state follow"

    def _set_log_level(self, command: pb.SetLogLevel) -> str:
        if command.level not in LEVELS:
            raise PayloadError(f"{command.level!r}, expected one of {', '.join(LEVELS)}", field="level")
        logging.getLogger().setLevel(command.level)
        log.info("log level set level=%s", command.level)
        return f"{command.level} until the process ends"

    def _set_policy(self, command: pb.SetPolicy) -> str:
        allowed = self._device.config.policy
        share = command.max_share if command.HasField("max_share") else allowed.max_share
        if not share <= allowed.max_share:  # NaN too
            raise PayloadError(f"{share}, the settings allow {allowed.max_share}", field="max_share")
        threshold = command.score_threshold if command.HasField("score_threshold") else allowed.score_threshold
        try:
            config = replace(allowed, max_share=share, score_threshold=threshold)
        except ValueError as exc:
            raise PayloadError(str(exc), field="max_share") from exc
        self._device.retune(config)
        return f"max_share {share}, score_threshold {threshold if threshold is not None else 'of the release'}"

    def _snapshot(self, _: pb.Snapshot) -> str:
        self._device.snapshot()
        return "the next reading will be asked"

    def _drop_release(self, command: pb.DropRelease) -> str:
        running = self._device.release
        if command.model != self._device.config.model:
            raise PayloadError(f"{command.model!r} is not the model here", field="model")
        if not running or command.release != running:
            raise PayloadError(f"{command.release} does not run, but {running or 'none'}", field="release")
        self._updates.fail(command.model, f"dropped: {command.reason or 'by command'}")
        return f"release {running} is refused; {self._device.release or 'none'} runs"

    def _restart_soon(self, _: pb.Restart) -> str:
        self._restart()
        return "the process ends; its service starts it again"

    def _report_metrics(self, _: pb.ReportMetrics) -> str:
        return self._device.metrics().decode()
