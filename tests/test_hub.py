"""Pushing to the hub and loading from it, through its HTTP API."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import usmlite
from hub_server import TOKEN, Repository, running_hub
from usmlite import hub as module
from usmlite.cli import main
from usmlite.errors import ModelError, PackedModelError
from usmlite.packfile import WEIGHTS_NAME
from usmlite.push import prepare, push

NAME = "me/whisper-small"
# huggingface_hub 2.4 calls its HTTP client in a way that the client is about to drop.
NOWHERE = "http://127.0.0.1:9"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def hub():
    with running_hub() as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run_folder(packed_model, tmp_path_factory):
    """What `compress` leaves behind, as far as a card needs it."""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(packed_model, run / "packed")
    (run / "recipe.toml").write_text('[model]\nsource = "tiny.en"\n')
    size = (run / "packed" / WEIGHTS_NAME).stat().st_size
    score = {"wer": 0.0601, "ci95": [0.0537, 0.0668], "audio_seconds": 3960.0, "utterance_count": 520}
    report = {
        "recipe": {
            "model": {"source": "tiny.en"},
            "data": {
                "train": "/home/somebody/speech/train",
                "dev": "/home/somebody/speech/dev",
                "speed": 0.1,
            },
            "spec": {"target_size": "9.4%", "measured": "/home/somebody/allocation.json"},
            "student": {"calibration": 96},
            "training": {"steps": 0, "batch_size": 4, "accumulate": 1},
        },
        "model": "tiny.en",
        "float32_bytes": 10 * size,
        "packed_bytes": size,
        "training": None,
        "evaluations": {"packed": score, "dense": {**score, "wer": 0.0581}},
        "difference": {"relative_difference": 0.035, "relative_ci95": [-0.011, 0.082], "p_value": 0.15},
        "data": {"train": {"utterances": 1519, "seconds": 19118.7, "sha256": "00"}},
        "versions": {"usmlite": "0.1.0", "torch": "2.13.0"},
    }
    (run / "report.json").write_text(json.dumps(report))
    return run


def set_endpoint(monkeypatch, address):
    """What HF_ENDPOINT sets, read when `huggingface_hub` was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def at_the_hub(hub, home, monkeypatch):
    """This process talks to the stand-in, and keeps what it downloads apart."""
    from huggingface_hub import constants

    set_endpoint(monkeypatch, hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def pushed(hub, run_folder):
    """The model, pushed once."""
    if NAME not in hub.repositories:
        address = push(run_folder, NAME, license_id="mit", private=True)
        assert address == f"{hub.address}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    return hub.repositories[NAME]


def test_a_push_puts_the_whole_model_there_in_one_commit(pushed, run_folder):
    repository = pushed
    assert repository.private
    assert len(repository.commits) == 2  # what the hub itself makes, and ours
    files = repository.commits[repository.branches["main"]]
    packed = run_folder / "packed"
    assert {name for name in files if name != ".gitattributes"} == {
        "README.md", *(path.name for path in packed.iterdir())
    }  # fmt: skip
    for path in packed.iterdir():
        assert files[path.name] == path.read_bytes()


def test_the_card_says_what_was_measured_in_words_and_for_the_hub(pushed):
    card = pushed.commits[pushed.branches["main"]]["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    found = yaml.safe_load(header)
    assert (found["license"], found["library_name"]) == ("mit", "usmlite")
    assert found["base_model"] == "openai/whisper-tiny.en"
    (result,) = found["model-index"][0]["results"]
    assert result["task"]["type"] == "automatic-speech-recognition"
    assert result["metrics"][0]["type"] == "wer"
    assert result["metrics"][0]["value"] == 6.01
    assert "6.01 % (95 % interval 5.37 to 6.68)" in text
    assert "+3.5 % relative (-1.1 to +8.2), p = 0.15" in text
    assert "10.0 % of the dense model" in text
    assert "target_size" in text
    assert "somebody" not in card  # where things lie here is nobody's business


def test_a_pushed_model_is_transcribed_with_by_its_name(hub, home, pushed, packed_model, recordings):
    """In a process of its own, as a user has it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home / "own"), "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-m", "usmlite", "transcribe", NAME, str(recordings / "0.wav")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = usmlite.load(packed_model).transcribe(recordings / "0.wav")
    assert done.stdout.splitlines() == [segment.text for segment in here.segments]


def test_a_model_comes_down_once(hub, pushed):
    def downloads():
        return [line for line in hub.requests if line.startswith("GET") and line.endswith(WEIGHTS_NAME)]

    usmlite.load(NAME)
    before = downloads()
    found = usmlite.load(NAME)
    assert (found.name, found.kind) == (NAME, "packed")
    assert downloads() == before


def test_a_model_in_the_cache_needs_no_hub(pushed, monkeypatch):
    from huggingface_hub import constants

    usmlite.load(NAME)
    set_endpoint(monkeypatch, NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert usmlite.load(NAME).kind == "packed"


def test_revisions(hub, pushed, run_folder):
    push(run_folder / "packed", NAME, revision="next")
    assert pushed.branches["next"] != pushed.branches["main"]
    assert usmlite.load(f"{NAME}@next").name == f"{NAME}@next"
    assert usmlite.load(NAME, revision="next").kind == "packed"
    with pytest.raises(ModelError, match=f"{NAME}@nowhere: the hub has no such revision"):
        usmlite.load(f"{NAME}@nowhere")
    for source in ("tiny.en-small", f"{NAME}@next"):
        with pytest.raises(ModelError, match="only a model on the hub has a revision"):
            usmlite.load(source, revision="next")


def test_a_dense_model_of_one_revision(hub, dense_model):
    hub.repositories["me/dense"] = repository = Repository()
    number = repository.commit("main", {path.name: path.read_bytes() for path in dense_model.iterdir()})
    repository.commit("main", {"config.json": b"{}"})
    assert usmlite.load("me/dense", revision=number).kind == "dense"


def test_weights_that_were_altered_on_the_hub_are_refused(hub, pushed):
    files = pushed.commits[pushed.branches["main"]]
    weights = bytearray(files[WEIGHTS_NAME])
    weights[-1] ^= 1
    number = pushed.commit("altered", {**files, WEIGHTS_NAME: bytes(weights)})
    with pytest.raises(PackedModelError, match="altered after packing"):
        usmlite.load(NAME, revision=number)


def test_a_push_that_is_refused_says_why(hub, run_folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelError, match="me/other: the hub does not let you do this"):
        push(run_folder, "me/other")
    with pytest.raises(ModelError, match="this is no name for the hub"):
        push(run_folder, "me/no name")
    set_endpoint(monkeypatch, NOWHERE)
    with pytest.raises(ModelError, match="me/other: the hub cannot be reached"):
        push(run_folder, "me/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"me/other: the hub cannot be reached .* HF_HUB_OFFLINE"):
        push(run_folder, "me/other")
    assert "me/other" not in hub.repositories


def test_names_on_the_hub(tmp_path, monkeypatch):
    assert module.parse("me/model") == ("me/model", None)
    assert module.parse("me/model@v1.0") == ("me/model", "v1.0")
    for other in ("tiny.en", "a/b/c", "./me/model", "/me/model", "me/", Path("me/model")):
        assert module.parse(other) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert module.parse("me/model") is None  # what lies here is meant


def test_what_cannot_be_pushed(tmp_path, run_folder, dense_model):
    with pytest.raises(ModelError, match="this is no packed model"):
        prepare(dense_model, NAME)
    run = shutil.copytree(run_folder, tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "packed_bytes": 1}))
    with pytest.raises(ModelError, match="the report is about another model"):
        prepare(run, NAME)


def test_a_card_without_a_run_or_of_ones_own(packed_model, tmp_path):
    _, text = prepare(packed_model, NAME)
    assert "has not been recorded" in text
    assert "model-index" not in text
    own = tmp_path / "card.md"
    own.write_text("# mine\n")
    assert prepare(packed_model, NAME, card=own)[1] == "# mine\n"


def test_a_dry_run_sends_nothing(hub, run_folder, capsys):
    before = len(hub.requests)
    assert main(["push", str(run_folder), NAME, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("---\n")
    assert len(hub.requests) == before


def test_the_command_pushes(hub, run_folder, capsys):
    assert main(["push", str(run_folder), "me/command", "--message", "first"]) == 0
    address = capsys.readouterr().out.strip()
    assert address.startswith(f"{hub.address}/me/command/commit/")
