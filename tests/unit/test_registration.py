"""What `import falcon_bridge` does to Megatron Bridge, and what it leaves alone."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import falcon_bridge
from falcon_bridge.verification.checkpoints import random_config


OURS = "falcon_bridge.models.falcon_h1.bridge.FalconH1Bridge"


@pytest.fixture(scope="module")
def bridge():
    import megatron.bridge

    return megatron.bridge


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Architecture to bridge class: of upstream alone, and with falcon_bridge imported after and before it.

    In a process of its own, which forks once it has imported what both orders share.
    """
    folder = tmp_path_factory.mktemp("tables")
    code = """
        import json, os, sys

        import torch, transformers

        def write(name):
            from megatron.bridge.models.conversion.model_bridge import get_model_bridge
            table = {}
            for key, make in get_model_bridge._exact_types.items():
                bridge = type(make(None))
                table[key if isinstance(key, str) else key.__name__] = f"{bridge.__module__}.{bridge.__qualname__}"
            with open(os.path.join(sys.argv[1], name), "w") as file:
                json.dump(table, file)

        child = os.fork()
        if not child:
            import falcon_bridge, megatron.bridge
            write("falcon_first")
            os._exit(0)

        # the package for its compat alone: its hook is taken out again
        import falcon_bridge
        from falcon_bridge.compat.post_import import _WhenImported
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
        import megatron.bridge
        write("upstream")
        for name in [name for name in sys.modules if name.partition(".")[0] == "falcon_bridge"]:
            del sys.modules[name]
        import falcon_bridge
        write("bridge_first")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / name).read_text()) for name in ("upstream", "bridge_first", "falcon_first")}


@pytest.mark.parametrize("order", ["bridge_first", "falcon_first"])
def test_no_other_architecture_changes_hands(order, tables):
    upstream = dict(tables["upstream"])
    assert len(upstream) > 50
    assert upstream.pop("FalconH1ForCausalLM").startswith("megatron.bridge.")
    ours = dict(tables[order])
    assert ours.pop("FalconH1ForCausalLM") == OURS
    assert ours == upstream


def registered(key):
    from megatron.bridge.models.conversion.model_bridge import get_model_bridge

    bridge = type(get_model_bridge(key))
    return f"{bridge.__module__}.{bridge.__qualname__}"


def test_our_bridge_answers_for_the_class_and_for_its_name(bridge):
    from transformers import FalconH1ForCausalLM

    assert registered(FalconH1ForCausalLM) == OURS
    assert registered("FalconH1ForCausalLM") == OURS


def test_our_bridge_answers_for_a_class_that_comes_with_a_checkpoint(bridge):
    """A class of the same name, made from a checkpoint's own code."""
    assert registered(type("FalconH1ForCausalLM", (torch.nn.Module,), {})) == OURS


@pytest.mark.parametrize("auto_map", [None, {"AutoModelForCausalLM": "modeling_falcon_h1.FalconH1ForCausalLM"}])
def test_auto_bridge_takes_ours_for_a_checkpoint(auto_map, bridge, tmp_path):
    fields = random_config("plain").to_dict()
    if auto_map:
        fields["auto_map"] = auto_map
    (tmp_path / "config.json").write_text(json.dumps(fields))
    auto = bridge.AutoBridge.from_hf_pretrained(tmp_path)
    # with an auto_map Bridge looks the class up by name, without one by type
    assert isinstance(auto._causal_lm_architecture, str) == bool(auto_map)
    assert type(auto._model_bridge) is falcon_bridge.FalconH1Bridge
    assert type(auto.to_megatron_provider(load_weights=False)) is falcon_bridge.FalconH1ModelProvider


def test_exports_go_through_our_bridge(bridge):
    """Weights are streamed by (architecture, model class): both spellings of the architecture."""
    from megatron.bridge.models.conversion import model_bridge

    from falcon_bridge.models.falcon_h1.model import FalconH1Model

    implementation = model_bridge.stream_weights_megatron_to_hf._exact_types["FalconH1ForCausalLM", FalconH1Model]
    bound = [cell.cell_contents for cell in implementation.__closure__]
    assert falcon_bridge.FalconH1Bridge in bound


def test_saved_configs_may_name_our_classes(bridge):
    from megatron.bridge.utils.instantiate_utils import InstantiationException, instantiate

    target = "falcon_bridge.models.falcon_h1.mup.FalconH1Multipliers"
    assert instantiate({"_target_": target, "key_multiplier": 0.5}).key_multiplier == 0.5
    with pytest.raises(InstantiationException):
        instantiate({"_target_": "falcon_bridge_evil.Thing"})


def test_every_public_name_is_there():
    for name in falcon_bridge.__all__:
        assert getattr(falcon_bridge, name).__name__ == name
    assert set(falcon_bridge.__all__) <= set(dir(falcon_bridge))
    assert "FalconH1ModelProvider1P5BDeep" in falcon_bridge.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'falcon_bridge' has no attribute 'FalconH1ModelProvider8B'$"):
        falcon_bridge.FalconH1ModelProvider8B  # noqa: B018
    assert not hasattr(falcon_bridge, "__wrapped__")
