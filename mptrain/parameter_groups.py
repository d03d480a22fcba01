"""Parameter groups: variables that are trained with another learning rate or weight decay than the rest, or not at all.

`config.optimizer.groups` holds one mapping for each: "match", a regular expression; "learning_rate_factor", default 1;
"weight_decay", default that of the run; "frozen", default False. A variable belongs to the first group whose regex is found in
its path, so a variable is never updated twice.

Each group has an optimizer of its own, because that is the only way in which a factor scales the update and not the gradient,
which Adam and its kin divide out again. `LossScaleOptimizer` sees one optimizer: it clips by the norm of all groups together
and skips all or none. What is frozen it never meets: no slots, no all-reduce, no share of the norm; and nothing in the graph
asks for its gradient.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import keras
import tensorflow as tf

from mptrain import keras_compat, weight_decay
from mptrain.errors import InputError


@dataclasses.dataclass(frozen=True)
class Group:
    """One element of `config.optimizer.groups`; `weight_decay` None is the run's."""

    match: str = ""
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def __str__(self) -> str:
        if self.frozen:
            return "frozen"
        decay = "" if self.weight_decay is None else f", weight decay {self.weight_decay:g}"
        return f"learning rate × {self.learning_rate_factor:g}{decay}"


class GroupedOptimizer(tf.Module):
    """One Keras 3 optimizer for each group and one for the rest, which step together and look like one.

    Attributes:
        optimizers: that of the rest, then those of the groups that are not frozen.

    Args:
        groups: the elements of `config.optimizer.groups`.
        make: returns an optimizer for a group; called once for each that is not frozen and, with `Group()`, for the rest.
    """

    def __init__(self, groups: Iterable[Mapping], make: Callable[[Group], keras.optimizers.Optimizer]):
        super().__init__(name="grouped_optimizer")
        self._groups = [Group(**group) for group in groups]
        self._trained = [Group(), *(group for group in self._groups if not group.frozen)]
        self.optimizers = [make(group) for group in self._trained]
        self._owners = {}  # key of a variable -> its optimizer's place

    @property
    def iterations(self):
        return self.optimizers[0].iterations

    @property
    def learning_rate(self):
        """The learning rate of the variables that are in no group."""
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, value) -> None:
        for group, optimizer in zip(self._trained, self.optimizers, strict=True):
            optimizer.learning_rate = value * group.learning_rate_factor

    @property
    def variables(self) -> list:
        return [variable for optimizer in self.optimizers for variable in optimizer.variables]

    def is_frozen(self, variable) -> bool:
        """Whether a variable is to stay as it is."""
        group = _group_of(self._groups, variable)
        return group is not None and group.frozen

    def build(self, variables: Iterable) -> None:
        """Gives each variable to its group's optimizer, which creates its slots; weight decay leaves out biases and norms.

        Args:
            variables: those that are not frozen.

        Raises:
            InputError: if there is none.
        """
        variables = list(variables)
        if not variables:
            raise InputError("config.optimizer.groups freezes every variable: leave some to train")
        owners = [self._trained.index(_group_of(self._groups, variable) or Group()) for variable in variables]
        self._owners = {keras_compat.key(variable): owner for variable, owner in zip(variables, owners, strict=True)}
        for place, optimizer in enumerate(self.optimizers):
            own = [variable for variable, owner in zip(variables, owners, strict=True) if owner == place]
            weight_decay.exclude(optimizer, [each for each in own if not weight_decay.decays(each)])
            optimizer.build(own)

    def apply_gradients(self, grads_and_vars: Iterable[tuple]) -> None:
        """Updates variables in the replica it is called in; an optimizer that has none to update counts the step too."""
        pairs = [(self._owners[keras_compat.key(variable)], gradient, variable) for gradient, variable in grads_and_vars]
        for place, optimizer in enumerate(self.optimizers):
            own = [(gradient, variable) for owner, gradient, variable in pairs if owner == place]
            if own:
                optimizer.apply_gradients(own)
            else:
                optimizer.iterations.assign_add(1)


def check(groups: Iterable[Mapping], variables: Iterable) -> None:
    """Checks that each group has variables.

    Raises:
        InputError: if a regex is found in no path, or only in those of variables that an earlier group has.
    """
    groups, paths = [Group(**group) for group in groups], list(keras_compat.variables_by_path(variables))
    for number, group in enumerate(groups):
        found = [path for path in paths if re.search(group.match, path)]
        where = f"config.optimizer.groups[{number}].match: {group.match!r}"
        if not found:
            raise InputError(f"{where} is found in no variable's path; there are {_near(group.match, paths)}")
        if all(any(re.search(other.match, path) for other in groups[:number]) for path in found):
            raise InputError(f"{where} is found only in variables that an earlier group has, as {found[0]}: put it before that")


def describe(groups: Iterable[Mapping], variables: Iterable) -> list[str]:
    """Returns a line for each group: what it matches, how that is trained, and how much it is."""
    groups = [Group(**group) for group in groups]
    by_group = {group: [] for group in groups}
    for variable in variables:
        if (group := _group_of(groups, variable)) is not None:
            by_group[group].append(keras_compat.raw(variable))
    return [
        f"{group.match!r}: {group}; {len(own)} variables, {sum(variable.shape.num_elements() for variable in own):,} parameters"
        for group, own in by_group.items()
    ]


def _group_of(groups: Sequence[Group], variable) -> Group | None:
    path = keras_compat.path(variable)
    return next((group for group in groups if re.search(group.match, path)), None)


def _near(pattern: str, paths: Sequence[str]) -> str:
    """Returns up to five paths that a regex may have meant, the nearest first, and how many more there are."""
    plain = re.sub(r"[^\w/]", "", pattern)

    def likeness(path: str) -> float:
        parts = [path, *path.split("/"), *("/".join(path.split("/")[:depth]) for depth in range(2, 1 + path.count("/")))]
        return max(difflib.SequenceMatcher(None, plain, part).ratio() for part in parts)

    shown = sorted(paths, key=likeness, reverse=True)[:5]
    return ", ".join(shown) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
