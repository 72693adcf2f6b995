import logging
from types import SimpleNamespace

import pytest

from falcon_bridge.bitnet import quantization_strength, set_quantization_strength
from falcon_bridge.bitnet.callbacks import QuantizationWarmup, StatisticsLogger, bitnet_callbacks

from .test_statistics import IN, Model, expected, load
from .weights import draw


@pytest.fixture(autouse=True)
def full_strength_afterwards():
    yield
    set_quantization_strength(1.0)


class Scalars(dict):
    """TensorBoard's writer."""

    def add_scalar(self, tag, value, iteration):
        self[tag, iteration] = value


class Metrics(dict):
    """Weights & Biases, MLflow and Comet."""

    def log(self, metrics, iteration):
        self[iteration] = {**self.get(iteration, {}), **metrics}

    def log_metrics(self, metrics, *, step):
        self.log(metrics, step)


def context(step, model=None, *, interval=1, loggers=True):
    state = SimpleNamespace(
        cfg=SimpleNamespace(logger=SimpleNamespace(log_interval=interval)),
        train_state=SimpleNamespace(step=step),
        tensorboard_logger=Scalars() if loggers else None,
        wandb_logger=Metrics() if loggers else None,
        mlflow_logger=Metrics() if loggers else None,
        comet_logger=Metrics() if loggers else None,
    )
    return SimpleNamespace(state=state, model=[model])


def configuration(use_bitnet=True, warmup=0, train_iters=100, **loggers):
    names = ("tensorboard_dir", "wandb_project", "mlflow_experiment", "comet_project")
    fields = dict.fromkeys(names) | loggers
    return SimpleNamespace(
        model=SimpleNamespace(use_bitnet=use_bitnet, bitnet_warmup_steps=warmup),
        train=SimpleNamespace(train_iters=train_iters),
        logger=SimpleNamespace(**fields),
    )


@pytest.mark.parametrize(
    ("cfg", "kinds"),
    [
        (configuration(use_bitnet=False, warmup=7, tensorboard_dir="x"), []),
        (configuration(), []),
        (configuration(warmup=7), [QuantizationWarmup]),
        (configuration(tensorboard_dir="x"), [StatisticsLogger]),
        (configuration(wandb_project="x"), [StatisticsLogger]),
        (configuration(comet_project="x"), [StatisticsLogger]),
        (configuration(warmup=7, mlflow_experiment="x"), [QuantizationWarmup, StatisticsLogger]),
    ],
)
def test_a_configuration_gets_the_callbacks_that_it_asks_for(cfg, kinds):
    assert [type(callback) for callback in bitnet_callbacks(cfg)] == kinds


def test_a_dense_provider_knows_nothing_of_bitnet():
    assert bitnet_callbacks(SimpleNamespace(model=SimpleNamespace())) == []


@pytest.mark.parametrize(("train_iters", "warned"), [(11, False), (10, True), (None, False)])
def test_a_warm_up_that_outlasts_the_run_is_told_of(train_iters, warned, caplog):
    with caplog.at_level(logging.WARNING):
        bitnet_callbacks(configuration(warmup=10, train_iters=train_iters))
    assert ("bitnet_warmup_steps=10 is not over" in caplog.text) == warned


def test_the_strength_follows_from_the_step_and_is_full_between_steps():
    first, resumed = QuantizationWarmup(4), QuantizationWarmup(4)
    found = []
    for step in range(6):
        callback = first if step < 3 else resumed
        of_step = context(step)
        callback.on_train_step_start(of_step)
        found.append(quantization_strength())
        callback.on_train_step_end(of_step)
        assert quantization_strength() == 1.0
        assert of_step.state.tensorboard_logger == {("bitnet/quantization_strength", step + 1): found[-1]}
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_warm_up_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least one step, got 0"):
        QuantizationWarmup(0)


def train(model, steps, interval, *, loggers=True):
    """The contexts of the steps."""
    callback, contexts = (
        StatisticsLogger(),
        [context(step, model, interval=interval, loggers=loggers) for step in steps],
    )
    callback.on_train_start(contexts[0])
    for step, of_step in zip(steps, contexts, strict=True):
        load(model, step)
        callback.on_train_step_start(of_step)
        model(draw(2, 3, IN, seed=step))
        callback.on_train_step_end(of_step)
    callback.on_train_end(contexts[-1])
    return contexts


@pytest.fixture
def model(one_rank):
    model = Model(one_rank)
    model.pg_collection = SimpleNamespace(pp=one_rank)
    return model


def test_statistics_reach_every_logger_at_the_interval(model):
    contexts = train(model, range(6), interval=3)
    for step, of_step in enumerate(contexts):
        tensorboard, wandb = of_step.state.tensorboard_logger, of_step.state.wandb_logger
        if step not in (2, 5):
            assert not tensorboard and not wandb
            continue
        wanted = expected([0, 1, 2] if step == 2 else [2, 3, 4, 5])
        tags = {f"bitnet/{what}/{name}" for what in ("zeros", "flips", "scale") for name in wanted}
        tags |= {"bitnet/zeros/all", "bitnet/flips/all"}
        assert tensorboard.keys() == {(tag, step + 1) for tag in tags}
        metrics = {tag: value for (tag, _), value in tensorboard.items()}
        assert wandb == of_step.state.mlflow_logger == of_step.state.comet_logger == {step + 1: metrics}
        _, zeros, flips, scale = wanted["layers.5.k_proj"]
        assert metrics["bitnet/flips/layers.5.k_proj"] == pytest.approx(flips)
        assert metrics["bitnet/zeros/layers.5.k_proj"] == pytest.approx(zeros)
        assert metrics["bitnet/scale/layers.5.k_proj"] == pytest.approx(scale)
        total = sum(elements for elements, *_ in wanted.values())
        whole = sum(elements * flips for elements, _, flips, _ in wanted.values()) / total
        assert metrics["bitnet/flips/all"] == pytest.approx(whole)


def test_the_first_step_has_no_flips_and_ranks_without_loggers_take_part(model):
    (first,) = train(model, [0], interval=1)
    assert not [tag for tag, _ in first.state.tensorboard_logger if "flips" in tag]
    assert ("bitnet/zeros/all", 1) in first.state.tensorboard_logger
    train(model, [0, 1], interval=1, loggers=False)
