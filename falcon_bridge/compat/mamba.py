"""Megatron's Mamba mixer where mamba-ssm is not installed."""

from contextlib import contextmanager
from unittest import mock


def have_mamba_ssm() -> bool:
    """Whether Megatron's Mamba mixer found mamba-ssm's kernels."""
    from megatron.core.ssm import mamba_mixer

    return mamba_mixer.HAVE_MAMBA_SSM


@contextmanager
def mamba_ssm_optional():
    """Let `MambaMixer.__init__` run without mamba-ssm.

    Its constructor refuses to run without the kernels although it does not call them; what replaces them in forward is
    the caller's business. Nothing changes where mamba-ssm is installed.
    """
    from megatron.core.ssm import mamba_mixer

    with mock.patch.object(mamba_mixer, "HAVE_MAMBA_SSM", True):
        yield
