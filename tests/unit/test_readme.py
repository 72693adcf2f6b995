import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from .compat.conftest import clean_process_state
from .test_packaging import PROJECT, ROOT, make


README = (ROOT / "README.md").read_text()
HUB_ID = "tiiuae/Falcon-H1-0.5B-Base"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def is_install(block):
    return "pip install" in block


COMMANDS = [line for block in blocks("bash") if not is_install(block) for line in block.splitlines()]
INSTALLS = [block for block in blocks("bash") if is_install(block)]


@pytest.fixture
def environment(tmp_path):
    """The environment of this Python, in which no Megatron run of another test has left its ranks."""
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}


def test_first_command_runs_from_a_shell(environment, tmp_path):
    done = subprocess.run(shlex.split(COMMANDS[0]), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_command_runs(command, tmp_path, monkeypatch, capfd):
    """In this process, which has imported Megatron."""
    from falcon_bridge.cli import main

    program, *arguments = shlex.split(command)
    assert program == "falcon-bridge"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.chdir(tmp_path)
    with clean_process_state(), pytest.raises(SystemExit) as ended:
        main()
    output = capfd.readouterr()
    assert ended.value.code in (0, None), output.err
    assert output.out.strip()
    assert list(tmp_path.iterdir()) == []


def test_table_of_verbs_is_that_of_the_command_line():
    from falcon_bridge.cli.app import app

    verbs = {(command.name or command.callback.__name__) for command in app.registered_commands}
    groups = {group.typer_instance.info.name: group.typer_instance for group in app.registered_groups}
    for name, group in groups.items():
        verbs |= {f"{name} {command.name or command.callback.__name__}" for command in group.registered_commands}
    table = README[README.index("| verb | does |") :].split("\n\n")[0]
    cells = " ".join(line.split(" | ")[0] for line in table.splitlines()[2:])
    named = {re.match(r"((convert|data) )?[a-z-]+", code).group() for code in re.findall(r"`([^`]+)`", cells)}
    assert named == verbs


def save_tiny_checkpoint(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import FalconH1Config, FalconH1ForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = FalconH1Config(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=48,
        mamba_n_heads=6,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=8,
    )
    FalconH1ForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet[:131])}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def test_python_example_runs_and_keeps_every_bit(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    (example,) = blocks("python")
    assert example.count(HUB_ID) == 1
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint(tmp_path / "checkpoint")
    with clean_process_state():
        exec(compile(example.replace(HUB_ID, str(tmp_path / "checkpoint")), "README.md", "exec"), {})
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    original = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert exported.keys() == original.keys()
    assert [name for name in original if not torch.equal(exported[name], original[name])] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z]+)", README))))
def test_make_target_exists(target):
    assert make("-n", target).returncode == 0


def test_make_targets_of_the_two_commands_are_named():
    assert {"demo", "test"} <= set(re.findall(r"`make ([a-z]+)", README))


@pytest.mark.parametrize("block", INSTALLS)
def test_install_block_is_valid_and_its_files_exist(block):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    for path in re.findall(r"-r (\S+)", block):
        assert (ROOT / path).is_file()


def test_install_blocks_ask_for_what_pyproject_asks_for():
    gpu = set(map(str, map(Requirement, PROJECT["optional-dependencies"]["gpu"])))
    runtime = set(map(str, map(Requirement, PROJECT["dependencies"])))
    named = set()
    for word in shlex.split(" ".join(INSTALLS), comments=True):
        if re.match(r"[a-z][\w-]*(\[[\w,]+\])?[<>=]=", word):
            named.add(str(Requirement(word)))
    assert named - gpu <= runtime
    assert {name for name in gpu if not name.startswith("onebitllms")} <= named


def test_versions_in_the_text_are_the_pinned_ones():
    pins = {
        r.name: str(next(iter(r.specifier)).version) for r in map(Requirement, PROJECT["dependencies"]) if r.specifier
    }
    assert f"Megatron Bridge\n{pins['megatron-bridge']} and Megatron Core {pins['megatron-core']}" in README
    assert f"with torch {pins['torch']} for CUDA" in README


def test_files_and_folders_of_the_layout_table_exist():
    table = README[README.index("## Where things are") :]
    for cell in re.findall(r"^\| `(\S+?)`", table, flags=re.MULTILINE) + re.findall(r", `(\S+?/)`", table):
        prefix, braces, rest = re.match(r"([^{]*)(?:\{([^}]*)\}(.*))?", cell).groups()
        for name in braces.split(",") if braces else [""]:
            assert (ROOT / f"{prefix}{name}{rest or ''}").is_dir(), cell


def test_recipes_in_the_text_are_those_there_are():
    from falcon_bridge.recipes import RECIPES

    named = set()
    for text in re.findall(r"`(falcon_(?:h1|edge)_\S+?_config)`", README):
        parts = [part.split(",") for part in re.split(r"[{}]", text)]
        named |= {"".join(choice) for choice in itertools.product(*parts)}
    assert named == set(RECIPES)
