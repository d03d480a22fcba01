"""Parameter groups: another learning rate or weight decay for some variables, or none at all, and one decision for all."""

import numpy as np
import pytest
import tensorflow as tf

from mptrain import InputError, config_check, keras_compat, optimizers, parameter_groups, runner, verify_resume
from mptrain.checkpoints import Checkpoints
from tests.test_optimizers import values
from tests.trainers import TinyTrainer

TENTH = {"match": "^head/", "learning_rate_factor": 0.1, "weight_decay": 0.0}
FROZEN = {"match": "^stem/", "frozen": True}


class Net(tf.Module):
    """Three matrices: "body/w", "head/w" and "stem/w"."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.stem = Part(), Part(), Part()


class Part(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.ones([2, 2]))


def build(config, strategy=None, **fields):
    for path, value in fields.items():
        config.update_from_flattened_dict({path: value})
    config_check.validate(config)
    with strategy.scope() if strategy else tf.name_scope(""):
        net = Net()
        keras_compat.note_paths(net)
        variables = [net.body.w, net.head.w, net.stem.w]
        optimizer = optimizers.build(config, 100, scaled=True)
        optimizer.build(variables)
    return optimizer, variables


def apply(optimizer, variables, *gradients):
    return bool(optimizer.apply_gradients([(g * tf.ones([2, 2]), v) for g, v in zip(gradients, variables, strict=True)]))


def firsts(variables):
    return [float(value[0, 0]) for value in values(variables)]


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "lion", "adagrad"])
def test_factor_scales_the_update_and_not_the_gradient(config, name):
    optimizer, variables = build(config, **{"optimizer.groups": (TENTH,), "optimizer.name": name})
    for _ in range(3):
        assert apply(optimizer, variables, 1.0, 1.0, 1.0)
    body, head, stem = (1.0 - first for first in firsts(variables))
    assert body == stem > 0
    assert head == pytest.approx(0.1 * body, rel=1e-4)


def test_weight_decay_is_the_groups_own(config):
    decays = {"optimizer.weight_decay": 0.5, "optimizer.learning_rate": 0.1, "optimizer.name": "sgd"}
    stem = {"match": "stem", "weight_decay": 1.0}
    optimizer, variables = build(config, **decays, **{"optimizer.groups": (TENTH, stem)})
    apply(optimizer, variables, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(firsts(variables), [0.95, 1.0, 0.9], rtol=1e-6)


def test_first_group_that_matches_counts(config):
    groups = ({"match": "stem", "learning_rate_factor": 0.5}, {"match": "", "learning_rate_factor": 0.1})
    fields = {"optimizer.name": "sgd", "optimizer.learning_rate": 1.0, "optimizer.groups": groups}
    optimizer, variables = build(config, **fields)
    apply(optimizer, variables, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(firsts(variables), [0.9, 0.9, 0.5], rtol=1e-6)
    assert float(optimizer.learning_rate) == 1.0
    assert int(optimizer.inner.iterations.value) == 1


def test_frozen_variable_has_no_slot_no_share_of_the_norm_and_no_say_in_skipping(config):
    optimizer, variables = build(config, **{"optimizer.groups": (TENTH, FROZEN), "optimizer.ema_momentum": 0.9})
    assert apply(optimizer, variables, 3.0, 4.0, np.inf)
    assert firsts(variables)[2] == 1.0
    assert float(optimizer.gradient_norm) == pytest.approx(10.0)
    assert not [path for path in optimizer.state if "stem" in path]
    assert [path for path in optimizer.state if "head" in path]
    with pytest.raises(ValueError, match="every variable that has a gradient is frozen"):
        apply(optimizer, variables[2:], 1.0)


def test_frozen_gradient_is_not_computed(config):
    optimizer, variables = build(config, **{"optimizer.groups": (FROZEN,)})
    computed = []

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(tf.square(variable)) for variable in variables])
        gradients = tape.gradient(loss, variables)
        noted = [
            tf.numpy_function(lambda g, i=i: computed.append(i) or g, [gradient], tf.float32, stateful=False)
            for i, gradient in enumerate(gradients)
        ]
        return optimizer.apply_gradients([(tf.ensure_shape(g, [2, 2]), v) for g, v in zip(noted, variables, strict=True)])

    assert step()
    assert sorted(computed) == [0, 1]


def test_all_groups_are_skipped_and_clipped_together(config, mirrored):
    strategy = mirrored(2)
    fields = {"optimizer.groups": (TENTH,), "optimizer.clip_norm": 1.0, "optimizer.name": "sgd", "optimizer.learning_rate": 1.0}
    optimizer, variables = build(config, strategy, **fields)

    @tf.function
    def step(head):
        def replica_step():
            first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
            gradients = [1.5, tf.where(first, head, 2.0), 0.0]
            return optimizer.apply_gradients([(g * tf.ones([2, 2]), v) for g, v in zip(gradients, variables, strict=True)])

        return strategy.experimental_local_results(strategy.run(replica_step))

    assert not any(step(np.float32(np.nan)))
    assert firsts(variables) == [1.0, 1.0, 1.0]
    assert all(step(np.float32(2.0)))  # sums 3 and 4 on each of four elements: a norm of 10
    assert float(optimizer.gradient_norm) == pytest.approx(10.0)
    np.testing.assert_allclose(firsts(variables), [0.7, 0.96, 1.0], rtol=1e-6)
    assert [int(each.iterations.value.numpy()) for each in optimizer.inner.optimizers] == [1, 1]


def test_groups_accumulate_together(config):
    fields = {"optimizer.name": "sgd", "optimizer.learning_rate": 1.0, "optimizer.groups": (TENTH, FROZEN)}
    optimizer, variables = build(config, **fields, **{"optimizer.accumulation_steps": 2})
    apply(optimizer, variables, 1.0, 1.0, 1.0)
    assert firsts(variables) == [1.0, 1.0, 1.0]
    apply(optimizer, variables, 3.0, 5.0, 1.0)
    np.testing.assert_allclose(firsts(variables), [-1.0, 0.7, 1.0], rtol=1e-6)


def tiny(config):
    config.optimizer.groups = (
        {"match": "conv2d", "frozen": True},
        {"match": "dense", "learning_rate_factor": 0.5, "weight_decay": 0.1},
    )
    config.optimizer.ema_momentum = 0.9
    config.devices.virtual_cpus = 2
    return config


@pytest.mark.slow
def test_run_with_groups_resumes_exactly_on_two_replicas_and_says_what_is_frozen(config, tmp_path, capsys):
    tiny(config)
    runner.run(config, tmp_path / "straight", "train")
    assert "group        'conv2d': frozen; 2 variables, 40 parameters" in capsys.readouterr().out
    first = config.copy_and_resolve_references()
    first.train.steps = 6
    runner.run(first, tmp_path / "resumed", "train")
    runner.run(config, tmp_path / "resumed", "train")
    ends = [Checkpoints(tmp_path / name / "checkpoints", {}, keep=1).path(12) for name in ("straight", "resumed")]
    assert verify_resume.compare(*ends)[0] > 20
    assert "frozen" in (tmp_path / "straight" / "precision_plan.txt").read_text()


def test_frozen_layer_of_a_trainer_stays_as_it_is(config):
    trainer = TinyTrainer(tiny(config))
    before = trainer.model.get_weights()
    trainer.train(tf.constant(4))
    same = [np.array_equal(*pair) for pair in zip(before, trainer.model.get_weights(), strict=True)]
    assert same[:2] == [True, True]
    assert not any(same[2:])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (({"match": "conv3d", "frozen": True},), "'conv3d' is found in no variable's path; there are sequential/conv2d/"),
        (({"match": "dense"}, {"match": "dense/bias"}), "found only in variables that an earlier group has"),
    ],
)
def test_group_without_variables_is_refused_with_near_paths(config, groups, message):
    config.optimizer.groups = groups
    with pytest.raises(InputError, match="config.optimizer.groups") as caught:
        TinyTrainer(config)
    assert message in str(caught.value)


def test_nothing_left_to_train_is_refused(config):
    config.optimizer.groups = ({"match": "", "frozen": True},)
    with pytest.raises(InputError, match="freezes every variable"):
        TinyTrainer(config)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("conv", "groups[0] is 'conv': write a mapping"),
        ({"frozen": True}, "groups[0] has no 'match'"),
        ({"match": "("}, "groups[0].match: '(' is no regular expression"),
        ({"match": 3}, "groups[0].match: 3 is no text"),
        ({"match": "a", "frozn": True}, "groups[0] has 'frozn': did you mean 'frozen'?"),
        ({"match": "a", "frozen": 1}, "groups[0].frozen is 1: write True or False"),
        ({"match": "a", "learning_rate_factor": -1.0}, "groups[0].learning_rate_factor is -1.0: write a number, 0 or above"),
        ({"match": "a", "learning_rate_factor": float("inf")}, "learning_rate_factor is inf"),
        ({"match": "a", "learning_rate_factor": 0}, "write 'frozen': True"),
        ({"match": "a", "weight_decay": True}, "groups[0].weight_decay is True"),
        ({"match": "a", "frozen": True, "weight_decay": 0.1}, "is frozen, which leaves no use"),
    ],
)
def test_wrong_group_is_refused_before_any_device_is_touched(config, group, message):
    config.optimizer.groups = (group,)
    with pytest.raises(InputError) as caught:
        config_check.validate(config)
    assert f"config.optimizer.{message}" in str(caught.value) or message in str(caught.value)


def test_near_paths_begin_with_the_nearest():
    paths = [f"encoder/block{i}/dense/kernel" for i in range(9)] + ["decoder/attention/query/kernel"]
    assert parameter_groups._near("attenton", paths).startswith("decoder/attention/query/kernel, ")
    assert parameter_groups._near("attenton", paths).endswith(" and 5 more")
