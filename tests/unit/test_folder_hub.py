"""Models by their id on the hub: from its cache, or a message that says how to provide them."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.models import build_tiny_model
from vidgen.cli.main import main
from vidgen.core.errors import ModelError
from vidgen.weights import published
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model
from vidgen.weights.published import is_hub_id, list_cached

ID = "someone/tiny-model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub on a machine without a network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def store(cache: Path, hub_id: str, model: Path) -> Path:
    """Put a model where the hub's client keeps what it downloaded."""
    repo, revision = cache / f"models--{hub_id.replace('/', '--')}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(model, repo / "snapshots" / revision))


@pytest.mark.parametrize("text", ["Wan-AI/Wan2.1-T2V-1.3B", "a/b"])
def test_ids_are_inferred_from_names_and_paths(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["toybox", "/abs/x", "./x", "a/b/c", "~/x", "a b/c", "", "a/"])
def test_names_and_paths_are_no_ids(text: str) -> None:
    assert not is_hub_id(text)


def test_offline_the_folder_to_provide_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        open_model(ID)
    message = str(caught.value)
    assert "'someone/tiny-model' is not a local folder" in message
    assert "hf download someone/tiny-model --local-dir tiny-model" in message
    assert "give its path" in message


def test_a_cached_model_is_opened_without_the_hub(
    cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = store(cache, ID, tiny_model)
    monkeypatch.setattr(published, "fetch_model", lambda _: pytest.fail("the hub was asked"))
    model = open_model(ID)
    assert isinstance(model, ModelFolder)
    assert model.path == snapshot
    assert list_cached() == [(ID, snapshot)]


def test_what_is_missing_of_a_cached_model_is_named_offline(cache: Path, tiny_model: Path) -> None:
    snapshot = store(cache, ID, tiny_model)
    (snapshot / "vae" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"incomplete: vae/model\.safetensors missing"):
        open_model(ID)


def test_what_is_missing_of_a_cached_model_is_fetched(
    cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = store(cache, ID, tiny_model)
    (snapshot / "vae" / "model.safetensors").unlink()

    def fetch(_: str) -> Path:
        shutil.copy(tiny_model / "vae" / "model.safetensors", snapshot / "vae")
        return snapshot

    monkeypatch.setattr(published, "fetch_model", fetch)
    assert open_model(ID).path == snapshot


def test_a_folder_goes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny_model(tmp_path / "someone" / "tiny-model")
    model = open_model(ID)
    assert model.path == Path(ID)


def models(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict]]:
    code = main(["models", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_models_shows_what_is_at_hand(
    cache: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(cache, ID, tiny_model)
    shelf = tmp_path / "shelf"
    shutil.copytree(tiny_model, shelf / "one")
    (shelf / "no-model").mkdir()
    (shelf / "theirs").mkdir()
    (shelf / "theirs" / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    code, found = models(capsys, str(shelf))
    assert code == 0
    by_name = {model["name"]: model for model in found}
    assert {ID, str(shelf / "one"), str(shelf / "theirs")} <= by_name.keys()
    assert str(shelf / "no-model") not in by_name
    assert by_name[str(shelf / "theirs")]["pipeline"] == "LTXPipeline"
    one = by_name[ID]
    assert one["bytes"] > 100_000
    assert (one["license"], one["layout"]) == ("Apache-2.0", "vidgen")
    assert "text" in one["tasks"]
    assert models(capsys, str(shelf / "one"))[1][-1]["name"] == str(shelf / "one")


def test_models_shows_why_one_cant_be_used(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "shelf" / "one")
    (tmp_path / "shelf" / "one" / "vae" / "config.json").unlink()
    code, found = models(capsys, str(tmp_path / "shelf"))
    assert code == 1
    assert "vae/config.json missing" in found[-1]["problem"]
    assert main(["models", str(tmp_path / "shelf")]) == 1
    assert "can't be used" in capsys.readouterr().out


def test_a_folder_that_isnt_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "no/such/folder"]) == 2
    assert "no/such/folder is not a folder" in capsys.readouterr().err
