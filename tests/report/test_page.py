"""The page: its structure, what it must not let through, and that it needs nothing else."""

from __future__ import annotations

import html
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest

from usmlite import cli
from usmlite.report import read_report, vega

HOSTILE = '</script><script>hacked=1</script><img src=x onerror="hacked=1">\'{{7*7}}\u2028&amp;'


def parsed(page: str) -> Element:
    # Strict: anything that browsers would have to guess is an error.
    found: Element = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    return found


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def data_of(page: str) -> Any:
    [script] = [script for script in parsed(page).iter("script") if script.get("id") == "data"]
    return json.loads(script.text or "")


@pytest.fixture
def page(study: Path) -> str:
    return read_report([study]).page()


def test_structure(page: str) -> None:
    root = parsed(page)
    assert root.get("lang") == "en"
    assert text_of(root.find(".//title")) == text_of(root.find(".//h1")) == "Report of 2 runs"  # type: ignore[arg-type]
    levels = [int(element.tag[1]) for element in root.iter() if re.fullmatch(r"h[1-6]", str(element.tag))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for name in ("aria-labelledby", "aria-describedby"):
            assert element.get(name) is None or element.get(name) in ids
        if element.tag == "a":
            assert (element.get("href") or "").removeprefix("#") in ids
    for figure in root.iter("figure"):
        assert figure.find("figcaption/h3") is not None
        assert figure.find("details/div[@tabindex='0'][@role='region']") is not None
    for control in (*root.iter("select"), *root.iter("input")):
        assert any(control in list(label.iter()) for label in root.iter("label"))
    for player in root.iter("audio"):
        assert player.get("aria-label", "").startswith("Recording of ")
    for button in root.iter("button"):
        assert text_of(button)
        assert button.get("type") == "button"


def test_the_table_is_that_of_the_command_line(page: str, study: Path) -> None:
    report = read_report([study])
    lines = report.table("md").splitlines()
    wanted = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    table = parsed(page).find(".//table[@id='runs']")
    assert table is not None
    found = [[text_of(cell) for cell in row if cell.tag in ("th", "td")] for row in table.iter("tr")]
    assert [row[1:] for row in found] == [row[1:] for row in wanted]
    assert [row[0].removesuffix(" front") for row in found[1:]] == ["dense", "int8", "trained"]


def test_alignments(page: str) -> None:
    cards = list(parsed(page).iter("article"))
    [card] = [card for card in cards if text_of(card.find("header/h3")) == "r2"]  # type: ignore[arg-type]
    words = [(element.tag, text_of(element)) for element in card.iter() if element.tag in ("del", "ins")]
    # What is colored is also said.
    assert words == [("del", "not fine"), ("ins", "but for"), ("ins", "added: yes")]
    assert len(list(card.iter("audio"))) == 1


def test_nothing_comes_from_elsewhere(page: str) -> None:
    root = parsed(page)
    for element in root.iter():
        for name in ("src", "href", "srcset", "action", "poster"):
            value = element.get(name)
            assert value is None or value.startswith(("#", "data:"))
    policy = root.find(".//meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None
    rules = dict(rule.split(maxsplit=1) for rule in str(policy.get("content")).split("; "))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-\S+' 'sha256-\S+'", rules["script-src"])
    assert not any("http" in rule or "eval" in rule for rule in rules.values())


def test_the_policy_knows_the_scripts(page: str) -> None:
    import base64
    import hashlib

    # Not from the parser, which has opinions on some characters; browsers hash what stands there.
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in html.unescape(page)


def test_figures_have_their_data(page: str, study: Path) -> None:
    data = data_of(page)
    assert data["runs"] == ["int8", "trained"]
    report = read_report([study])
    wanted = report.to_json()["figures"]
    rows = [[dict(zip(each["keys"], row, strict=True)) for row in each["values"]] for each in data["rows"]]
    assert {figure["key"]: rows[figure["rows"]] for figure in data["figures"]} == wanted
    for figure in data["figures"]:
        assert "datasets" not in figure["spec"]
        assert all(rows[place] for place in figure["data"].values())


def test_hostile_texts_and_names_stay_texts(study: Path) -> None:
    name = "<b onclick='x'>&amp;\"run"
    shutil.move(study / "trained", study / name)
    for kind in ("packed", "dense"):
        path = study / name / f"evaluation-{kind}.json"
        found = json.loads(path.read_text())
        found["utterances"][2] |= {"id": HOSTILE, "reference": HOSTILE, "speaker": HOSTILE}
        found["utterances"][2]["hypothesis"] = HOSTILE if kind == "dense" else f"{HOSTILE} more words"
        path.write_text(json.dumps(found))
    path = study / name / "report.json"
    report = json.loads(path.read_text())
    report["machine"]["cpu"] = report["versions"]["torch"] = HOSTILE
    path.write_text(json.dumps(report))
    recipe = study / name / "recipe.toml"
    recipe.write_text(recipe.read_text() + f"\n[x]\ny = {json.dumps(HOSTILE)}\n")
    page = read_report([study]).page()
    root = parsed(page)
    assert sum(1 for _ in root.iter("script")) == 3
    assert not list(root.iter("img"))
    assert not list(root.iter("b"))
    for element in root.iter():
        assert not any(str(key).startswith("on") for key in element.attrib)
    heading = next(card.find("header/h3") for card in root.iter("article") if "hacked" in text_of(card))
    assert heading is not None
    assert text_of(heading) == " ".join(HOSTILE.split())
    assert name in data_of(page)["runs"]
    assert any(element.get("data-run") == name for element in root.iter("tr"))


def test_the_page_is_the_same_each_time(study: Path) -> None:
    assert read_report([study]).page() == read_report([study]).page()


def test_bytes_only(study: Path) -> None:
    for name in ("trained", "int8"):
        path = study / name / "report.json"
        report = json.loads(path.read_text()) | {"evaluations": {}}
        del report["difference"]
        path.write_text(json.dumps(report))
    page = read_report([study]).page()
    keys = [figure["key"] for figure in data_of(page)["figures"]]
    assert "wer-bytes" not in keys
    assert "allocation" in keys
    assert "No speech was transcribed" in page


def test_vega_is_of_the_version_that_altair_writes() -> None:
    source = vega.source()
    assert f"Vega-Lite {vega.VEGA_LITE} " in source.splitlines()[0]
    # In a page it stands in an element of its own.
    assert "</script" not in source.lower()
    assert "<!--" not in source
    license = (vega.FILE.parent / "vega.LICENSE").read_text()
    assert "University of Washington Interactive Data Lab" in license


@pytest.mark.slow
def test_vega_is_what_the_package_makes() -> None:
    assert vega.bundle() == vega.source()


def test_command(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(study), "--audio", "0", "--figures", "figures"]) == 0
    told = capsys.readouterr().out
    assert "trained" in told
    assert "Report: report.html" in told
    assert "<audio" not in Path("report.html").read_text()
    assert Path("figures/wer-bytes.svg").is_file()
    assert cli.main(["report", str(study), "--worst", "0", "--out", "other.html"]) == 0
    assert "<article" not in Path("other.html").read_text()
    capsys.readouterr()


@pytest.mark.parametrize("form", ["md", "latex", "json"])
def test_tables_for_other_programs(study: Path, tmp_path: Path, form: str, capsys: Any) -> None:
    assert cli.main(["report", str(study), "--format", form]) == 0
    out = capsys.readouterr().out
    if form == "json":
        found = json.loads(out)
        assert [row["name"] for row in found["results"]] == ["dense", "int8", "trained"]
        assert found["recipes"]["trained"]["training"]["steps"] == 6
    else:
        assert out.strip() == read_report([study]).table(form)
    path = tmp_path / "table"
    assert cli.main(["report", str(study), "--format", form, "--out", str(path)]) == 0
    assert path.read_text() == out


def test_what_cannot_be_read_is_named_and_the_rest_written(study: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "report.html"
    assert cli.main(["report", str(study), str(tmp_path / "away"), "--out", str(out)]) == 2
    assert "away: not there" in capsys.readouterr().err
    assert "Not read: away: not there" in out.read_text()
    assert cli.main(["report", str(tmp_path / "away"), "--out", str(out)]) == 2
    assert "there is no run to report on" in capsys.readouterr().err
    assert cli.main(["report", str(study), "--out", str(tmp_path / "no/report.html")]) == 2
    assert "no such directory" in capsys.readouterr().err
