"""The gateway. `Deploy` is loaded when it is first asked for: importing the package alone stays light."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_gateway.deploy import Deploy as Deploy


def __getattr__(name: str) -> object:
    if name == "Deploy":
        from edge_gateway.deploy import Deploy  # noqa: PLC0415

        return Deploy
    raise AttributeError(name)
