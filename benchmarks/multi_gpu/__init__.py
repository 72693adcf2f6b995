"""Parity, checkpoints and throughput on several GPUs of one machine; see __main__.py."""
