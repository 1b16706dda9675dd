"""Names of models and data that lead nowhere: one line that says so, before a library tries everything."""

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from modeling_videomamba.training import names
from modeling_videomamba.training.names import check_name
from modeling_videomamba.training.sources import find_evaluation_split, load_split


def answer_with(monkeypatch, error):
    """Lets the Hub answer with an error, or with none; returns the names that it was asked for."""
    asked = []

    def repo_info(_, name, *, repo_type, timeout):
        asked.append((name, repo_type))
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return asked


def without_response(kind):
    return kind.__new__(kind)


@pytest.mark.parametrize("name", ["../nope", "/no/pe", "./nope", "~/nope", "a/b/c", "no pe", "https://a.b/c", "a\\b"])
@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_path_that_leads_nowhere_is_not_looked_up(name, repo_type, monkeypatch):
    asked = answer_with(monkeypatch, None)
    with pytest.raises(FileNotFoundError) as error:
        check_name(name, repo_type)
    assert (str(error.value), asked) == (f"{name}: there is no such folder", [])


@pytest.mark.parametrize(("repo_type", "kind"), [("model", "model"), ("dataset", "data set")])
@pytest.mark.parametrize("name", ["nope", "org/nope"])
def test_a_name_that_the_hub_does_not_have(name, repo_type, kind, monkeypatch):
    asked = answer_with(monkeypatch, without_response(RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError) as error:
        check_name(name, repo_type)
    assert str(error.value) == f"{name}: there is no such folder, and no such {kind} on the Hub"
    assert asked == [(name, repo_type)]


@pytest.mark.parametrize("error", [HTTPError("no route"), OfflineModeIsEnabled("offline"), OSError("down")])
def test_a_hub_that_can_not_be_reached(error, monkeypatch):
    answer_with(monkeypatch, error)
    message = "org/nope: there is no such folder, and the Hub can't be reached"
    with pytest.raises(ConnectionError) as raised:
        check_name("org/nope")
    assert str(raised.value) == message
    check_name("org/nope", "dataset")  # which may have been downloaded before
    for load in (find_evaluation_split, lambda data: load_split(data, "train")):
        with pytest.raises(ConnectionError) as raised:
            load("org/nope")
        assert str(raised.value) == message


def test_names_with_something_behind_them(monkeypatch, tmp_path):
    asked = answer_with(monkeypatch, OSError("down"))
    check_name(tmp_path)
    monkeypatch.setattr(names.constants, "HF_HUB_CACHE", tmp_path)
    (tmp_path / "models--org--cached" / "snapshots").mkdir(parents=True)
    check_name("org/cached")
    assert asked == []
    answer_with(monkeypatch, without_response(GatedRepoError))
    check_name("org/gated", "dataset")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"a.pth must be a directory or a Hub id.*convert_checkpoint.py makes"):
        check_name(tmp_path / "a.pth")


@pytest.mark.parametrize("load", [find_evaluation_split, lambda data: load_split(data, "train")])
def test_data_that_are_not_there(load):
    with pytest.raises(FileNotFoundError) as error:
        load("../nope")
    assert str(error.value) == "../nope: there is no such folder"
