"""Where a run's metrics go besides its own report: TensorBoard, Weights & Biases, MLflow, Comet."""

from importlib.util import find_spec
from typing import Any

from falcon_bridge.errors import UserError


# the fields that turn a logger on, the one that must name the run, the package
_LOGGERS = {
    "Weights & Biases": (("wandb_project",), "wandb_exp_name", "wandb"),
    "MLflow": (
        ("mlflow_experiment", "mlflow_run_name", "mlflow_tracking_uri", "mlflow_tags", "mlflow_description"),
        "mlflow_run_name",
        "mlflow",
    ),
    "Comet": (
        ("comet_project", "comet_experiment_name", "comet_workspace", "comet_api_key", "comet_tags"),
        "comet_experiment_name",
        "comet_ml",
    ),
}


def check_loggers(cfg: Any) -> None:
    """Refuse a logger that is not installed or has no name for the run: Megatron Bridge finds out after the set-up.

    Args:
        cfg: a ``ConfigContainer``.

    Raises:
        UserError: with the override or the package that is missing.
    """
    for title, (fields, name, package) in _LOGGERS.items():
        given = [field for field in fields if getattr(cfg.logger, field, None)]
        if not given:
            continue
        if find_spec(package) is None:
            raise UserError(
                f"logger.{given[0]} is for {title}, and the package {package} is not installed: install it (pip "
                f"install {package.replace('_', '-')}), or unset logger.{given[0]}"
            )
        if not getattr(cfg.logger, name, None):
            raise UserError(f"logger.{given[0]} is for {title}, which needs a name for the run: set logger.{name}")


def active_loggers(cfg: Any) -> list[str]:
    """Names of the loggers in force, for people, with where they write where that is on this machine."""
    tensorboard = [f"TensorBoard in {cfg.logger.tensorboard_dir}"] if cfg.logger.tensorboard_dir else []
    return tensorboard + [title for title, (fields, _, _) in _LOGGERS.items() if getattr(cfg.logger, fields[0], None)]
