from types import SimpleNamespace

import pytest
from megatron.bridge.training import optim
from megatron.bridge.training.config import SchedulerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from falcon_bridge.bitnet.schedule import TwoStageParamScheduler, TwoStageSchedulerConfig, two_stage_decay
from falcon_bridge.recipes import falcon_h1_tiny_cpu_pretrain_config


BATCH = 8


def parameter_groups():
    return [
        {"params": [], "wd_mult": 1.0, "default_config": True},
        {"params": [], "wd_mult": 0.0, "max_lr": 3.0, "min_lr": 0.0},
    ]


def build(style="linear", groups=None, *, steps=100, warmup=10, lr=1.5, second=1.0, start=0.5, min_lr=0.0, **fields):
    """As Bridge builds it: from the configurations, in samples."""
    scheduler = TwoStageSchedulerConfig(
        second_stage_lr=second,
        second_stage_start=start,
        lr_decay_style=style,
        lr_decay_iters=steps,
        lr_warmup_iters=warmup,
        start_weight_decay=0.1,
        end_weight_decay=0.1,
        **fields,
    )
    scheduler.finalize()
    scheduler.lr_decay_steps, scheduler.lr_warmup_steps = steps * BATCH, warmup * BATCH
    scheduler.wd_incr_steps, scheduler.wsd_decay_steps = steps * BATCH, 10 * BATCH
    groups = groups or parameter_groups()
    optimizer = SimpleNamespace(param_groups=groups)
    built = optim._get_scheduler(SimpleNamespace(lr=lr, min_lr=min_lr), scheduler, optimizer)
    assert isinstance(built, TwoStageParamScheduler)
    return built, groups


def run(scheduler, groups, steps):
    """(lr, weight decay) that each step would use."""
    found = []
    for _ in range(steps):
        found.append((groups[0]["lr"], groups[0]["weight_decay"]))
        scheduler.step(BATCH)
    return found


def test_the_peak_drops_and_the_weight_decay_ends_midway():
    values = run(*build(), 100)
    decay = [(100 - step) / 90 for step in range(100)]
    expected = [1.5 * (step / 10 if step <= 10 else decay[step]) for step in range(50)]
    expected += [1.0 * decay[step] for step in range(50, 100)]
    assert [lr for lr, _ in values] == pytest.approx(expected)
    assert [wd for _, wd in values] == [0.1] * 50 + [0.0] * 50
    assert values[50][0] / values[49][0] == pytest.approx(50 / 51 / 1.5)


@pytest.mark.parametrize(
    ("style", "fields"),
    [("cosine", {}), ("constant", {}), ("inverse-square-root", {}), ("WSD", {"lr_wsd_decay_style": "exponential"})],
)
def test_each_stage_is_megatrons_schedule_of_its_peak(style, fields):
    """Against the parent class with either peak."""
    scheduler, groups = build(style, start=0.3, min_lr=0.25, **fields)
    found = [lr for lr, _ in run(scheduler, groups, 101)]
    expected = []
    for peak in (1.5, 1.0):
        optimizer = SimpleNamespace(param_groups=parameter_groups())
        one_stage = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=peak,
            min_lr=0.25,
            lr_warmup_steps=10 * BATCH,
            lr_decay_steps=100 * BATCH,
            lr_decay_style=style,
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=100 * BATCH,
            wd_incr_style="constant",
            wsd_decay_steps=10 * BATCH,
            lr_wsd_decay_style="exponential",
        )
        expected.append([lr for lr, _ in run(one_stage, optimizer.param_groups, 101)])
    assert found == pytest.approx(expected[0][:30] + expected[1][30:])


def test_a_group_with_its_own_peak_keeps_its_ratio_and_no_decay_stays_none():
    scheduler, groups = build()
    for _ in range(100):
        if groups[0]["lr"]:
            assert groups[1]["lr"] / groups[0]["lr"] == pytest.approx(2)
        assert groups[1]["weight_decay"] == 0
        assert "max_lr" not in groups[0] and groups[1]["max_lr"] == 3.0
        scheduler.step(BATCH)


@pytest.mark.parametrize("stopped", [20, 49, 50, 51, 80])
def test_resumes_exactly_from_its_state(stopped):
    whole = run(*build(), 100)
    scheduler, groups = build()
    first = run(scheduler, groups, stopped)
    # other values in the configuration: those of the checkpoint are in force
    resumed, groups = build(lr=9.0, second=2.0, start=0.7, warmup=3, use_checkpoint_opt_param_scheduler=True)
    resumed.load_state_dict(scheduler.state_dict())
    assert first + run(resumed, groups, 100 - stopped) == whole


def test_the_configuration_can_override_a_checkpoint_and_add_the_stage_to_one():
    scheduler, groups = build()
    run(scheduler, groups, 60)
    resumed, groups = build(second=0.5, override_opt_param_scheduler=True)
    resumed.load_state_dict(scheduler.state_dict())
    assert groups[0]["lr"] == pytest.approx(0.5 * 40 / 90)
    one_stage = {key: value for key, value in scheduler.state_dict().items() if "second_stage" not in key}
    resumed, groups = build(second=0.5)
    with pytest.raises(AssertionError, match="do not match"):
        resumed.load_state_dict(scheduler.state_dict())
    resumed, groups = build(second=0.5)
    resumed.load_state_dict(one_stage)
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (pytest.approx(0.5 * 40 / 90), 0.0)


def test_other_schedules_are_left_as_they_are():
    config = SchedulerConfig(lr_decay_iters=10, start_weight_decay=0.1, end_weight_decay=0.1, lr_decay_style="linear")
    config.lr_decay_steps, config.lr_warmup_steps, config.wd_incr_steps, config.wsd_decay_steps = 80, 8, 80, None
    groups = parameter_groups()
    built = optim._get_scheduler(SimpleNamespace(lr=1.0, min_lr=0.0), config, SimpleNamespace(param_groups=groups))
    assert type(built) is OptimizerParamScheduler


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"second": None}, "second_stage_lr and scheduler.second_stage_start must be numbers"),
        ({"start": 0.0}, "second_stage_start=0.0 must lie between 0 and 1"),
        ({"start": 1.0}, "second_stage_start=1.0 must lie between 0 and 1"),
        ({"second": 1.6}, "second_stage_lr=1.6 must lie between optimizer.min_lr=0.0 and optimizer.lr=1.5"),
        ({"second": 0.1, "min_lr": 0.2}, "second_stage_lr=0.1 must lie between"),
        ({"warmup": 60}, "shorten scheduler.lr_warmup_iters"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says) as caught:
        build(**wrong)
    assert "\n" not in str(caught.value)


def test_a_recipe_takes_it_and_overrides_reach_it():
    from falcon_bridge.training.recipe import apply_overrides

    cfg = falcon_h1_tiny_cpu_pretrain_config()
    two_stage_decay(cfg, 1.5e-3, 1e-3, warmup=10, steps=80)
    cfg = apply_overrides(cfg, ["scheduler.second_stage_lr=5e-4", "scheduler.second_stage_start=0.25"])
    assert isinstance(cfg.scheduler, TwoStageSchedulerConfig)
    assert (cfg.scheduler.second_stage_lr, cfg.scheduler.second_stage_start) == (5e-4, 0.25)
    assert (cfg.train.train_iters, cfg.scheduler.lr_decay_iters) == (80, 80)
    assert cfg.optimizer.weight_decay == cfg.scheduler.start_weight_decay == cfg.scheduler.end_weight_decay == 0.1
