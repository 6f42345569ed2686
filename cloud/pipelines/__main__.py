"""One run, as a process of its own: the trainer starts it; killed, it is started again and goes on.

python -m cloud.pipelines --config cloud.toml --model digits --reason "200 new labels"
"""

import argparse
import logging
import sys
from pathlib import Path

from cloud.pipelines.command import load_model_pipeline, opened_engine, stopping_on_signals
from cloud.pipelines.engine import LoggedProgress, StoppedError
from cloud.settings import CloudSettings
from shoal.config import load_config
from shoal.errors import ConfigError, ShoalError

log = logging.getLogger(__name__)

_REFUSED = 2
# EX_TEMPFAIL of sysexits.h: start it again and it goes on.
_STOPPED = 75


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloud.pipelines", description="Make one release of a model.")
    parser.add_argument("--config", type=Path, required=True, help="the cloud's TOML file, see docs/cloud.md")
    parser.add_argument("--model", required=True, help="the model's name in that file")
    parser.add_argument("--reason", default="asked for", help="for the registry (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = load_config(options.config, CloudSettings)
        model = settings.model(options.model)
        if model is None or not model.pipeline:
            raise ConfigError(f"{options.config} has no pipeline for model {options.model!r}")
        pipeline = load_model_pipeline(model)
        with (
            stopping_on_signals(),
            opened_engine(settings, Path(model.pipeline), pipeline, LoggedProgress(model.name)) as engine,
        ):
            run = engine.run(options.reason)
    except StoppedError as exc:
        log.warning("run stopped model=%s reason=%s", options.model, exc)
        return _STOPPED
    except ShoalError as exc:
        log.error("run refused model=%s reason=%s", options.model, exc)  # noqa: TRY400  the reason says it all
        return _REFUSED
    log.info("run done model=%s release=%d run=%s", options.model, run.release, run.id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
