"""One gloo rank for the modules of this folder that build models."""

from tests.unit.models.falcon_h1.conftest import one_rank, process_groups  # noqa: F401
