"""The private names of the packages that only a GPU machine has."""

import inspect

import pytest

from falcon_bridge.compat.upstream import GPU_PACKAGES, PRIVATE, resolve


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [name for name in PRIVATE if PRIVATE[name].path.split(".")[0] in GPU_PACKAGES])
def test_private_name_is_where_the_table_says(name):
    private = PRIVATE[name]
    found = resolve(name)
    assert private.mentions is None or private.mentions in inspect.getsource(found)
