"""Seeds trained together: each seed's result is that of its separate run, or the reason for doing without is named."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import harness
from harness import pretrain, registry, seeds, stacked
from harness.arms import Request, build_method, make_plan
from harness.batches import Batches
from harness.config import Layers, RunConfig, resolve
from harness.contracts import Batch, DatasetInfo, HarnessError, Method
from harness.optim import OptimConfig, ScheduleConfig
from harness.runner import ArmRun, Silent, _leave_groups, evaluation_request, execute

CPU = torch.device("cpu")
SEEDS = (3, 8)
STEPS, BATCH, IMAGES = 4, 16, 40  # two epochs of two steps
METHODS = [name for name in registry.names("method") if registry.load_method(name).trains]
SETTINGS: dict[str, Any] = {"hidden": 8, "out": 8}  # of heads, where a method has them: small ones are enough


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor, DatasetInfo]:
    plugin, _ = registry.load_dataset("digits")
    data = plugin(Path(), None, None)
    split = data.split("train")
    return split.images[:IMAGES].contiguous(memory_format=torch.channels_last), split.labels[:IMAGES], data.info


def config(name: str, seed: int = 0, **overrides: Any) -> RunConfig:
    fields = registry.load_method(name).Config.model_fields
    own = {f"method.{key}": value for key, value in SETTINGS.items() if key in fields}
    return resolve(name, "digits", Layers(flags={"seed": seed}, overrides={**own, **overrides}),
                   default_encoder="convnet_small")  # fmt: skip


def methods(name: str, dtype: torch.dtype = torch.float32) -> list[Method]:
    info = digits()[2]
    return [build_method(name, config(name, seed), info).to(dtype) for seed in SEEDS]


def batches() -> list[Batches]:
    return [Batches(digits()[0], None, batch_size=BATCH, seed=seed, device=CPU) for seed in SEEDS]


def plan(bf16: bool = False, **optim: Any) -> pretrain.Plan:
    return pretrain.Plan(STEPS, SEEDS[0], OptimConfig(**{"lr": 0.02, **optim}), ScheduleConfig(), bf16)


def apart(modules: list[Method], p: pretrain.Plan) -> list[pretrain.Finished]:
    return [pretrain.train(m, data, p, None, lambda *_: None) for m, data in zip(modules, batches(), strict=True)]


def together(modules: list[Method], p: pretrain.Plan, folder: Path | None = None) -> list[pretrain.Finished]:
    return stacked.train(modules, batches(), p, folder, lambda *_: None)


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Over all tensors, of the largest entry of each; a tensor of zeros is compared as it is."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)) for a, b in pairs)


def curves_close(one: list[pretrain.Finished], other: list[pretrain.Finished], rtol: float) -> bool:
    return all(
        a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=rtol)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first.curve, second.curve, strict=True)
    )


def reason_of(name: str) -> str | None:
    """Why a method's seeds are trained one by one, by what it declares."""
    plugin = registry.load_method(name)
    if plugin.supervised:
        return "each seed has its own labelled images"
    looks = plugin.on_epoch_start is not Method.on_epoch_start
    return "it looks at the data before each epoch" if looks else None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_each_seed_its_separate_result_or_says_why_not(name: str) -> None:
    """In float64, where neither a rounded ReLU nor a tie in a max pooling can look like an error (some heads stay in
    float32, so not to float64's last digits)."""
    info = digits()[2]
    reason = stacked.obstacle(build_method(name, config(name), info), config(name))
    assert reason == reason_of(name)
    if reason:
        return
    separate, group = methods(name, torch.float64), methods(name, torch.float64)
    before = copy.deepcopy(group)
    expected, found = apart(separate, plan()), together(group, plan())
    assert curves_close(found, expected, 1e-6)
    for first, own, mine in zip(before, separate, group, strict=True):
        assert largest_difference(mine, own) < 1e-5
        assert largest_difference(mine, first) > 1e-3  # it has learnt something at all
    assert largest_difference(group[0], group[1]) > 1e-3


@pytest.mark.parametrize("optim", [{"name": "adamw", "lr": 1e-3}, {"weight_decay": 0.5}, {"nesterov": False}])
def test_every_optimiser_keeps_the_seeds_apart(optim: dict[str, Any]) -> None:
    separate, group = methods("rotation", torch.float64), methods("rotation", torch.float64)
    apart(separate, plan(**optim)), together(group, plan(**optim))
    for own, mine in zip(separate, group, strict=True):
        assert largest_difference(mine, own) < 1e-5


@pytest.mark.parametrize("name", [n for n in METHODS if reason_of(n) is None])
def test_in_float32_within_the_golden_tolerance(name: str) -> None:
    """Small steps: one ReLU that rounds to the other side turns sc's gradient by 1%, in a separate run as well."""
    # dcgan's two networks answer each other's rounding; vicregl's loss is large, and a cell can find another partner
    p = plan(lr={"dcgan": 0.0005, "vicregl": 0.0005}.get(name, 0.002))
    separate, group = methods(name), methods(name)
    before = copy.deepcopy(separate)
    expected, found = apart(separate, p), together(group, p)
    assert curves_close(found, expected, 1e-4)
    for first, own, mine in zip(before, separate, group, strict=True):
        for old, one, other in zip(*(m.state_dict().values() for m in (first, own, mine)), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-5)
            assert old.shape == one.shape
        moved = [float((a - b).detach().abs().max()) for a, b in zip(first.parameters(), own.parameters(), strict=True)]
        assert max(moved) > 2e-4


def test_bf16_reaches_the_convolutions() -> None:
    """Inside vmap autocast leaves them out; so a loss equal to float32's would mean that nothing was cast."""
    losses = {}
    for bf16 in (False, True):
        for kind, run in (("apart", apart), ("together", together)):
            losses[kind, bf16] = run(methods("simclr"), plan(bf16=bf16))[0].curve[-1]["loss"]
    assert losses["together", True] != pytest.approx(losses["together", False], rel=2e-6)
    assert losses["together", True] == pytest.approx(losses["apart", True], rel=2e-3)


def test_a_stopped_group_resumes_with_the_same_bits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    p = pretrain.Plan(12, 0, OptimConfig(lr=0.02), ScheduleConfig(), False, checkpoint_seconds=0.0)
    straight, resumed = methods("byol"), methods("byol")
    expected = together(straight, p)
    with pytest.raises(Stop):
        stacked.train(methods("byol"), batches(), p, tmp_path, stop)
    found = together(resumed, p, tmp_path)
    assert found[0].executed == 2 < expected[0].executed
    assert [f.curve for f in found] == [f.curve for f in expected]
    for one, other in zip(straight, resumed, strict=True):
        assert largest_difference(one, other) == 0


def test_seconds_are_shared() -> None:
    group = together(methods("rotation"), plan())
    assert group[0].seconds == group[1].seconds
    assert len({len(f.curve[0]) for f in group}) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optim.name": "lars"}, "LARS"), ({"optim.clip_norm": 1.0}, "clip_norm"), ({"schedule.name": "plateau"}, "plateau"),
        ({"accumulate": 2}, "accumulate"), ({"activation_checkpointing": True}, "checkpointing"), ({}, None),
    ],
)  # fmt: skip
def test_what_would_mix_the_seeds_is_named(overrides: dict[str, Any], words: str | None) -> None:
    settings = config("rotation", **overrides)
    found = stacked.obstacle(build_method("rotation", settings, digits()[2]), settings)
    assert found is None if words is None else found is not None and words in found


class Odd(Method):
    """A method that does one thing that a group cannot."""

    def __init__(self, deed: str) -> None:
        nn.Module.__init__(self)
        self.deed = deed
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(1))
        self.drop = nn.Dropout(0.5) if deed == "dropout" else nn.Identity()

    def loss(self, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        if self.deed == "replace":
            self.count = self.count + 1
        noise = torch.rand(4) if self.deed == "draw" else torch.ones(4)
        loss = (self.weight * noise * batch.images.float().mean()).square().sum()
        if self.deed == "infinite":
            loss = loss + torch.where((step >= 2) & (batch.seeds[0] == first_seed(SEEDS[1], 2)), torch.inf, 0.0)
        return {"loss": loss}

    def on_epoch_start(self, data: Any, epoch: int) -> None:
        return


class Plain(Odd):
    on_epoch_start = Method.on_epoch_start


def first_seed(seed: int, step: int) -> Tensor:
    return Batches(digits()[0], None, batch_size=BATCH, seed=seed, device=CPU).at(step).seeds[0]


def test_reasons_that_only_the_module_or_the_step_shows() -> None:
    settings = config("rotation")
    assert "each epoch" in str(stacked.obstacle(Odd("nothing"), settings))
    assert "dropout" in str(stacked.obstacle(Plain("dropout"), settings))
    assert stacked.obstacle(Plain("nothing"), settings) is None
    together([Plain("nothing"), Plain("nothing")], plan())
    with pytest.raises(RuntimeError, match="random"):
        together([Plain("draw"), Plain("draw")], plan())
    with pytest.raises(RuntimeError, match="buffer count is replaced"):
        together([Plain("replace"), Plain("replace")], plan())


def test_a_bad_loss_in_one_seed_is_seen() -> None:
    assert together([Plain("infinite"), Plain("infinite")], plan())[0].failed_at == 2


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-4", (0, 1, 2, 3, 4)), ("3,5,7-9", (3, 5, 7, 8, 9)), ("2", (2,)), (" 1 , 1-2,2", (1, 2)), ("7-7", (7,))],
)
def test_seeds_are_parsed(text: str, numbers: tuple[int, ...]) -> None:
    assert stacked.parse_seeds(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1-2-3", "1.5", "0-999999", "٣", "9" * 30])
def test_malformed_seeds_are_one_line(text: str) -> None:
    with pytest.raises(HarnessError, match="--seeds") as error:
        stacked.parse_seeds(text)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- whole commands

FAST: dict[str, Any] = {
    "method": "sc", "dataset": "digits", "epochs": 1, "labels": "10pc", "control": False, "tracking": "none",
    "evaluators": ["knn"], "seeds": [0, 1],
}  # fmt: skip
FIXED = {"num_threads": 1, "precision": "fp32", "data.num_pretrain_images": 256, "optim.lr": 0.02}


def run(workspace: Path, **changes: Any) -> pd.DataFrame:
    settings = {**FAST, **changes}
    return harness.run(workspace=workspace, set={**FIXED, **settings.pop("set", {})}, **settings)


def steps_executed(workspace: Path) -> int:
    lines = [json.loads(line) for p in (workspace / ".harness" / "journals").glob("*.jsonl") for line in p.open()]
    return sum(record["executed"] for record in lines if record["kind"] == "steps")


def test_a_stacked_command_has_the_rows_of_the_separate_one(tmp_path: Path) -> None:
    separate, group = run(tmp_path / "apart"), run(tmp_path / "together", stack_seeds="on")
    keys = ["seed", "evaluator", "readout", "split", "metric"]
    both = separate[separate.evaluator == "knn"].merge(group, on=keys, suffixes=("", "_group"), validate="1:1")
    assert set(both.seed) == {0, 1} and set(both.metric) >= {"top1"}
    assert (both.value - both.value_group).abs().max() < 0.01
    assert set(separate.pretrain_id).isdisjoint(group.pretrain_id)
    assert not any("stacked_seeds" in settings for settings in separate.config)
    assert all(settings["stacked_seeds"] == [0, 1] for settings in group.config)
    executed = steps_executed(tmp_path / "together")
    assert executed == steps_executed(tmp_path / "apart") == 2 * 2
    again = run(tmp_path / "together", stack_seeds="on")
    assert steps_executed(tmp_path / "together") == executed
    assert set(again.eval_id) == set(group.eval_id)
    # one seed alone, and the same seeds apart, are the identities that they always were
    alone = run(tmp_path / "apart", seeds=None, seed=1)
    assert set(alone.pretrain_id) == set(separate[separate.seed == 1].pretrain_id)
    # measuring a stacked run again finds its weights
    more = harness.evaluate(
        "latest", workspace=tmp_path / "together", labels="5pc", evaluators=["knn"], tracking="none", control=False
    )
    assert set(more.pretrain_id) <= set(group[group.seed == 1].pretrain_id)
    assert steps_executed(tmp_path / "together") == executed


def test_a_group_that_fails_is_trained_one_by_one(tmp_path: Path) -> None:
    broken = {"set": {"optim.lr": 1e38, "method.distance": "squared"}}
    rows = run(tmp_path, stack_seeds="on", **broken)
    assert set(rows.status) == {"NONFINITE"} and len(rows) == 2
    assert set(rows.pretrain_id) == set(run(tmp_path / "apart", **broken).pretrain_id)
    before = steps_executed(tmp_path)
    assert len(run(tmp_path, stack_seeds="on", **broken)) == 2
    assert steps_executed(tmp_path) == before


def test_a_stacked_run_measured_again_needs_its_weights_and_no_stacked_controls(tmp_path: Path) -> None:
    run(tmp_path, stack_seeds="on")
    again: Any = {"labels": "5pc", "evaluators": ("knn",), "tracking": "none"}
    with_controls = make_plan(evaluation_request("latest", None, None, None, tmp_path, {}, **again))
    _leave_groups(with_controls)
    assert ["stacked" in arm.identity for arm in with_controls.arms[:2]] == [True, False]
    assert with_controls.arms[1].role == "null control"

    request = evaluation_request("latest", None, None, None, tmp_path, {}, control=False, **again)
    plan_ = make_plan(request)
    for file in (tmp_path / ".harness" / "checkpoints").glob("*/encoder.json"):
        file.unlink()
    with pytest.raises(HarnessError, match="--seeds 0,1 --stack-seeds on"):
        execute(request, plan=plan_)


def test_one_failing_seed_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ArmRun.prepared

    def failing(self: ArmRun) -> Any:
        if self.arm.config.seed == 0:
            raise RuntimeError("no luck")
        return real(self)

    monkeypatch.setattr(ArmRun, "prepared", failing)
    request = Request("random_init", "digits", Layers(), tmp_path, labels="10pc", evaluators=("knn",), control=False,
                      tracking="none")  # fmt: skip
    outcome = seeds.execute(seeds.with_seeds(request, "0-1"), Silent())
    assert [problem.split(":")[0] for problem in outcome.problems] == ["seed 0"]
    assert {row.seed for row in outcome.rows if row.evaluator == "knn"} == {1}
    assert outcome.seeds == (0, 1)


class Watcher(Silent):
    """Remembers what it is told; `interrupt` ends the command as Ctrl-C would at the first report of training."""

    def __init__(self, interrupt: bool = False) -> None:
        self.interrupt, self.notes, self.labels = interrupt, list[str](), list[str]()

    def training(self, label: str, *rest: Any) -> None:
        self.labels.append(label)
        if self.interrupt:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def requests(workspace: Path, method: str, **overrides: Any) -> list[Request]:
    layers = Layers(flags={"stack_seeds": "on", "epochs": 1}, overrides={**FIXED, **overrides})
    return seeds.with_seeds(
        Request(method, "digits", layers, workspace, labels="5pc", evaluators=("knn",), control=False, tracking="none",
                checkpoint_seconds=0.0), "0-1")  # fmt: skip


def test_an_interrupted_group_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked = requests(
        tmp_path, "rotation", epochs=4, batch_size=16, **{"data.num_pretrain_images": 80}
    )  # 20 steps, told of every 10
    with pytest.raises(KeyboardInterrupt):
        seeds.execute(asked, Watcher(interrupt=True))
    assert steps_executed(tmp_path) == 2 * 10
    watcher = Watcher()
    rows = seeds.execute(asked, watcher).rows
    assert steps_executed(tmp_path) == 2 * 20
    assert watcher.labels == ["rotation pretrain, 2 seeds together"]
    assert {row.seed for row in rows if row.evaluator == "knn"} == {0, 1}
    assert not list((tmp_path / ".harness" / "checkpoints").rglob("*.pt"))


def test_what_cannot_be_stacked_is_announced_with_its_reason(tmp_path: Path) -> None:
    watcher = Watcher()
    asked = requests(tmp_path, "supervised", batch_size=16)
    plans = list(seeds.make_plans(asked))
    assert not any("stacked" in plan.arms[0].identity for plan in plans)
    seeds.execute(asked, watcher)
    assert watcher.notes == ["supervised: seeds are trained one after another: each seed has its own labelled images"]


def test_auto_means_off(tmp_path: Path) -> None:
    assert stacked.wins("on", CPU)
    assert not stacked.wins("auto", CPU) and not stacked.wins("auto", torch.device("cuda"))
    assert not stacked.wins("off", CPU)
    plans = list(seeds.make_plans([replace(r, layers=Layers(flags={"seed": n}))
                                   for n, r in enumerate(requests(tmp_path, "rotation"))]))  # fmt: skip
    assert not any("stacked" in plan.arms[0].identity for plan in plans)
    assert plans[0].material is plans[1].material


def test_seed_and_seeds_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="--seeds and --seed "):
        run(tmp_path / "w", seed=1)
    with pytest.raises(HarnessError, match="--set seed"):
        run(tmp_path / "w", set={"seed": 1})
    assert not (tmp_path / "w").exists()
