"""Searches in an Optuna storage: studies, trials, samplers and pruners. The only module that imports optuna.

Every method of a search is one Optuna study, `<study>/<method>`. Its trials are made beforehand, as many as were asked
for, and workers take waiting ones: that is atomic in the storage, so there are never more, whoever is killed. A trial
whose worker is gone (no heartbeat) goes back to waiting with the settings it was given, under its own number.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState

from harness import fingerprint, journal
from harness.contracts import Choice, HarnessError
from harness.grid_setups import settings_of
from harness.search_space import Dimension, PairedDraws, digest
from harness.studies import LEAST_FOR_IMPORTANCE
from harness.tracking import redact
from harness.trials import Search

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
PATIENCE_SECONDS = 90.0  # how long a call waits for a storage that was there and is away, a database's restart say
SAMPLERS = ("tpe", "gp", "random", "qmc")
PRUNERS = ("asha", "hyperband", "median", "wilcoxon", "none")
REDUCTION = 3  # hyperband: one trial in so many goes on at a rung, each rung that many times the epochs
LOOKS = (1 / 4, 1 / 3, 1 / 2)  # asha: shares of the epochs after which the better half goes on
MEDIAN_LOOKS = 10  # rungs of the median pruner, at most
WILCOXON_SEEDS = 5  # with fewer the test could stop a trial at its last seed at the earliest
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
FINISHED_ELSEWHERE = UpdateFinishedTrialError  # what writing to a trial raises that is over

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


# --------------------------------------------------------------------------------------------------------- the storage


def default_storage(workspace: Path) -> str:
    """The workspace's own storage, `<workspace>/optuna.db`: `optuna-dashboard sqlite:///optuna.db` started there opens it."""
    return f"sqlite:///{workspace.resolve()}/optuna.db"


def _patient(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return getattr(self.inner, name)(*args, **kwargs)
            except Exception as error:
                lost = isinstance(error, StorageInternalError) or type(error).__module__.startswith("sqlalchemy")
                if not lost or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    return call


def _patient_storage(inner: BaseStorage) -> Any:
    """The storage with every call repeated while the database is away.

    A call whose answer was lost may be carried out twice; of those that count, making a trial can leave one too many
    waiting, which nobody takes (`claim`), and finishing one says that it is finished.
    """
    names = BaseStorage.__abstractmethods__ | BaseHeartbeat.__abstractmethods__ | {"remove_session"}
    kind: Any = type("PatientStorage", (BaseStorage, BaseHeartbeat), {name: _patient(name) for name in names})
    storage = kind()
    storage.inner = inner
    return storage


@functools.cache
def connect(url: str) -> Any:
    """The Optuna storage at an address. Raises HarnessError, without the password, where it cannot be reached."""
    kind, divider, rest = url.partition("://")
    shown = redact(url)
    if not divider or kind.partition("+")[0] not in ("sqlite", "postgresql", "postgres"):
        raise HarnessError(f"--storage {shown}: give sqlite:///FILE.db or postgresql://USER:PASSWORD@HOST/DATABASE")
    if kind.startswith("sqlite"):
        address, options = url, {"connect_args": {"timeout": 60}}
    else:
        if importlib.util.find_spec("psycopg") is None:
            raise HarnessError(f"--storage {shown}: PostgreSQL needs psycopg; pip install 'harness[postgres]'")
        address = f"postgresql+psycopg://{rest}"
        options = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}  # type: ignore[dict-item]
    try:
        with warnings.catch_warnings():  # heartbeats are called experimental
            warnings.simplefilter("ignore")
            storage = RDBStorage(
                address, engine_kwargs=options, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
            )
    except Exception as error:
        raise HarnessError(f"--storage {shown} cannot be reached ({type(error).__name__}); is the address right, and does "
                           "the server run?") from None  # fmt: skip
    return _patient_storage(get_storage(storage))


# ----------------------------------------------------------------------------------------------------------- a study


def definition(search: Search) -> dict[str, Any]:
    """What all trials of a study must have in common, as plain values."""
    layers = search.request.layers
    return {
        "method": search.method, "dataset": search.request.dataset, "objective": [one.name for one in search.objectives],
        "seeds": list(search.seeds), "labels": search.request.labels, "label_seed": search.request.label_seed,
        "recipe": [{"run": dict(r.run), "method": dict(r.methods.get(search.method, {}))} for r in layers.recipes],
        "settings": {**layers.flags, **layers.overrides}, "sampler": search.sampler, "pruner": search.pruner,
        "space": {one.key: one.facts() for one in search.space}, "keys": list(search.keys),
    }  # fmt: skip


def open_study(search: Search) -> optuna.Study:
    """The method's Optuna study, made when there is none. Raises HarnessError where it was made to search otherwise."""
    storage, wanted = connect(search.storage), definition(search)
    try:
        study = optuna.create_study(
            storage=storage, study_name=search.name, directions=[one.direction for one in search.objectives],
            pruner=_pruner(search),
        )  # fmt: skip
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=search.name, storage=storage, pruner=_pruner(search))
    known = study.user_attrs.get("definition")
    if known is None:
        attrs = {"sampler": search.sampler, "pruner": search.pruner, "sampler_seed": _seed(search),
                 "space_digest": digest(search.space), "definition": wanted}  # fmt: skip
        for key, value in attrs.items():
            study.set_user_attr(key, value)
    elif known != wanted:
        raise HarnessError(f"study '{search.study}' was made with another {_difference(known, wanted)}; give this search "
                           "a name of its own with --study")  # fmt: skip
    return study


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    key = next(key for key in wanted if known.get(key) != wanted[key])
    if key == "space":
        ranges = [k for k in sorted({*known[key], *wanted[key]}) if known[key].get(k) != wanted[key].get(k)]
        return f"search space ({', '.join(ranges[:3])})"
    return f"{key} ({known.get(key)})"


def _seed(search: Search, *parts: Any) -> int:
    return int(fingerprint.digest([search.study, *parts])[:8], 16)


def _pruner(search: Search) -> Any:
    with warnings.catch_warnings():  # wilcoxon and hyperband are called experimental
        warnings.simplefilter("ignore")
        return _make_pruner(search)


def _make_pruner(search: Search) -> Any:
    return {
        "asha": _BetterHalf,
        "hyperband": lambda: optuna.pruners.HyperbandPruner(1, _epochs(search), REDUCTION),
        "median": lambda: optuna.pruners.MedianPruner(),
        "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(),
        "none": lambda: optuna.pruners.NopPruner(),
    }[search.pruner]()


def _epochs(search: Search) -> int:
    return settings_of(search.request_of({}, search.seeds[0])).epochs


class _BetterHalf(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al., 2020): at each rung a trial goes on that is among the better half of those
    that have come so far.

    Optuna's own has rungs at powers of the reduction factor only. What a look between a quarter and half of the epochs saves
    and loses, whatever order trials come in: benchmarks/results/pruning-cpu-2026-11-26.txt.
    """

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        step = trial.last_step
        if step is None:
            return False
        sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
        mine = sign * trial.intermediate_values[step]
        others = [sign * other.intermediate_values[step] for other in study.get_trials(deepcopy=False)
                  if step in other.intermediate_values and other.number != trial.number]  # fmt: skip
        better = sum(not value <= mine for value in others if not math.isnan(value))  # NaN: worse than any
        return math.isnan(mine) or better >= max(1, (len(others) + 1) // 2)


def asha_looks(epochs: int) -> tuple[int, ...]:
    """The epochs after which `asha` judges a trial of so many."""
    return tuple(sorted({min(round(share * epochs), epochs // 2) for share in LOOKS} - {0}))


def rungs(search: Search, epochs: int) -> tuple[int, ...]:
    """After how many of `epochs` epochs the pruner wants to hear of a trial; `asha` and `hyperband` not later than half of
    them: a trial that has come so far costs little to finish, and its value is one more to choose from."""
    if search.pruner == "asha":
        return asha_looks(epochs)
    if search.pruner == "hyperband":
        return tuple(REDUCTION**n for n in range(64) if 2 * REDUCTION**n <= epochs)
    if search.pruner == "median":
        count = min(MEDIAN_LOOKS, epochs - 1)
        return tuple(sorted({round((n + 1) * epochs / (count + 1)) for n in range(count)}))
    return ()


class _Paired(optuna.samplers.BaseSampler):
    """Draws that depend on the study, the key and the trial's number alone: harness.search_space.PairedDraws."""

    def __init__(self, search: Search) -> None:
        self._draws = PairedDraws(search.keys, _seed(search))
        self._dimensions = {one.key: one for one in search.space}

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._dimensions[param_name].at(self._draws.share(param_name, trial.number))


def _sampler(search: Search, number: int) -> Any:
    """The sampler of one trial. Its seed is of the study, the method and the trial's number: no two workers propose the
    same, and neither does a command that goes on where another one stopped."""
    seed = _seed(search, search.method, number)
    if search.sampler == "qmc":
        return _Paired(search)
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if search.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _suggest(trial: optuna.Trial, one: Dimension) -> Any:
    if isinstance(one.search, Choice):
        return trial.suggest_categorical(one.key, one.search.values)
    if one.whole:
        return trial.suggest_int(one.key, int(one.search.low), int(one.search.high), log=one.search.log)
    return trial.suggest_float(one.key, one.search.low, one.search.high, log=one.search.log)


# ------------------------------------------------------------------------------------------------------------ trials


def prepare(search: Search) -> optuna.Study:
    """Open the study and make the trials that it lacks of those asked for."""
    search.request.workspace.mkdir(parents=True, exist_ok=True)
    study = open_study(search)
    for _ in range(search.trials - len(study.get_trials(deepcopy=False))):
        study.enqueue_trial({})
    return study


def revive(search: Search, study: optuna.Study) -> list[int]:
    """Send trials back to waiting whose worker is gone: no heartbeat, or its lock in this workspace free. Their numbers."""
    stale = set(study._storage._get_stale_trial_ids(study._study_id))
    gone = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = journal.lock_path(search.request.workspace, search.trial_journal(trial.number))
        if trial._trial_id in stale or (lock.exists() and not journal.is_alive(lock)):
            release(study, trial._trial_id)
            gone.append(trial.number)
    return gone


def release(study: optuna.Study, trial_id: int) -> None:
    """Send a running trial back to waiting; one that was finished meanwhile stays so."""
    try:
        study._storage.set_trial_state_values(trial_id, TrialState.WAITING)
    except UpdateFinishedTrialError:
        return


def waiting(study: optuna.Study) -> list[int]:
    """Numbers of the trials that wait."""
    return [trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,))]


def claim(search: Search, study: optuna.Study) -> optuna.Trial | None:
    """Take the waiting trial of the lowest number, for this caller alone; None when none of those asked for waits."""
    # On SQLite, Optuna reads a trial's state and sets it in two transactions: workers of a machine ask in turn.
    lock = journal.lock_path(search.request.workspace, f"{search.journal}-claim")
    with journal.hold(lock, wait_seconds=PATIENCE_SECONDS):
        for found in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if found.number >= search.trials or spent(study) >= (search.compute or math.inf):
                return None
            study._storage.record_heartbeat(found._trial_id)  # first: a claim without one would never go stale
            try:
                if study._storage.set_trial_state_values(found._trial_id, TrialState.RUNNING):
                    study.sampler = _sampler(search, found.number)
                    return optuna.Trial(study, found._trial_id)
            except UpdateFinishedTrialError:
                continue
    return None


def goes_on(trial: optuna.Trial, epoch: int, value: float) -> bool:
    """Tell the pruner of a trial's value after an epoch; whether it lets the trial go on. That is decided once: a trial that
    is begun again is not judged anew by what came meanwhile."""
    if epoch <= trial.user_attrs.get("passed", 0):
        return True
    if (
        epoch not in trial._cached_frozen_trial.intermediate_values
    ):  # told and not decided: its worker was killed between
        trial.report(value, epoch)
    if trial.should_prune():
        return False
    trial.set_user_attr("passed", epoch)
    return True


def suggest(search: Search, trial: optuna.Trial) -> dict[str, Any]:
    """The settings of a trial, by dotted key; those of one that was begun before are what they were."""
    return {one.key: _suggest(trial, one) for one in search.space}


@contextmanager
def beating(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Record the trial's heartbeat while the block runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            try:
                study._storage.record_heartbeat(trial._trial_id)
            except Exception:  # the storage is away for long: whoever writes to it next says so
                continue

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def finish(study: optuna.Study, trial: optuna.Trial, state: str, values: Sequence[float] | None = None) -> bool:
    """End a trial as `COMPLETE`, `PRUNED` or `FAIL`; False where another worker has ended it."""
    try:
        study.tell(trial, list(values) if values is not None else None, TrialState[state])
    except (UpdateFinishedTrialError, ValueError) as error:
        if isinstance(error, ValueError) and "Cannot tell" not in str(error):
            raise
        return False
    return True


def give_up(study: optuna.Study, number: int, reason: str) -> bool:
    """End a trial as failed that is not at work in a worker any more; False where it is finished."""
    found = study.get_trials(deepcopy=False)[number]
    if found.state in FINISHED:
        return False
    study._storage.set_trial_user_attr(found._trial_id, "reason", reason)
    study._storage.set_trial_state_values(found._trial_id, TrialState.FAIL)
    return True


def spent(study: optuna.Study) -> float:
    """Device seconds of a study's finished trials."""
    return sum(t.user_attrs.get("seconds", 0.0) for t in study.get_trials(deepcopy=False, states=FINISHED))


def unfinished(search: Search, study: optuna.Study) -> int:
    """How many of the trials asked for run or, within the cap on compute, wait."""
    capped = spent(study) >= (search.compute or math.inf)
    states = (TrialState.RUNNING,) if capped else (TrialState.RUNNING, TrialState.WAITING)
    return sum(trial.number < search.trials for trial in study.get_trials(deepcopy=False, states=states))


# ----------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class TrialRecord:
    """One trial as plain values. state: in Optuna's words; values: one per objective, None where it failed;
    intermediate: value of a probe by epochs done, under `wilcoxon` of a seed by its place; attrs: its user attributes
    (reason, seconds, epochs, seeds, pretrain_ids, eval_ids)"""

    number: int
    state: str
    values: tuple[float, ...] | None
    params: dict[str, Any]
    intermediate: dict[int, float]
    attrs: dict[str, Any]
    started: str | None
    finished: str | None


def read_trials(storage: str, name: str) -> list[TrialRecord]:
    """The trials of the Optuna study `<study>/<method>`. Raises HarnessError where there is no such study."""
    try:
        study = optuna.load_study(study_name=name, storage=connect(storage))
    except KeyError:
        raise HarnessError(f"there is no study '{name}' in {redact(storage)}") from None
    return [_record(trial) for trial in study.get_trials(deepcopy=False)]


def _record(trial: Any) -> TrialRecord:
    moments = [
        None if m is None else m.isoformat(timespec="seconds") for m in (trial.datetime_start, trial.datetime_complete)
    ]
    return TrialRecord(trial.number, trial.state.name, None if trial.values is None else tuple(trial.values),
                       dict(trial.params), dict(trial.intermediate_values), dict(trial.user_attrs), *moments)  # fmt: skip


def study_names(storage: str) -> list[str]:
    """Names of the Optuna studies in a storage, `<study>/<method>` each."""
    return sorted(optuna.get_all_study_names(connect(storage)))


def best_numbers(storage: str, name: str) -> list[int]:
    """Numbers of the best trials: one, or with several objectives the Pareto set."""
    study = optuna.load_study(study_name=name, storage=connect(storage))
    complete = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if not complete:
        return []
    return [t.number for t in study.best_trials] if len(study.directions) > 1 else [study.best_trial.number]


def importances(storage: str, name: str) -> dict[str, float]:
    """Share of each varied setting in reaching the best values of the first objective (PED-ANOVA: Watanabe, Bansal &
    Hutter, IJCAI 2023), largest first; empty where too few trials are complete or nothing varied.

    The best are a tenth of the trials, but five at least and half at most. Of five settings one that alone matters (noise:
    0.3 of the objective's deviation) stands first in 63, 77, 81 and 80% of searches of 8, 10, 12 and 20 trials; with
    Optuna's plain tenth in 19, 23, 35 and 47% (150 searches each).
    """
    study = optuna.load_study(study_name=name, storage=connect(storage))
    complete = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if len(complete) < LEAST_FOR_IMPORTANCE or len({t.values[0] for t in complete}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(complete))))
    best_is_high = study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
    target = None if len(study.directions) == 1 else lambda t: -t.values[0] if best_is_high else t.values[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, target=target))


def read_definition(storage: str, name: str) -> dict[str, Any] | None:
    """What the trials of the Optuna study `<study>/<method>` have in common, as `definition` has it; None: not ours."""
    found: dict[str, Any] | None = optuna.load_study(study_name=name, storage=connect(storage)).user_attrs.get(
        "definition"
    )
    return found
