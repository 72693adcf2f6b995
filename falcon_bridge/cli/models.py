"""The verb ``models``: the sizes there are."""

from types import ModuleType
from typing import Any

from falcon_bridge.cli.session import DebugOption, JsonOption, session
from falcon_bridge.cli.tables import parameters


_ORDER = ["provider", "parameters", "TP", "layers", "context", "hidden", "MLP", "attention heads", "vocabulary"]
_SSM_ORDER = [*_ORDER[:-1], "SSM heads", "state", "vocabulary"]


def models(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the released sizes: shape, parameters, context and the tensor-parallel sizes that their heads allow.

    All figures come from the provider classes.

    [bold]Example[/bold]

    falcon-bridge models
    """
    with session(json, debug) as current:
        with current.status("importing Megatron, up to 30 s"):
            families = {
                family: [_row(name, provider) for name, provider in providers]
                for family, providers in _families().items()
            }
        for family, rows in families.items():
            columns = _columns(rows)
            current.show_table(
                family, columns, order=_SSM_ORDER if "SSM heads" in columns else _ORDER, left={"provider"}
            )
        current.finish({"ok": True, "models": [row for rows in families.values() for row in rows]})


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    ssm = {}
    if "ssm_heads" in rows[0]:
        ssm = {
            "SSM heads": [f"{row['ssm_heads']} × {row['ssm_head_dim']}" for row in rows],
            "state": [f"{row['ssm_groups']} × {row['ssm_state']}" for row in rows],
        }
    return {
        "provider": [row["provider"] for row in rows],
        "parameters": [parameters(row["parameters"]) for row in rows],
        "layers": [str(row["layers"]) for row in rows],
        "hidden": [str(row["hidden_size"]) for row in rows],
        "MLP": [str(row["ffn_hidden_size"]) for row in rows],
        "attention heads": [f"{row['attention_heads']} × {row['head_dim']} (KV {row['kv_heads']})" for row in rows],
        **ssm,
        "vocabulary": [f"{row['vocab_size']:,}{' (tied)' if row['tied'] else ''}" for row in rows],
        "context": [f"{row['context'] // 1024}k" for row in rows],
        "TP": [", ".join(map(str, row["tp"])) for row in rows],
    }


def _families() -> dict[str, list[tuple[str, Any]]]:
    """The released sizes of each family: class names and providers."""
    import megatron.bridge  # noqa: F401 (before our providers)

    from falcon_bridge.models.falcon_edge import sizes as falcon_edge
    from falcon_bridge.models.falcon_h1 import sizes as falcon_h1

    return {"Falcon-H1": _providers(falcon_h1), "Falcon-Edge (BitNet b1.58)": _providers(falcon_edge)}


def _providers(sizes: ModuleType) -> list[tuple[str, Any]]:
    classes = [cls for cls in vars(sizes).values() if isinstance(cls, type) and cls.__module__ == sizes.__name__]
    return [(cls.__name__, cls()) for cls in classes if not cls.__name__.startswith("_")]


def _row(name: str, provider: Any) -> dict[str, Any]:
    from falcon_bridge.training.memory import count_parameters

    row = {
        "provider": name,
        "parameters": count_parameters(provider),
        "layers": provider.num_layers,
        "hidden_size": provider.hidden_size,
        "ffn_hidden_size": provider.ffn_hidden_size,
        "attention_heads": provider.num_attention_heads,
        "kv_heads": provider.num_query_groups,
        "head_dim": provider.kv_channels,
        "vocab_size": provider.vocab_size,
        "tied": provider.share_embeddings_and_output_weights,
        "context": provider.max_position_embeddings,
        "tp": _tensor_parallel_sizes(provider),
    }
    if hasattr(provider, "d_ssm"):
        row |= {
            "ssm_heads": provider.mamba_num_heads,
            "ssm_head_dim": provider.mamba_head_dim,
            "ssm_groups": provider.mamba_num_groups,
            "ssm_state": provider.mamba_state_dim,
        }
    return row


def _tensor_parallel_sizes(provider: Any) -> list[int]:
    """Those that the provider itself accepts, up to the GPUs of a node and a bit."""
    from falcon_bridge.models.falcon_edge import validation as falcon_edge
    from falcon_bridge.models.falcon_edge.provider import FalconEdgeModelProvider
    from falcon_bridge.models.falcon_h1 import validation as falcon_h1

    family = falcon_edge if isinstance(provider, FalconEdgeModelProvider) else falcon_h1
    sizes = []
    for tp in range(1, provider.num_attention_heads + 1):
        provider.tensor_model_parallel_size = tp
        try:
            family.check_supported(provider)
        except ValueError:
            continue
        sizes.append(tp)
    provider.tensor_model_parallel_size = 1
    return sizes
