"""Optuna's search: each trial learns from those before. Optuna is an extra, imported when it is used."""

import pathlib
from collections.abc import Iterator, Mapping

from mptrain.errors import InputError
from mptrain.sweep.search import Choice, Search

_JOURNAL = "optuna.journal"


class Optuna(Search):
    """Tree-structured Parzen estimator (Bergstra et al., 2011) by Optuna, whose study lies in the sweep's folder.

    Each trial has a sampler with a seed of its own, so that a sweep that was stopped goes on as if it had not been.

    Raises:
        InputError: if Optuna is not installed.
    """

    kind = "optuna"

    def __init__(self, *, trials: int, space: Mapping, seed: int = 0, metric: str | None = None, mode: str | None = None):
        super().__init__(space, trials, metric, mode)
        try:
            import optuna
        except ImportError as error:
            raise InputError("mptrain.sweep.optuna needs Optuna: pip install 'mptrain[optuna]'") from error
        self._optuna = optuna
        self._seed = seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def open(self, folder: pathlib.Path, mode: str) -> None:
        backend = self._optuna.storages.journal.JournalFileBackend(str(folder / _JOURNAL))
        self._study = self._optuna.create_study(
            storage=self._optuna.storages.JournalStorage(backend),
            study_name="sweep",
            direction={"min": "minimize", "max": "maximize"}[mode],
            load_if_exists=True,
        )

    def ask(self, number: int) -> dict:
        asked = self._study.get_trials(deepcopy=False)
        if number <= len(asked):
            return self._values(asked[number - 1].params)
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed + number)
        return self._values(self._study.ask(self._distributions()).params)

    def tell(self, number: int, value: float | None) -> None:
        states = self._optuna.trial.TrialState
        if not self._study.get_trials(deepcopy=False)[number - 1].state.is_finished():
            self._study.tell(number - 1, value, state=states.FAIL if value is None else states.COMPLETE)

    def samples(self) -> Iterator[dict]:
        """Yields the ends of each range, with the first values of all others: which trials there will be nobody knows."""
        first = {path: values.ends()[0] for path, values in self.space.items()}
        for path, values in self.space.items():
            for end in values.ends():
                yield {**first, path: end}

    def _distributions(self) -> dict:
        found, home = {}, self._optuna.distributions
        for path, values in self.space.items():
            if isinstance(values, Choice):  # by their places, because Optuna keeps numbers and text only
                found[path] = home.CategoricalDistribution(range(len(values.values)))
            elif values.whole:
                found[path] = home.IntDistribution(values.low, values.high)
            else:
                found[path] = home.FloatDistribution(values.low, values.high, log=values.log)
        return found

    def _values(self, params: Mapping) -> dict:
        return {
            path: values.values[params[path]] if isinstance(values, Choice) else params[path]
            for path, values in self.space.items()
        }
