"""Tuned launch configurations of mamba-ssm's Triton kernels, shipped so that a first step does not time them all."""
