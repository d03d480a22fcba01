"""Who takes part in the comparison; a module each, which `python -m benchmarks.contestants NAME` runs in a process."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class About:
    """One contestant.

    Attributes:
        module: in this package; has `run(case, gate)`.
        label: in the tables.
        torch: whether it needs PyTorch, which has a Python of its own.
        options: for the module.
        precisions: in which it takes part; default: all.
    """

    module: str
    label: str
    torch: bool = False
    options: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()


ALL = {
    "hand": About("by_hand", "by hand"),
    "mptrain": About("with_mptrain", "mptrain"),
    "mptrain_xla": About("with_mptrain", "mptrain, jit_compile", options=("xla",), precisions=("mixed_float16",)),
    "keras": About("keras_fit", "Keras 3 fit", options=("keras",)),
    "keras_tuned": About("keras_fit", "Keras 3 fit, tuned", options=("keras", "tuned")),
    "tf_keras": About("keras_fit", "tf_keras fit", options=("tf_keras",)),
    "orbit": About("orbit_example", "Orbit's example"),
    "torch": About("torch_loop", "PyTorch", torch=True),
    "lightning": About("lightning_fit", "Lightning", torch=True),
    "lightning_tuned": About("lightning_fit", "Lightning, tuned", torch=True, options=("tuned",)),
    # The loop by hand with one optimizer or another around Adam: what loss scaling costs.
    "scaled": About("loss_scaling", "LossScaleOptimizer", options=("mptrain",)),
    "scaled_by_1": About("loss_scaling", "LossScaleOptimizer, scale fixed at 1", options=("fixed",)),
    "unscaled": About("loss_scaling", "Keras's Adam alone", options=("none",)),
    "unscaled_fused": About("loss_scaling", "Adam with mptrain's fused update alone", options=("fused",)),
    "scaled_keras": About("loss_scaling", "Keras 3's LossScaleOptimizer", options=("keras",)),
    "scaled_tf_keras": About("loss_scaling", "tf_keras's LossScaleOptimizer", options=("tf_keras",)),
}
PEERS = (
    *("hand", "mptrain", "mptrain_xla", "keras", "keras_tuned", "tf_keras", "orbit"),
    *("torch", "lightning", "lightning_tuned"),
)
SCALERS = ("unscaled", "unscaled_fused", "scaled", "scaled_by_1", "scaled_keras", "scaled_tf_keras")
