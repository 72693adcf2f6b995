"""What Megatron Bridge must know of this package."""


def register() -> None:
    """Register bridges and what saved configs may name; called once, when `megatron.bridge` has been imported.

    Upstream registers a bridge for FalconH1ForCausalLM while it is imported; ours comes after it and wins.
    """
    from megatron.bridge.models.conversion.param_mapping import AutoMapping
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

    from falcon_bridge.compat import patch_missing_helpers_makefile
    from falcon_bridge.compat.optimizer import repair_optimizer_state

    # without it, a saved run_config.yaml that names our classes is refused
    register_allowed_target_prefix("falcon_bridge.")
    AutoMapping.register_module_type("BitNetColumnParallelLinear", "column")
    AutoMapping.register_module_type("BitNetRowParallelLinear", "row")
    patch_missing_helpers_makefile()
    repair_optimizer_state()
    import falcon_bridge.models.falcon_edge.bridge
    import falcon_bridge.models.falcon_h1.bridge  # noqa: F401  they register themselves
