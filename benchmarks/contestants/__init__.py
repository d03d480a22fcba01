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
    """

    module: str
    label: str
    torch: bool = False
    options: tuple[str, ...] = ()


ALL = {
    "hand": About("by_hand", "by hand"),
    "mptrain": About("with_mptrain", "mptrain"),
    "keras": About("keras_fit", "Keras 3 fit", options=("keras",)),
    "keras_tuned": About("keras_fit", "Keras 3 fit, tuned", options=("keras", "tuned")),
    "tf_keras": About("keras_fit", "tf_keras fit", options=("tf_keras",)),
    "orbit": About("orbit_example", "Orbit's example"),
    "torch": About("torch_loop", "PyTorch", torch=True),
    "lightning": About("lightning_fit", "Lightning", torch=True),
    # The loop by hand with one optimizer or another around Adam: what loss scaling costs.
    "scaled": About("loss_scaling", "LossScaleOptimizer", options=("mptrain",)),
    "unscaled": About("loss_scaling", "no loss scaling", options=("none",)),
    "scaled_keras": About("loss_scaling", "Keras 3's LossScaleOptimizer", options=("keras",)),
    "scaled_tf_keras": About("loss_scaling", "tf_keras's LossScaleOptimizer", options=("tf_keras",)),
}
PEERS = ("hand", "mptrain", "keras", "keras_tuned", "tf_keras", "orbit", "torch", "lightning")
SCALERS = ("unscaled", "scaled", "scaled_keras", "scaled_tf_keras")
