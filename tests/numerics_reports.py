"""Numerics reports as a run would leave them, made up: of a network for MNIST, of a sick one, of one with 200 layers."""

import numpy as np

FORMATS = {
    "float16": {"largest": 65504.0, "normal": -14, "subnormal": -24},
    "bfloat16": {"largest": 3.3895313892515355e38, "normal": -126, "subnormal": -133},
}


def shares(values, total, form):
    """What a format would do to magnitudes that are neither zero nor infinite."""
    largest, least = form["largest"], 2.0 ** form["subnormal"] / 2
    return {
        "underflow": float(np.sum(values <= least)) / total,
        "subnormal": float(np.sum((values > least) & (values < 2.0 ** form["normal"]))) / total,
        "overflow": float(np.sum(values >= largest * (1 + 2**-12))) / total,
        "headroom": float(np.log2(largest / values.max())),
    }


def histogram(values):
    exponents = np.floor(np.log2(values)).astype(int)
    first = int(exponents.min())
    return {"first": first, "counts": np.bincount(exponents - first).tolist()}


def summary(values, total):
    formats = {name: shares(values, total, form) for name, form in FORMATS.items()}
    return {"largest": float(values.max()), "histogram": histogram(values), **formats}


def statistics(values, zeros, nonfinite, scale):
    total = len(values) + zeros + nonfinite
    scaled = None if scale is None else summary(values * scale, total)
    return {"count": total, "zero": zeros / total, "nonfinite": nonfinite / total, **summary(values, total), "scaled": scaled}


def tensor(rng, middle, spread, scale=None, zeros=0.0, nonfinite=0, compared=True, count=4000):
    """Magnitudes around 2^middle; the run in float16 has lost what `scale` did not lift above 2^-25."""
    values = np.exp2(rng.normal(middle, spread, count))
    exact = int(count * zeros)
    alive = values[values * (scale or 1) > 2.0**-25]
    alive = alive[: len(alive) - nonfinite]
    lost = count - len(alive) - nonfinite
    observed = statistics(alive, exact + lost, nonfinite, scale)
    return {"observed": observed, "reference": statistics(values, exact, 0, scale) if compared else None}


def layer(path, output, gradient, weights=(), dtype="float16", risk=0.02, verdict="fits float16 with room on both sides"):
    variables = [{"path": f"{path}/{name}", **one} for name, one in weights]
    return {
        "path": path,
        "compute_dtype": dtype,
        "calls": 1 if output else 0,
        "risk": risk,
        "at_risk": risk >= 0.5,
        "verdict": verdict,
        "output": output,
        "gradient": gradient,
        "weights": variables,
    }


def report(layers, summary_words, scale=2.0**15, **changes):
    made = {
        "version": 1,
        "trainer": "experiments.mnist.MnistTrainer",
        "precision": "mixed_float16",
        "first_step": 0,
        "last_step": 200,
        "collected_steps": 200,
        "reference_steps": 25,
        "no_reference": "",
        "not_finite_in_float32": [],
        "summary": summary_words,
        "formats": FORMATS,
        "loss_scale": {
            "dynamic": True,
            "now": scale,
            "recommended": [2.0**12, 2.0**20],
            "history": [[0, scale]],
            "skipped_steps": [],
        },
        "layers": layers,
        "advice": None,
    }
    made["loss_scale"].update(changes.pop("loss_scale", {}))
    return {**made, **changes}


def mnist():
    """A healthy convolutional network: gradients that only the loss scale keeps from rounding to zero."""
    rng, scale = np.random.default_rng(1), 2.0**16

    def weights(middle):
        both = (("kernel", middle), ("bias", middle + 2))
        return [(name, tensor(rng, at, 2.2, scale, count=3000 if name == "kernel" else 64)) for name, at in both]

    def plain(name, out, back, zeros=0.0):
        return layer(f"cnn/{name}", tensor(rng, out, 1.8, zeros=zeros), tensor(rng, back, 2.5, scale, zeros=zeros))

    def trained(name, out, back, middle, **words):
        outputs, gradients = tensor(rng, out, 1.8, zeros=0.45), tensor(rng, back, 2.5, scale, zeros=0.45)
        return layer(f"cnn/{name}", outputs, gradients, weights(middle), **words)

    thin = {"risk": 0.31, "verdict": "about one in a hundred activation gradients is subnormal at the run's loss scale"}
    layers = [
        trained("conv1", -1.5, -22, -13, **thin),
        plain("pool1", -0.5, -21.5, 0.3),
        trained("conv2", -0.8, -20.5, -14),
        plain("pool2", 0.2, -20, 0.2),
        layer("cnn/flatten", tensor(rng, 0.2, 1.7, zeros=0.2), None),
        plain("dropout1", 0.4, -19, 0.3),
        trained("dense", 0.2, -17.5, -13.5),
        layer(
            "cnn/logits",
            tensor(rng, 1.2, 1.2),
            tensor(rng, -12, 2.8, scale),
            weights(-13),
            dtype="float32",
            risk=0.0,
            verdict="computes in float32; float16 would do",
        ),
    ]
    words = "All 8 layers fit float16 at the run's loss scale; any scale from 2^12 to 2^20 would do."
    history = [[0, 2.0**15], [100, scale]]
    return report(layers, words, scale=scale, loss_scale={"history": history})


def sick():
    """Outputs that overflow, gradients that underflow, skipped steps, no recommended scale at first, and an advice."""
    rng, scale = np.random.default_rng(2), 2.0**11
    healthy = mnist()["layers"]
    healthy[0] = layer(
        "cnn/conv1",
        tensor(rng, -1.5, 1.8),
        tensor(rng, -34, 3, scale, zeros=0.2),
        [("kernel", tensor(rng, -31, 3, scale)), ("bias", tensor(rng, -29, 2.5, scale, count=32))],
        risk=0.83,
        verdict="a fifth of the activation gradients rounds to zero at the run's loss scale, and its weights hardly move",
    )
    healthy[6] = layer(
        "cnn/dense",
        tensor(rng, 12.5, 1.9, nonfinite=160),
        tensor(rng, -6, 3.5, scale, nonfinite=40),
        [("kernel", tensor(rng, -3, 4, scale, nonfinite=25)), ("bias", tensor(rng, -3, 3, scale, count=128))],
        risk=1.0,
        verdict="outputs reach 2^18 and overflow float16; compute this layer in float32",
    )
    history = [[0, 2.0**15], [3, 2.0**14], [5, 2.0**13], [17, 2.0**12], [41, 2.0**11], [110, 2.0**12], [131, 2.0**11]]
    text = (
        "# 2 of 8 layers do not fit float16.\n"
        'config.precision.float32_layers = ("^cnn/dense$", "^cnn/conv1$")\n'
        "config.loss_scale.initial_scale = 2.0**16  # from 2^14 to 2^19 nothing overflows and under 1 % is lost\n"
        "config.loss_scale.dynamic = True\n"
    )
    check = {
        "before": {"skipped steps": 5, "layers at risk": 2, "loss": 0.9127},
        "after": {"skipped steps": 0, "layers at risk": 0, "loss": 0.2688},
    }
    advice = {"float32_layers": ["^cnn/dense$", "^cnn/conv1$"], "initial_scale": 2.0**16, "dynamic": True}
    return report(
        healthy,
        "2 of 8 layers do not fit float16: cnn/dense overflows, and the gradients of cnn/conv1 round to zero.",
        scale=scale,
        loss_scale={"recommended": None, "history": history, "skipped_steps": [3, 5, 17, 41, 131]},
        advice={**advice, "text": text, "check": check},
    )


def deep(blocks=40):
    """200 layers with long paths, gradients that shrink towards the input, static scale, no reference, parts missing."""
    rng, scale = np.random.default_rng(3), 2.0**10
    layers = []
    for i in range(blocks):
        path = f"encoder_with_a_long_name/transformer_layers/block_{i}"
        back = -30 + 14 * i / blocks
        for name in ("attention/query_key_value", "attention/output", "norm", "feed_forward/expand", "feed_forward/contract"):
            gradient = tensor(rng, back, 2.5, scale, compared=False, count=600) if name != "norm" else None
            kernel = [("kernel", tensor(rng, back + 3, 2.5, scale, compared=False, count=600))]
            lost = gradient["observed"]["zero"] if gradient else 0.0
            words = f"{lost:.0%} of its gradients are zero" if lost > 0.01 else "fits float16"
            output = tensor(rng, 1 + i / 10, 2, compared=False, count=600)
            layers.append(layer(f"{path}/{name}", output, gradient, kernel, risk=round(lost, 3), verdict=words))
    static = {"dynamic": False, "recommended": [2.0**14, 2.0**19]}
    words = f"{sum(one['at_risk'] for one in layers)} of {len(layers)} layers lose gradients at the static loss scale 2^10."
    return report(layers, words, scale=scale, loss_scale=static, reference_steps=0, collected_steps=20)


def bare():
    """A report of an evaluation in bfloat16: outputs only, one layer without anything."""
    rng = np.random.default_rng(4)
    layers = [layer(f"net/dense_{i}", tensor(rng, i, 2, compared=False), None, dtype="bfloat16", risk=0.0) for i in range(4)]
    layers.append(layer("net/identity", None, None, dtype="bfloat16", risk=0.0, verdict="nothing was collected"))
    static = {"dynamic": False, "recommended": None}
    words = "All 5 layers fit bfloat16."
    return report(layers, words, scale=1.0, loss_scale=static, reference_steps=0, precision="mixed_bfloat16")
