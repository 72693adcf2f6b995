from tests.unit.models.falcon_h1.conftest import one_rank, process_groups  # noqa: F401
