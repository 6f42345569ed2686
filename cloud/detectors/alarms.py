"""From scores to alarms. Pure."""


class Alarms:
    """Raises an alarm when a score reaches the threshold, then none for a dead time. Never reads a clock.

    An anomaly is one event of many readings: without a dead time each of them is an alarm, and most of what a person
    gets is a repetition.

    Args:
        threshold: the least score that is an alarm.
        dead_time: readings after an alarm in which there is no other.
    """

    def __init__(self, threshold: float, dead_time: int) -> None:
        if dead_time < 0:
            raise ValueError(f"dead_time {dead_time} must not be negative")
        self._threshold = threshold
        self._dead_time = dead_time
        self._silent = 0

    def update(self, score: float) -> bool:
        """Take the next reading's score; return whether it is an alarm."""
        if self._silent:
            self._silent -= 1
            return False
        if score < self._threshold:
            return False
        self._silent = self._dead_time
        return True
