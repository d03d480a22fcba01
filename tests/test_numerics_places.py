"""Whose fault an overflow is: the call, the operation between two layers, the data, or the step's own way to draw batches."""

import json

import numpy as np
import pytest
import tensorflow as tf

import mptrain
from mptrain import runner
from mptrain.errors import InputError
from mptrain.numerics.collection import Collector
from mptrain.numerics.faults import first_nonfinite
from mptrain.numerics.places import OUTPUT, WEIGHT
from mptrain.numerics.probe import Probe
from tests.runs import assert_same_checkpoint, rows, tiny_config

pytestmark = pytest.mark.slow  # left out by `make test-fast`


@pytest.fixture
def sick():
    """Returns the config of a trainer with a planted fault, and with fields of `config.model`."""

    def config(name, replicas=0, policy="mixed_float16", **model):
        config = tiny_config()
        config.trainer = f"tests.sick_trainers.{name}"
        config.devices.virtual_cpus = replicas
        config.precision.policy = policy
        config.train.steps = 8
        config.numerics.steps = 6
        config.model.update(model)
        return config

    return config


def looked_at(config, **options):
    trainer = runner.build_trainer(config)
    return Probe(trainer, **options)(next(trainer.training_batches.open(0)))


def report_of(config, workdir):
    mptrain.run(config, workdir, "numerics")
    return json.loads((workdir / "report" / "numerics.json").read_text())


def riskiest(report):
    return max(report["layers"], key=lambda layer: layer["risk"])


@pytest.mark.parametrize(
    ("gains", "path", "call"),
    [((30.0, 1.0), "model/shared", 3), ((40_000.0, 1.0), "model/shared", 1), ((1.0, 40_000.0), "model/middle", 1)],
)
def test_call_of_a_shared_layer_that_overflows_first_is_named(sick, gains, path, call):
    first = first_nonfinite(looked_at(sick("SharedTrainer", gains=gains)))
    assert (first.path, first.call, first.kind) == (path, call, OUTPUT)


def test_report_says_which_call_of_a_shared_layer_is_too_large(sick, tmp_path):
    report = report_of(sick("SharedTrainer", gains=(30.0, 1.0)), tmp_path)
    assert riskiest(report)["path"] == "model/shared"
    assert riskiest(report)["verdict"].startswith("its output in call 3 of 3 reaches 1")
    assert riskiest(report)["output"]["observed"]["count"] == 3 * 6 * 12 * 16
    assert report["advice"]["check"]["after"]["layers at risk"] == 0


@pytest.mark.parametrize("cast", [False, True])
def test_operation_between_two_layers_is_named_and_no_layer_is_blamed_for_it(sick, tmp_path, cast):
    report = report_of(sick("BetweenTrainer", cast=cast), tmp_path)
    [layer] = [layer for layer in report["layers"] if layer["at_risk"]]
    assert layer["path"] == "between_model/between first and second"
    assert "between_model computes there itself" in layer["verdict"]
    advice = report["advice"]
    if cast:  # the model's own cast undoes what a layer's float32 would do
        assert advice["float32_layers"] == []
        assert advice["check"] is None
        assert "tf.cast(x, tf.float32)" in advice["text"]
        assert "outside of any layer" in advice["text"]
    else:  # the exponential follows the dtype of what it is given
        assert advice["float32_layers"] == ["^between_model/first$"]
        assert advice["check"]["after"]["skipped steps"] == 0


def test_where_no_layer_with_weights_is_left_for_16_bits_float32_is_advised(sick, tmp_path):
    config = sick("OnlyTrainer")
    advice = report_of(config, tmp_path / "report")["advice"]
    assert "config.precision.policy = 'float32'" in advice["text"]
    assert advice["check"]["after"]["skipped steps"] == advice["check"]["after"]["layers at risk"] == 0
    config.precision.policy = advice["policy"]
    assert np.isfinite(mptrain.run(config, tmp_path / "mended")["loss"])


def test_inputs_of_layers_are_not_reported_where_they_fit(sick):
    sight = looked_at(sick("BetweenTrainer"), reference=True)
    between = {site.path: site.computed_by for site in sight.sites if site.after is not None}
    assert between["before between_model"] == ""  # the step's own cast
    assert between["between_model/between first and second"] == "between_model"
    assert first_nonfinite(sight) is None


@pytest.mark.parametrize("what", ["inputs", "loss"])
def test_examples_that_are_not_finite_in_float32_either_are_told_from_faults_of_layers(sick, tmp_path, capfd, what):
    config = sick("BrokenTrainer", what=what, broken=(5,))
    report = report_of(config, tmp_path / "run")
    assert not any(layer["at_risk"] for layer in report["layers"])
    assert report["advice"] is None
    [broken] = report["not_finite_in_float32"]
    assert f"Step {broken['step']}: not finite in float32 either" in report["summary"]
    assert "the data or the model, which neither a loss scale nor a dtype cures" in report["summary"]
    place = "before sequential" if what == "inputs" else "as the loss, though all outputs are"
    assert place in report["summary"]
    mptrain.run(config, tmp_path / "run", "train")
    [event] = rows(tmp_path / "run", event="provenance")
    assert (event["step"], event["in_float32"], event["forward"]) == (broken["step"], True, True)
    assert "not finite in float32 either" in capfd.readouterr().err


@pytest.mark.parametrize("replicas", [0, 2])
def test_scopes_in_scopes_of_modules_in_modules_are_told_apart_with_their_weights(sick, replicas):
    sight = looked_at(sick("NestedTrainer", replicas))
    outputs = [site.path for site in sight.sites if site.kind == OUTPUT and site.after is None]
    zeroth, second = (f"blocks/{block}" for block in ("zeroth", "second"))
    assert outputs == [f"{zeroth}/up", zeroth, f"{zeroth}/down", f"{second}/up", second, f"{second}/down"]
    assert first_nonfinite(sight).path == f"{second}/down"
    weights = sorted((site for site in sight.sites if site.kind == WEIGHT), key=lambda site: -site.position)
    assert [site.path for site in weights[1:]] == [f"blocks/{i}/{name}/kernel" for i in (1, 0) for name in ("down", "up")]
    assert [site.layer for site in weights[1:]] == [f"{second}/down", f"{second}/up", f"{zeroth}/down", f"{zeroth}/up"]


def test_weights_of_a_plain_module_overflow_in_backward_order(sick):
    config = sick("NestedTrainer")
    trainer = runner.build_trainer(config)
    trainer.model.blocks[1].down.kernel.assign(trainer.model.blocks[1].up.kernel)
    sight = Probe(trainer)(next(trainer.training_batches.open(0)), loss_scale=2.0**40)
    first = first_nonfinite(sight)
    assert (first.kind, first.path) == ("gradient", "blocks/second/down")


def test_model_that_casts_by_itself_is_compared_with_float32(sick, tmp_path):
    report = report_of(sick("NestedTrainer", policy="native", half=True), tmp_path)
    assert report["reference_steps"] == 6
    assert riskiest(report)["path"] == "blocks/second/down"
    assert "float16 ends at 65,504" in riskiest(report)["verdict"]


def test_model_without_a_float32_twin_is_told_so(sick, tmp_path, capfd):
    report = report_of(sick("NestedTrainer", policy="native", half="bitwise"), tmp_path)
    assert report["reference_steps"] == 0
    assert "the model casts to 16 bits by itself" in report["no_reference"]
    assert "there is no float32 to compare with" in capfd.readouterr().err
    assert riskiest(report)["path"] == "blocks/second/down"
    assert "no float32 to compare it with" in riskiest(report)["verdict"]


def test_step_that_draws_its_batches_in_its_own_way_is_looked_at_as_it_is(sick, tmp_path):
    config = sick("TwoBatchesTrainer", 2)
    looked, plain = (runner.build_trainer(config) for _ in range(2))
    Collector(looked, reference_every=2).train(4)
    plain.train(tf.constant(4))
    for path, variable in plain.state.items():
        assert variable.numpy().tobytes() == looked.state[path].numpy().tobytes(), path
    config.loss_scale.initial_scale = 2.0**24
    for look in (True, False):
        config.numerics.provenance = look
        mptrain.run(config, tmp_path / str(look), "train")
    assert_same_checkpoint(tmp_path / "True", tmp_path / "False", 8)
    events = rows(tmp_path / "True", event="provenance")
    skipped = [event["step"] for event in rows(tmp_path / "True", event="overflow")]
    assert [event["step"] for event in events] == skipped[:3]  # the very batches overflow again


def test_step_in_a_function_of_its_own_is_seen_like_any_other(sick):
    config = sick("FunctionTrainer")
    config.numerics.steps = 2
    sights = [looked_at(config)]
    config.trainer = "tests.trainers.TinyTrainer"
    sights.append(looked_at(config))
    function, plain = sights
    assert function.sites == plain.sites
    np.testing.assert_array_equal(function.counts, plain.counts)


def test_gradient_of_rows_that_stand_twice_is_their_sum(sick):
    config = sick("RowsTrainer")
    trainer = runner.build_trainer(config)
    sight = Probe(trainer, reference=True, gradients=True)(next(trainer.training_batches.open(0)), loss_scale=1.0)
    [(row, largest)] = [
        (row, largest)
        for site, row, largest in zip(sight.sites, sight.counts, sight.largest, strict=True)
        if site.kind == WEIGHT and site.path.endswith("rows/embeddings")
    ]
    [dense] = [gradient for path, gradient in sight.gradients.items() if path.endswith("rows/embeddings")]
    assert row[0] == 3 * 8  # three of the rows are used, many times
    assert largest == pytest.approx(np.abs(dense).max(), rel=1e-6)


def test_layers_that_no_regex_finds_are_answered_with_the_nearest(sick, tmp_path):
    config = sick("VectorTrainer")
    config.numerics.every_steps, config.numerics.layers = 4, ("secnd",)
    with pytest.raises(InputError, match=r"config.numerics.layers: 'secnd' is found in no layer's path; .*sequential/second"):
        mptrain.run(config, tmp_path, "train")


def test_graph_of_a_run_without_numerics_is_the_one_without_the_package(sick):
    graphs = []
    for look in (False, True):
        trainer = runner.build_trainer(sick("VectorTrainer"))
        if look:
            Probe(trainer)(next(trainer.training_batches.open(0)))
        step = tf.function(lambda batch, trainer=trainer: trainer.strategy.run(trainer.guarded_step, args=(batch,)))
        definition = step.get_concrete_function(next(trainer.training_batches.open(0))).graph.as_graph_def()
        graphs.append([(node.op, list(node.input)) for node in definition.node])
    assert graphs[0] == graphs[1]


def test_minus_infinity_by_design_and_several_inputs_and_outputs_are_no_fault(sick, tmp_path):
    config = sick("MaskedTrainer")
    config.loss_scale.initial_scale = 2.0**24  # whose overflows must not be blamed on the mask
    report = report_of(config, tmp_path / "run")
    names = ("left", "softmax", "right", "head_0", "head_1")
    assert [layer["path"] for layer in report["layers"]] == [f"masked/{name}" for name in names]
    assert not any(layer["at_risk"] for layer in report["layers"])
    assert report["loss_scale"]["skipped_steps"]
    mptrain.run(config, tmp_path / "run", "train")
    assert all(event["tensor"] == "gradient" for event in rows(tmp_path / "run", event="provenance"))


def test_static_loss_scale_that_is_too_high_is_at_risk_and_lowered(sick, tmp_path):
    config = sick("VectorTrainer")
    config.loss_scale.dynamic, config.loss_scale.initial_scale = False, 2.0**24
    report = report_of(config, tmp_path)
    assert report["loss_scale"]["skipped_steps"] == list(range(6))  # every one
    assert "use at most" in riskiest(report)["verdict"]
    assert report["advice"]["initial_scale"] == report["loss_scale"]["recommended"][1]
    assert report["advice"]["float32_layers"] == []
    after = report["advice"]["check"]["after"]
    assert after["skipped steps"] == after["layers at risk"] == 0


def test_layer_that_loses_most_of_its_gradient_stands_above_one_that_loses_some(sick, tmp_path):
    config = sick("ShrunkTrainer")
    config.loss_scale.dynamic, config.loss_scale.initial_scale = False, 1.0
    report = report_of(config, tmp_path)
    first, second = (layer for layer in report["layers"] if layer["at_risk"])
    shares = [int(layer["verdict"].partition("% of its gradient vanishes")[0]) for layer in (first, second)]
    assert shares[0] > 50 > shares[1]
    assert riskiest(report) == first


def test_layer_in_float32_whose_gradient_vanishes_before_it_gets_there_is_told_so_and_fed(sick, tmp_path):
    config = sick("NarrowTrainer")
    advice = report_of(config, tmp_path / "none")["advice"]
    assert advice["float32_layers"] == ["^sequential/first$", "^sequential/narrow$"]
    assert advice["check"]["after"]["layers at risk"] == 0

    config.precision.float32_layers = ("^sequential/first$",)
    report = report_of(config, tmp_path / "first")
    assert riskiest(report)["path"] == "sequential/first"
    assert "vanishes on its way" in riskiest(report)["verdict"]


def test_bfloat16_run_is_told_of_what_bfloat16_itself_does(sick, tmp_path):
    report = report_of(sick("VarianceTrainer", policy="mixed_bfloat16"), tmp_path)
    assert riskiest(report)["path"] == "sequential/norm"
    assert "is not finite in bfloat16" in riskiest(report)["verdict"]
    assert report["advice"]["float32_layers"] == ["^sequential/norm$"]
    assert report["advice"]["check"]["after"]["skipped steps"] == 0


def test_float32_run_is_told_what_only_a_run_in_float16_shows(sick, tmp_path):
    report = report_of(sick("SoftmaxTrainer", policy="float32"), tmp_path)
    assert report["precision"] == "float32"
    assert riskiest(report)["path"] == "sequential/softmax"
    assert report["advice"]["float32_layers"] == ["^sequential/softmax$"]
    assert report["advice"]["check"]["before"]["skipped steps"] == 6


def test_second_report_replaces_the_first_with_its_advice(sick, tmp_path):
    config = sick("SoftmaxTrainer")
    report = report_of(config, tmp_path)
    assert (tmp_path / "report" / "float32_layers.py").exists()
    config.precision.float32_layers = tuple(report["advice"]["float32_layers"])
    assert report_of(config, tmp_path)["advice"] is None
    assert not (tmp_path / "report" / "float32_layers.py").exists()


def test_report_that_is_interrupted_shows_the_steps_so_far(sick, tmp_path, monkeypatch):
    step = Collector._step

    def interrupted(collector, *args):
        step(collector, *args)
        if collector.found.steps == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report_of(sick("VectorTrainer"), tmp_path)
    assert json.loads((tmp_path / "report" / "numerics.json").read_text())["collected_steps"] == 3
    assert (tmp_path / "report" / "numerics.html").exists()
