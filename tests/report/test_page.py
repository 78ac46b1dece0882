"""The page: whole, inert, self-contained, and every number on it from the rows."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from harness import records
from harness.report import assembly, page, pictures, rerun

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Document(HTMLParser):
    """Every element with its attributes and its own text, and whether all tags are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(text)
        assert not self.open, [e["tag"] for e in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} repeats an attribute"
        path = [e["tag"] for e in self.open]
        element = {
            "tag": tag,
            "attrs": {k: v or "" for k, v in attrs},
            "text": "",
            "path": path,
            "inside": list(self.open),
        }
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        return [
            e for e in self.elements
            if e["tag"] == tag and all(e["attrs"].get(k.rstrip("_").replace("_", "-")) == v for k, v in attrs.items())
        ]  # fmt: skip


@pytest.fixture(scope="module")
def html(workspace: Path, rows: pd.DataFrame) -> str:
    return page.render(assembly.build(rows), rows, workspace)


@pytest.fixture(scope="module")
def document(html: str) -> Document:
    return Document(html)


# ----------------------------------------------------------------------------------------------------------- structure


def test_ids_are_unique_and_every_link_lands(document: Document) -> None:
    ids = [e["attrs"]["id"] for e in document.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    targets = [e["attrs"]["href"] for e in document.all("a")]
    assert targets and all(target.startswith("#") and target[1:] in ids for target in targets)


def test_every_section_of_a_workspace_is_there(document: Document) -> None:
    ids = {e["attrs"].get("id") for e in document.all("section")}
    assert {"reading", "boards", "efficiency", "cost", "curves", "pictures", "runs"} <= ids
    titles = [e["text"] for e in document.all("figcaption")]
    for words in ("What the method saw", "First-layer filters", "Nearest neighbours", "Confusion", "Feature map"):
        assert any(words in title for title in titles), words


def test_it_can_be_read_without_eyes_or_script(document: Document) -> None:
    for svg in document.all("svg"):
        assert svg["attrs"].get("aria-label") or svg["attrs"].get("aria-hidden") == "true"
    assert all(img["attrs"].get("alt") for img in document.all("img"))
    for field in document.all("select") + document.all("input"):
        assert "label" in field["path"]
    for head in document.all("th"):
        assert head["attrs"].get("scope") in ("col", "row", "rowgroup")
    levels = [int(e["tag"][1]) for e in document.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    # what only a script can serve is hidden until the script shows it
    assert "hidden" in next(e for e in document.elements if e["attrs"].get("id") == "controls")["attrs"]
    assert document.all("html", lang="en")


def test_every_chart_has_its_table(document: Document) -> None:
    for svg in document.all("svg", class_="chart"):
        figure = next(e for e in reversed(svg["inside"]) if e["tag"] == "figure")
        assert [t for t in document.all("table") if figure in t["inside"]]


# -------------------------------------------------------------------------------------------------------------- safety


def test_the_policy_admits_this_style_and_this_script_and_nothing_else(document: Document, html: str) -> None:
    policy = document.all("meta", http_equiv="Content-Security-Policy")[0]["attrs"]["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "style-src": digest(between(html, "<style>", "</style>")),
        "script-src": digest(between(html, "<script>", "</script>")),
    }  # fmt: skip
    assert html.index("Content-Security-Policy") < html.index("<style>")
    code = [e for e in document.all("script") if e["attrs"].get("type") != "application/json"]
    assert len(code) == 1 and len(document.all("style")) == 1
    for element in document.elements:
        assert "style" not in element["attrs"]
        assert not [name for name in element["attrs"] if name.startswith("on")]


def between(text: str, start: str, end: str) -> str:
    inner = text[text.index(start) + len(start) :]
    return inner[: inner.index(end)]


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_nothing_is_loaded_from_anywhere(document: Document) -> None:
    for element in document.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"):
            value = element["attrs"].get(name, "#")
            assert value.startswith(("#", "data:image/")), (element["tag"], name, value[:40])
    assert {e["tag"] for e in document.elements}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    style = document.all("style")[0]["text"]
    assert "url(" not in style and "@import" not in style


HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'</style><svg onload=alert(3)>{{ 7 * 7 }}&amp;"


def hostile(value: Any) -> Any:
    """The same board with HOSTILE in place of every text that is not one of a fixed few words."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    if isinstance(value, dict):
        return {hostile(k): hostile(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fixed = ("role", "metric", "runs")
        return dataclasses.replace(
            value, **{f.name: hostile(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in fixed}
        )
    return value


def test_hostile_strings_are_inert_everywhere(
    workspace: Path, rows: pd.DataFrame, document: Document, tmp_path: Path
) -> None:
    """In every text field of rows, boards, figures' files and published numbers."""
    bad = rows.copy()
    for name in ("method", "dataset", "encoder", "pretrain_data", "evaluator", "readout", "labels", "metric", "device",
                 "precision", "torch_version", "harness_version", "git_commit", "code_sha256", "data_sha256", "status",
                 "weights_sha256", "label_subset_sha256", "eval_id", "split", "pretrain_id"):  # fmt: skip
        bad[name] = HOSTILE
    bad["value"] = None
    bad["config"] = [{HOSTILE: HOSTILE, "method_name": HOSTILE}] * len(bad)
    boards = [hostile(board) for board in assembly.build(rows)]
    for found in (
        Document(page.render(boards, pd.concat([rows, bad]), workspace)),
        Document(page.render(boards, bad, tmp_path)),
    ):
        code = [e for e in found.all("script") if e["attrs"].get("type") != "application/json"]
        assert len(code) == 1 and len(found.all("style")) == 1
        assert all(img["attrs"]["src"].startswith("data:image/") for img in found.all("img"))
        assert not [name for e in found.elements for name in e["attrs"] if name.startswith("on")]
        assert {e["tag"] for e in found.elements} <= {e["tag"] for e in document.elements} | {"code"}
        assert any(HOSTILE in e["text"] for e in found.all("td")), "the strings are there, as text"
        ids = [e["attrs"]["id"] for e in found.elements if "id" in e["attrs"]]
        assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]+", name) for name in ids)


def test_hostile_class_names_of_a_map_are_inert(
    workspace: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pictures._feature_map

    def hostile(folder: Path) -> Any:
        found = real(folder)
        assert found is not None
        return pictures.FeatureMap(**{**vars(found), "classes": (HOSTILE,) * 10, "readout": HOSTILE, "budget": HOSTILE})

    monkeypatch.setattr(pictures, "_feature_map", hostile)
    found = Document(page.render(assembly.build(rows), rows, workspace))
    data = found.all("script", type="application/json")
    assert data and all(HOSTILE in json.loads(e["text"])["names"] for e in data)
    assert len([e for e in found.all("script") if "type" not in e["attrs"]]) == 1


# ------------------------------------------------------------------------------------------------------------- numbers


def headlines(rows: pd.DataFrame) -> pd.Series:
    """{(labels, method, seed): test top-1 at the readout with the best validation top-1}, worked out here."""
    probes = rows[(rows.evaluator == "linear_probe") & (rows.metric == "top1")]
    wide = probes.pivot_table(
        index=["labels", "method", "seed", "readout"], columns="split", values="value"
    ).reset_index()
    # the networks' readouts in the order gap, spatial, spatial_pca: of equal ones the first
    best = (
        wide.sort_values(["validation", "readout"], ascending=[False, True])
        .groupby(["labels", "method", "seed"])
        .first()
    )
    found: pd.Series = best["test"]
    return found


def test_every_number_of_the_boards_is_that_of_the_rows(document: Document, rows: pd.DataFrame) -> None:
    """Means, seeds and paired differences, worked out here from the rows alone."""
    every = headlines(rows)
    checked = 0
    for section in document.all("section", class_="board"):
        table = every[section["attrs"]["data-labels"]].unstack("method")
        leaderboard, differences = [t for t in document.all("table") if section in t["inside"]]
        for row in [e for e in document.all("tr") if leaderboard in e["inside"] and "data-text" in e["attrs"]]:
            cells = [e for e in document.elements if row in e["inside"] and e["tag"] in ("td", "th")]
            method = next(e["text"] for e in document.all("code") if row in e["inside"])
            assert cells[1]["text"] == f"{100 * table[method].mean():.2f}"
            seeds = [e["text"] for e in document.all("title") if row in e["inside"]]
            assert seeds == [f"seed {seed}: {100 * value:.2f}" for seed, value in table[method].items()]
            if method != "random_init":
                paired = 100 * (table[method] - table["random_init"]).mean()
                assert cells[4]["text"] == f"{paired:+.2f}".replace("-", "−")
                checked += 1
        shown = [e for e in document.all("tr") if differences in e["inside"] and "data-text" in e["attrs"]]
        assert len(shown) == 2 + 1  # sc and pixels to the untrained network, sc to the floor
    assert checked == 4


def test_every_number_of_a_run_is_a_row(document: Document, rows: pd.DataFrame) -> None:
    finite = rows[rows.value.notna()]
    for section in document.all("details", class_="run"):
        identity = next(e["text"] for e in document.all("code") if section in e["inside"])
        known = {
            f"{r.metric} {r.value:.6g}".replace("-", "−") for r in finite[finite.pretrain_id == identity].itertuples()
        }
        told = set()
        for cell in [e for e in document.all("td", class_="metrics") if section in e["inside"]]:
            notes = "".join(e["text"] for e in document.all("small") if cell in e["inside"])
            told |= set(cell["text"].removesuffix(notes).split(", ")) - {""}
        assert told and told - {"nothing to measure"} == known


def test_the_same_rows_give_the_same_page(html: str, workspace: Path, rows: pd.DataFrame) -> None:
    assert page.render(assembly.build(rows), rows, workspace) == html


def test_no_rows_are_a_page_too(rows: pd.DataFrame, tmp_path: Path) -> None:
    page.write([], rows.iloc[:0], tmp_path, tmp_path / "page.html")
    assert "The rows hold no comparison" in Document((tmp_path / "page.html").read_text()).elements[0]["text"]


def test_rows_alone_are_enough(tmp_path: Path) -> None:
    """The committed study: no weights, no figures; the sections that need them are left out, the rest is there."""
    rows = records.load_rows(ROOT / "results" / "studies" / "quick")
    found = Document(page.render(assembly.build(rows), rows, tmp_path))
    ids = {e["attrs"].get("id") for e in found.all("section")}
    assert {"boards", "cost", "published", "runs"} <= ids and not ids & {"pictures", "curves", "transfer", "robustness"}
    assert len(found.all("details", class_="run")) == rows.pretrain_id.nunique()


# -------------------------------------------------------------------------------------------------------- reproduction


def test_the_printed_commands_lead_to_the_same_runs(rows: pd.DataFrame, workspace: Path) -> None:
    from harness.cli import app
    from harness.runs import finished

    facts = {run.pretrain_id: run.facts for run in finished(workspace)}
    by_run = {identity: group for identity, group in rows.groupby("pretrain_id") if set(group.seed) == {0}}
    assert len(by_run) == 3
    for identity, group in by_run.items():
        commands = rerun.commands(page._rows(group), facts.get(str(identity)))
        assert len(commands) == 2  # one for each label budget
        for command in commands:
            words = shlex.split(command.replace("\\\n", ""))
            assert words[:2] == ["harness", "run"]
            done = CliRunner().invoke(app, [*words[1:], "--dry-run", "--json", "--workspace", str(workspace)])
            assert done.exit_code == 0, done.output
            arm = json.loads(done.stdout)["arms"][0]
            assert arm["pretrain_id"] == identity
            assert {e["eval_id"] for e in arm["evaluations"]} <= set(group.eval_id)


def test_a_method_that_is_not_installed_has_all_its_settings(rows: pd.DataFrame) -> None:
    one = page._rows(rows[rows.method == "sc"])[0]
    (command,) = rerun.commands([one.model_copy(update={"method": "gone; rm -rf /"})])
    assert "'gone; rm -rf /'" in command
    assert command.count("--set ") == len(
        [k for k in one.config if k not in ("method_name", "dataset_name", "seed", "stack_seeds")]
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def test_what_does_not_fit_is_named(rows: pd.DataFrame, workspace: Path) -> None:
    found = page._rows(rows)
    everything = pictures.albums(found, workspace, ["sc"])
    assert [a.seed for a in everything] == [0] and not everything[0].left_out
    size = sum(len(p.data) for p in everything[0].pictures) + len(everything[0].map.sheet.data)  # type: ignore[union-attr]
    (album,) = pictures.albums(found, workspace, ["sc"], most_bytes=size - 1)
    assert len(album.left_out) == 1 and album.left_out[0].startswith("Confusion")
    (album,) = pictures.albums(found, workspace, ["sc"], most_bytes=0)
    assert not album.pictures and album.map is None and len(album.left_out) == len(everything[0].pictures) + 1


def test_a_broken_picture_is_left_out(rows: pd.DataFrame, tmp_path: Path) -> None:
    row = page._rows(rows[rows.method == "sc"])[0]
    folder = tmp_path / ".harness" / "checkpoints" / row.pretrain_id / "figures"
    folder.mkdir(parents=True)
    for name, content in (
        ("views.png", b"no picture"),
        ("map.json", b'{"labels": [0], "pca": [[0, "x"]]}'),
        ("map_images.png", b""),
    ):
        (folder / name).write_bytes(content)
    assert pictures.albums([row], tmp_path, ["sc"]) == []
