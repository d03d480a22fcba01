"""What is checked of a model and its loss before the first step, in a trace of the forward pass that computes nothing."""

from collections.abc import Iterable

import tensorflow as tf

from mptrain import forward_graph, keras_compat, step_check
from mptrain import precision as precision_lib
from mptrain.autograph import as_written
from mptrain.errors import InputError, one_line
from mptrain.forward_graph import SIXTEEN_BITS, Forward
from mptrain.layers import MixedPrecision
from mptrain.precision import Precision


def forward(trainer, *, own_step: bool) -> Forward:
    """Traces a trainer's model and its loss on a few examples, and checks the dtypes of outputs and loss.

    Args:
        trainer: a `Trainer` that has its model.
        own_step: whether the train step is the trainer's own, which may take loss and model for something else: then only the
            model is traced, and what cannot be traced shows nothing.

    Raises:
        InputError: if outputs or loss are 16 bits wide, or the loss is not one for each example.
    """
    sizes = {size for spec in trainer.train_source.spec.values() for size in spec.shape}
    examples = next(count for count in range(2, len(sizes) + 3) if count not in sizes)  # a size that no other dimension has
    batch = {name: tf.TensorSpec([examples, *spec.shape], spec.dtype) for name, spec in trainer.train_source.spec.items()}

    def model(batch):
        return trainer.model(trainer.precision.cast_to_compute(trainer.inputs(batch)), training=False)

    def loss(batch, outputs):
        outputs = trainer.precision.cast_to_output(outputs)
        check_is_float32(f"what {type(trainer).__name__}.model returns", outputs, "give its last layer dtype='float32'")
        name = f"{type(trainer).__name__}.compute_loss()"
        with step_check.telling(name):
            losses = trainer.compute_loss(batch, outputs)
        per_example(name, losses)
        _check_losses(name, losses, outputs, examples)
        if dtype := forward_graph.dtype_on_the_way(losses, outputs):
            raise InputError(f"{name} takes the outputs through {dtype.name}: leave them in float32 from the model to the loss")

    try:
        return forward_graph.trace(model, (lambda batch, outputs: None) if own_step else loss, batch)
    except InputError as error:
        raise InputError(one_line(error)) from error
    except Exception:
        if own_step:  # which may call the model in another way
            return Forward()
        raise


@as_written
def _check_losses(name: str, losses: tf.Tensor, outputs, examples: int) -> None:
    if losses.shape.rank is not None:
        if losses.shape[:1] != [examples]:
            raise InputError(f"{name} returns {losses.shape[0]} losses for {examples} examples: return one for each")
        inside = [size for tensor in tf.nest.flatten(outputs) if tf.is_tensor(tensor) for size in (tensor.shape[1:] or [])]
        if examples in losses.shape[1:] and examples not in inside:
            raise InputError(
                f"{name} returns losses of shape {losses.shape} for {examples} examples, each with the targets of all: give"
                " targets and outputs the same shape, as outputs[:, 0] does"
            )
    if not forward_graph.depends_on(losses, outputs):
        raise InputError(f"{name} returns losses that do not depend on the outputs: they have no gradient")


@as_written
def per_example(name: str, losses) -> tf.Tensor:
    """Returns the loss of each example, float32 [examples], from what the function `name` returned.

    Raises:
        InputError: if that is no float32 tensor with one loss for each example.
    """
    if not tf.is_tensor(losses):
        raise InputError(f"{name} returns {losses!r}: return one tensor, the loss of each example")
    check_is_float32(f"what {name} returns", losses, "compute the loss from the outputs, which are float32")
    if not losses.dtype.is_floating:
        raise InputError(
            f"{name} returns {losses.dtype.name}, which has no gradient: return the loss of each example in float32"
        )
    losses = tf.cast(losses, tf.float32)
    if losses.shape.rank == 0:
        raise InputError(
            f"{name} returns a scalar: return the loss of each example, shape [replica"
            " batch]; mptrain takes the mean over the global batch"
        )
    return tf.reduce_mean(losses, axis=list(range(1, losses.shape.rank)))


@as_written
def check_is_float32(what: str, tree, remedy: str) -> None:
    """Checks that a nested structure holds no 16-bit tensor.

    Raises:
        InputError: if it does.
    """
    for value in tf.nest.flatten(tree):
        if getattr(value, "dtype", None) in SIXTEEN_BITS:
            raise InputError(f"{what} is {value.dtype.name}: {remedy}")


def sixteen_bits(precision: Precision, model, forward: Forward) -> frozenset[tf.DType]:
    """Returns the 16-bit dtypes in which anything is computed."""
    layers = {row.compute_dtype for row in precision_lib.plan(model)}
    used = {precision.compute_dtype, *forward.dtypes}
    return frozenset(dtype for dtype in SIXTEEN_BITS if dtype in used or dtype.name in layers)


def check(precision: Precision, model, forward: Forward, held: Iterable = ()) -> list[str]:
    """Checks a built model against its precision.

    Args:
        precision: what was asked for.
        model: a Keras model or `tf.Module`.
        forward: its traced forward pass.
        held: layers that were asked to compute in float32.

    Returns:
        Warnings, one line each.

    Raises:
        InputError: if 16 bits were asked for and no layer with parameters computes in them, or a trainable variable is not
            float32.
    """
    _check_trainable(keras_compat.variables_by_path(keras_compat.trainable_variables(model)))
    if precision.compute_dtype not in SIXTEEN_BITS:
        return []
    rows = [row for row in precision_lib.plan(model) if row.parameters]
    wanted = precision.compute_dtype.name
    if not any(row.compute_dtype in (wanted, "as written") for row in rows):
        raise InputError(
            f"config.precision.policy is {precision.name!r} but no layer with parameters computes in {wanted}: build the model"
            " inside build_model(), without dtype='float32' on every layer"
        )
    return [*_silent_casts(wanted, model, forward, held), *_rounded_logits(wanted, model, forward)]


def _check_trainable(trainable: dict[str, tf.Variable]) -> None:
    wrong = [path for path, variable in trainable.items() if variable.dtype != tf.float32]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(
            f"trainable variable {wrong[0]!r}{more} is {trainable[wrong[0]].dtype.name}: keep trainable variables in float32"
            " and cast them where they are used, as the policy mixed_float16 does"
        )


_IF_MEANT = {
    "float32": "name them in config.precision.float32_layers",
    "float16": "wrap them in MixedPrecision(layer, 'mixed_float16')",
    "bfloat16": "wrap them in MixedPrecision(layer, 'mixed_bfloat16')",
}


def _silent_casts(wanted: str, model, forward: Forward, held: Iterable) -> list[str]:
    """Names the layers that compute in another dtype than `wanted` without having been asked to.

    Those that make the model's outputs are free to: the loss needs float32.
    """
    paths = _paths(model)
    computing = {id(layer) for _, layer in keras_compat.layers_by_path(model)}
    free = {id(layer) for layer in held} | {id(call.layer) for call in forward.last}
    for _, layer in keras_compat.all_layers_by_path(model):
        if isinstance(layer, MixedPrecision):
            free |= {id(each) for each in keras_compat.layers_in(layer)}
    silent = {}  # compute dtype -> the paths of its layers, in forward order
    for call in forward.calls:
        layer = call.layer
        if layer is model or id(layer) in free or layer.compute_dtype == wanted:
            continue
        if (call.innermost or id(layer) in computing) and (call.casts_16_bits() or call.computes()):
            silent.setdefault(layer.compute_dtype, {})[paths.get(id(layer), layer.name)] = None
    return [
        f"{', '.join(layers)} compute in {dtype} and cast their inputs {'back ' if dtype == 'float32' else ''}to it:"
        f" if that is meant, {_IF_MEANT.get(dtype, 'leave it')}; if not, build them without dtype={dtype!r}"
        for dtype, layers in silent.items()
    ]


def _rounded_logits(wanted: str, model, forward: Forward) -> list[str]:
    """Names the layers that make the model's outputs in 16 bits: widened to float32 for the loss, they stay rounded."""
    if not any(tensor.dtype in SIXTEEN_BITS for tensor in forward.outputs if tf.is_tensor(tensor)):
        return []
    last = [call.layer for call in forward.last if any(tensor.dtype in SIXTEEN_BITS for tensor in call.outputs)]
    layers = [layer for layer in last if layer.weights] or last
    paths = _paths(model)
    if not layers:
        return [f"the logits are rounded to {wanted}: compute the model's last layer in float32"]
    return [
        f"{', '.join(paths.get(id(layer), layer.name) for layer in layers)}: the logits are rounded to {wanted}: give the layer"
        " dtype='float32'"
    ]


def _paths(model) -> dict[int, str]:
    return {id(layer): path for path, layer in keras_compat.all_layers_by_path(model)}
