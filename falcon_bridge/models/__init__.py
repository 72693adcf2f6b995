"""Models. Importing Megatron Bridge registers ours, which must not happen halfway through one: so it comes first."""

import megatron.bridge  # noqa: F401
