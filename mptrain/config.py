"""Every field of a run's config, once, with its unit and meaning; `config_check.py` checks values.

A config file is a Python file with `get_config()` that calls `default_config()` and changes what it needs:

    from mptrain import default_config

    def get_config():
        config = default_config()
        config.trainer = "experiments.mnist.MnistTrainer"
        config.train.epochs = 6
        return config

Durations are in steps or in epochs, see `durations.py`; `--config=FILE.py:TEXT` hands get_config its one argument.
"""

import contextlib
import difflib
from collections.abc import Iterator

from ml_collections import ConfigDict, config_dict

from mptrain.errors import InputError

MODES = (
    "train",
    "eval",
    "train_and_eval",
    "continuous_eval",
    "export",
    "verify_resume",
    "numerics",
    "parity",
    "sweep",
)
PRECISIONS = ("auto", "native", "float32", "mixed_float16", "mixed_bfloat16")
EXPORTED = ("float32", "as_trained")
COMPARED = ("native", "mixed_float16", "mixed_bfloat16")  # with float32, in --mode=parity
SCHEDULES = ("constant", "cosine", "linear", "rsqrt", "piecewise")
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")
LOGGERS = ("wandb", "mlflow")  # packages, each an extra
CLUSTERS = ("auto", "tf_config", "slurm", "kubernetes")

# Groups whose fields an experiment, or the optimizer's class, names itself.
FREE_GROUPS = ("model", "optimizer.options")

# What may differ between the runs that share a folder: where and how often, never what is computed.
RESUMABLE = (
    "train.steps",
    "train.epochs",
    "train.steps_per_loop",
    "train.jit_compile",
    "train.time_limit",
    "eval.",
    "early_stop.",
    "nan_guard.",
    "profile.",
    "log.",
    "export.",
    "checkpoint.",
    "devices.",
    "data.eval_batch_size",
    "verify_resume.",
    "numerics.",
    "parity.",
)


def _either(default):
    """A field that takes values of several types, such as "auto" or a bool."""
    return config_dict.FieldReference(default, field_type=object)


def default_config() -> ConfigDict:
    """Returns the locked config that holds every field with its default."""
    config = ConfigDict()
    config.seed = 0  # initial weights, data order, dropout: all follow from it and the step
    config.trainer = config_dict.placeholder(str)  # "package.module.Class", a subclass of mptrain.Trainer
    config.model = ConfigDict()  # the experiment's own fields

    config.precision = ConfigDict()
    config.precision.policy = "auto"  # auto | native | float32 | mixed_float16 | mixed_bfloat16
    config.precision.float32_layers = ()  # regexes; layers in whose path one is found compute in float32

    config.loss_scale = ConfigDict()  # used where the compute dtype is float16, and only there
    config.loss_scale.dynamic = True  # False: the scale stays at initial_scale
    config.loss_scale.initial_scale = 2.0**15
    config.loss_scale.growth_interval = 2000  # applied steps in a row before the scale grows
    config.loss_scale.growth_factor = 2.0
    config.loss_scale.backoff_factor = 0.5  # what an overflow multiplies the scale by
    config.loss_scale.min_scale = 1.0
    config.loss_scale.max_scale = 2.0**24
    config.loss_scale.hysteresis = 1  # overflows that are needed before the scale goes down
    config.loss_scale.max_consecutive_skips = 50  # skipped steps in a row that end the run; in every precision

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # a Keras 3 optimizer, by class name in any case
    config.optimizer.learning_rate = 1e-3  # peak, that is: after warm-up
    config.optimizer.weight_decay = 0.0  # decoupled; biases and norms are left out
    config.optimizer.clip_norm = 0.0  # global norm of the unscaled gradients; 0: no clipping

    config.optimizer.accumulation_steps = 1  # steps that make one update, with the mean of their gradients
    config.optimizer.ema_momentum = 0.0  # of the moving average of the weights that is evaluated and exported; 0: none
    config.optimizer.options = ConfigDict()  # more arguments of the optimizer's class, such as momentum
    # Variables that are trained otherwise, by regexes over their paths; of several that match the first counts. For instance
    # ({"match": "^encoder/", "learning_rate_factor": 0.1, "weight_decay": 0.0}, {"match": "embedding", "frozen": True})
    config.optimizer.groups = ()

    config.schedule = ConfigDict()  # of the learning rate, over the steps of applied updates
    config.schedule.name = "constant"  # constant | cosine | linear | rsqrt | piecewise
    config.schedule.warmup_steps = 0  # linear, from 0
    config.schedule.warmup_epochs = config_dict.placeholder(float)
    config.schedule.end_factor = 0.0  # cosine, linear: final learning rate as a share of the peak
    config.schedule.boundaries_steps = ()  # piecewise: where the next of `factors` begins; ascending
    config.schedule.boundaries_epochs = ()
    config.schedule.factors = ()  # piecewise: from each boundary on, the learning rate as a share of the peak

    config.data = ConfigDict()
    config.data.name = "mnist"  # mnist (embedded) | idx | npz | bytes (text) | synthetic | tfds:NAME
    config.data.dir = ""  # idx: folder; npz: folder or file; bytes: folder or file; tfds: its data folder, if not the usual
    config.data.pattern = "*"  # bytes: names of the files to take from the folder
    config.data.exclude = ()  # bytes: names, with wildcards, of files and of folders inside it that are left out
    config.data.context = 256  # bytes: bytes in one example
    config.data.eval_fraction = 0.1  # bytes: share of the text, at its end, that is for evaluation
    config.data.examples = 60_000  # synthetic: how many, for training and for evaluation each
    config.data.shape = (28, 28, 1)  # synthetic: of one example's inputs
    config.data.classes = 10  # synthetic
    config.data.batch_size = 128  # global: over all replicas
    config.data.eval_batch_size = 500  # global

    config.train = ConfigDict()  # exactly one of steps and epochs
    config.train.steps = config_dict.placeholder(int)  # attempted steps; skipped ones count
    config.train.epochs = config_dict.placeholder(float)  # passes over the training set
    config.train.steps_per_loop = _either(100)  # steps in the graph between two rows of the log; "auto": about a second's
    config.train.jit_compile = _either("auto")  # "auto" | True | False: XLA for the train step
    config.train.time_limit = _either(0)  # seconds, or "2h30m": saves and ends there, for the next command to go on; 0: none

    config.eval = ConfigDict()
    config.eval.every_steps = config_dict.placeholder(int)  # absolute multiples
    config.eval.every_epochs = 1.0
    config.eval.checkpoint = _either("newest")  # --mode=eval: newest | best (as checkpoint.best_metric says) | a step
    config.eval.timeout = 3600.0  # --mode=continuous_eval: seconds without news of the run that end it; 0: waits for ever
    config.eval.steps = 0  # batches in one evaluation, the first ones of the data; 0: all

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # absolute multiples; the last step is always saved
    config.checkpoint.every_epochs = config_dict.placeholder(float)
    config.checkpoint.keep = 3  # newest ones
    config.checkpoint.keep_best = 0  # beside them those of the best evaluations, which are saved for it
    config.checkpoint.best_metric = "loss"  # what "best" means: a metric of the evaluation
    config.checkpoint.best_mode = "min"  # min | max
    config.checkpoint.async_save = False  # True: a thread writes while training goes on; one interval behind at most
    config.checkpoint.restart_if_damaged = False  # True: begin anew where there are checkpoints and none is whole

    config.export = ConfigDict()  # --mode=export
    config.export.checkpoint = _either("newest")  # newest | best (as checkpoint.best_metric says) | a step
    config.export.precision = "float32"  # float32 | as_trained: 16-bit layers compute as in evaluation, with the same bits
    config.export.onnx = False  # True: model.onnx too; needs tf2onnx
    config.export.at_end = False  # True: also when training has ended

    config.early_stop = ConfigDict()  # ends the run when evaluations do not get better any more
    config.early_stop.metric = ""  # of the evaluation; "": off
    config.early_stop.mode = "min"  # min | max: what is better
    config.early_stop.patience = 5  # evaluations in a row without improvement
    config.early_stop.min_delta = 0.0  # by how much a value must be better than the best one

    config.plateau = ConfigDict()  # reduces the learning rate then; on top of the schedule
    config.plateau.metric = ""  # of the evaluation; "": off
    config.plateau.mode = "min"  # min | max
    config.plateau.factor = 0.1  # what the rate is multiplied by
    config.plateau.patience = 3  # evaluations in a row without improvement
    config.plateau.cooldown = 0  # evaluations after a reduction that do not count
    config.plateau.min_delta = 0.0
    config.plateau.min_learning_rate = 0.0  # below which no reduction takes it

    config.nan_guard = ConfigDict()  # ends the run when what it watches is NaN or inf, though gradients are finite
    config.nan_guard.patience = 3  # loops in a row, or evaluations; 0: never
    config.nan_guard.metrics = ()  # (): the loss and all metrics

    config.profile = ConfigDict()  # for TensorBoard
    config.profile.start_step = 10  # behind the first steps, in which graphs are traced
    config.profile.steps = 0  # 0: none

    config.log = ConfigDict()  # beside TensorBoard and metrics.jsonl
    config.log.loggers = ()  # of "wandb", "mlflow", and subclasses of mptrain.Logger, as "package.module.Class"
    config.log.project = (
        ""  # W&B: project; MLflow: experiment; "": what their environment variables say, or the Trainer's module
    )
    config.log.name = ""  # of the run there; "": the name of the run's folder
    config.log.tags = ()  # words, or "key=value"
    config.log.mlflow_uri = ""  # of MLflow's server or store; "": what MLFLOW_TRACKING_URI says
    config.log.wandb_mode = ""  # online | offline; "": what WANDB_MODE says

    config.devices = ConfigDict()
    config.devices.strategy = "auto"  # auto | one_device | mirrored (all GPUs) | multi_worker | tpu
    config.devices.virtual_cpus = 0  # logical CPU replicas, to try distribution on a laptop; 0: none
    config.devices.deterministic = False  # True: TensorFlow's deterministic kernels; GPUs need them for equal bits, and pay
    config.devices.sync_batch_norm = False  # True: BatchNorm normalizes over the global batch, not each replica's share
    config.devices.cluster = "auto"  # multi_worker: who says who the workers are: auto | tf_config | slurm | kubernetes
    config.devices.communication = "auto"  # multi_worker: auto | ring | nccl
    config.devices.start_timeout = (
        300.0  # multi_worker: seconds for all workers to come, and again for TensorFlow to connect them
    )
    config.devices.port = 8470  # slurm, kubernetes: of the first worker on a host
    config.devices.workers = 0  # kubernetes: how many pods
    config.devices.kubernetes_pods = ""  # kubernetes: the label that the pods share, such as "job-name=mnist"
    config.devices.tpu = ""  # tpu: name or address; "local" on a TPU VM; "": what the environment says

    config.verify_resume = ConfigDict()  # --mode=verify_resume
    config.verify_resume.steps = 100  # that are trained straight, and again with kills
    config.verify_resume.kills = 5

    config.numerics = ConfigDict()
    config.numerics.provenance = True  # compute a skipped step again, to say which layer overflowed first
    config.numerics.every_steps = 0  # exponents in TensorBoard, at absolute multiples; 0: none
    config.numerics.every_epochs = config_dict.placeholder(float)
    config.numerics.layers = ("",)  # regexes; of the layers in whose path one is found
    config.numerics.steps = 200  # --mode=numerics: that are trained and looked at
    config.numerics.reference_every = 8  # --mode=numerics: each so many of them are computed in float32 too

    config.parity = ConfigDict()  # --mode=parity
    config.parity.steps = 200  # that each precision is trained
    config.parity.precisions = ()  # of native, mixed_float16, mixed_bfloat16; (): the run's own, or both of a float32 run
    config.parity.every_steps = 10  # each so many are compared; takes 8 bytes a parameter on disk each, for as long as it runs
    # Relative error above which two runs have parted: gradients of healthy networks showed up to 0.09, planted faults 0.8 on.
    config.parity.bound = 0.25

    config.lock()
    for path in FREE_GROUPS:
        config[path].unlock()
    return config


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted path, value) of every field; groups named in `FREE_GROUPS` count as one field each."""
    for name in config:
        value, path = config[name], f"{prefix}{name}"
        if isinstance(value, ConfigDict) and path not in FREE_GROUPS:
            yield from fields(value, f"{path}.")
        else:
            yield path, value.to_dict() if isinstance(value, ConfigDict) else value


def from_fields(values: dict[str, object]) -> ConfigDict:
    """Returns the config whose `fields` are `values`, as a run's config.json holds them.

    Raises:
        InputError: for a field that does not exist, or a value of another type.
    """
    config = default_config()
    for path, value in values.items():
        set_field(config, path, value)
    for path in FREE_GROUPS:
        config[path].unlock()
    return config


def copied(config: ConfigDict) -> ConfigDict:
    """Returns a copy whose fields take what they took; those of ConfigDict's own copies take one type only."""
    return from_fields(dict(fields(config)))


def set_field(config: ConfigDict, path: str, value: object) -> None:
    """Sets one field; a list does for a tuple, a mapping for a free group, and whatever it was named, a field in a free group.

    Raises:
        InputError: for a field that does not exist, or a value of another type.
    """
    holder, leaf = place(config, path)
    free = any(path.startswith(f"{group}.") for group in FREE_GROUPS)
    if leaf not in holder and not free:
        raise InputError(unknown_field(path))
    if path in FREE_GROUPS:
        value = ConfigDict(value)
        value.unlock()
    elif isinstance(holder.get(leaf), tuple) and isinstance(value, list):
        value = tuple(value)  # JSON knows lists only
    elif not free and holder.get_type(leaf) is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        with holder.unlocked(), holder.ignore_type() if free or path in FREE_GROUPS else contextlib.nullcontext():
            holder[leaf] = value
    except (TypeError, ValueError) as error:
        raise InputError(f"config.{path} is {value!r}: write a value of type {holder.get_type(leaf).__name__}") from error


def place(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """Returns the group in which a field is, and its name there.

    Raises:
        InputError: if there is no such group.
    """
    group, _, leaf = path.rpartition(".")
    try:
        holder = config[group] if group else config
    except (KeyError, AttributeError) as error:
        raise InputError(unknown_field(path)) from error
    if not isinstance(holder, ConfigDict):
        raise InputError(unknown_field(path))
    return holder, leaf


def nearest(path: str) -> str:
    """Returns the end of a sentence that names the field most like `path`, or says where the fields are listed."""
    known = [name for name, _ in fields(default_config())]
    close = difflib.get_close_matches(path, known, 1, 0.6)
    if not close:
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(path.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
    return f"did you mean {close[0]!r}?" if close else "all fields are listed in mptrain/config.py"


def unknown_field(path: str) -> str:
    """Returns the one-line message for a config field that does not exist."""
    return f"unknown config field {path!r}: {nearest(path)}"


def differences(old: dict, new: dict) -> dict[str, tuple[object, object]]:
    """Returns {field: (old value, new value)} for two configs flattened by `dict(fields(config))`."""
    absent = "(absent)"
    paths = sorted(old.keys() | new.keys())
    pairs = {path: (old.get(path, absent), new.get(path, absent)) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def is_resumable(path: str) -> bool:
    """Whether a run may be resumed with another value of the field `path`."""
    return path.startswith(RESUMABLE)
