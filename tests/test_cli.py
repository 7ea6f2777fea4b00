"""What a person reads who mistypes an option of hstu-train, and where nothing can be written."""

from __future__ import annotations

import dataclasses
import errno
import sys

import pytest

from hstu.cli import command, conf_dir, register_schemas, run_hydra
from hstu.config import MODELS, BiasConfig, MixtureConfig, from_dictconfig


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Composes and checks the options as hstu-train does; the ``error:`` line, or "" where they are right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments: str, config_name: str = "config", folder: str = "", task=from_dictconfig) -> str:
        monkeypatch.setattr(sys, "argv", ["hstu-train", *arguments])
        try:
            status = command(lambda: run_hydra(task, config_name, folder))()
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.strip().splitlines()
        assert (status, len(lines)) in ((0, 0), (1, 1)), (status, lines)
        return lines[0].removeprefix("error: ") if lines else ""

    return run


def test_another_model_on_an_experiment_for_hstu(said):
    assert said("model=sasrec") == (
        "experiment=synthetic sets model.qk_dim, model.v_dim of model=hstu, which model=sasrec does not have: take "
        "experiment=synthetic-sasrec, or drop what is for the other model with '~model.qk_dim' '~model.v_dim' "
        "variants=null"
    )


def test_experiments_of_the_same_data_are_named(said):
    line = said("experiment=ml-1m/hstu", "model=sasrec")
    assert "take experiment=ml-1m/sasrec or experiment=ml-1m/sasrec-validation, or drop" in line
    assert "variants" not in line


def test_the_way_out_that_is_named_works(said):
    assert said("model=sasrec", "~model.qk_dim", "~model.v_dim", "variants=null") == ""
    assert said("experiment=synthetic-sasrec") == ""


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("seeds=0,1", "seeds=0,1: a list is written seeds=[0,1]; to run once with each value, add -m"),
        ("model.bias.tme=false", "there is no option model.bias.tme; did you mean time?"),
        ("model.num_block=3", "there is no option model.num_block; did you mean num_blocks?"),
        ("optim.lrr=1", "did you mean lr?"),
        ("sede=1", "there is no option sede; did you mean seed?"),
    ],
    ids=lambda value: value.split("=")[0],
)
def test_mistyped_options(said, argument, expected):
    assert expected in said(argument)


@pytest.mark.parametrize("argument", ["ranking.user_features={age: {}}", "ranking.user_features.age={}"])
def test_an_entry_that_is_new_is_added(said, argument):
    line = said("ranking=movielens", "~ranking.user_features.age", argument)
    assert line.startswith("ranking.user_features has no age: to add it, write '+ranking.user_features={age: {}}'")
    assert said("ranking=movielens", "~ranking.user_features.age", "+ranking.user_features={age: {}}") == ""


def test_an_entry_without_options_of_its_own_has_a_value(said):
    line = said("embedding=sharded", "embedding.tables.item=row_wise")
    assert line.startswith("embedding.tables has no item: to add it, write +embedding.tables.item=VALUE")


def test_an_option_unlike_any_other_lists_them_all(said):
    line = said("model.bias.foo=1")
    assert line.startswith("there is no option model.bias.foo; it is one of bucket_width, num_buckets, per_head")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("splt=test", "there is no option splt; did you mean split?"),
        ("eval.kss=[1]", "there is no option eval.kss; did you mean ks?"),
        ("zzz=1", "there is no option zzz; it is one of device, embedding, eval, "),
    ],
    ids=lambda value: value.split("=")[0],
)
def test_a_command_with_options_of_its_own(said, argument, expected):
    assert said("run=x", argument, config_name="evaluate", folder="commands").startswith(expected)


def test_an_option_that_must_be_given(said):
    line = said(config_name="evaluate", folder="commands", task=lambda cfg: cfg.run)
    assert line == "run is not set: give run=VALUE (--help says what the command takes)"


@pytest.mark.parametrize(
    "number", [errno.ENOTDIR, errno.EEXIST, errno.EROFS], ids=["not-a-folder", "exists", "read-only"]
)
def test_a_place_where_nothing_can_be_written(said, number):
    def fail(cfg) -> None:
        raise OSError(number, "Reason", "place")

    assert said(task=fail) == "place cannot be written (Reason): choose another place"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_option_of_a_model_can_be_overridden(name):
    from hydra import compose, initialize_config_dir

    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base=None):
        values = compose(f"model/{name}").model
    assert set(values) == {f.name for f in dataclasses.fields(MODELS[name])}
    assert set(values["mixture"]) == {f.name for f in dataclasses.fields(MixtureConfig)}
    if "bias" in values:
        assert set(values["bias"]) == {f.name for f in dataclasses.fields(BiasConfig)}
