from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import __main__ as command
from experiments.config import CONFIGS, Arm, Config, Recipe, fingerprint, load
from experiments.lab import check_cut
from experiments.runner import question_of

NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))
HEAD = 'title = "t"\nquestion = "cross"\n'

# What stands in the file after HEAD, and what the error says: the key, what it is, the remedy.
WRONG = {
    "epocs = 3": r"unknown key 'epocs'",
    "[recipe]\nepoch = 3": r"unknown key in \[recipe\] 'epoch'; did you mean 'epochs'",
    "[data]\nsorce = 'x'": r"unknown key in \[data\] 'sorce'; did you mean 'source'",
    "[arms.none]\npenlty = 'so'": r"unknown key in \[arms.none\] 'penlty'; did you mean 'penalty'",
    "[arms.a]\npenalty = 'sso'": r"arms.a: unknown penalty 'sso'; did you mean 'so'",
    "[arms.a]\npenalty = 'tpp'": r"arms.a: penalty 'tpp' is about the filters to prune",
    "[arms.a]\npenalty = 'so'\nside = 'big'": r"arms.a: unknown side 'big'",
    "[arms.a]\npenalty = 'so'\nlayer_weights = 'x'": r"arms.a: unknown layer_weights 'x'",
    "[arms.a]\nstrength = -1": r"arms.a.strength is -1, expected a number of at least 0",
    "[arms]\nnone = 3": r"arms.none is 3, expected a table",
    "arms = 3": r"arms is 3, expected a table",
    "[arms]": r"arms is empty, expected one at least",
    "seeds = '0'": r"seeds is '0', expected a list",
    "seeds = ['0']": r"seeds\[0\] is '0', expected a whole number",
    "seeds = [0, -1]": r"seeds\[1\] is -1, expected a whole number of at least 0",
    "seeds = [true]": r"seeds\[0\] is True, expected a whole number",
    "seeds = []": r"seeds is \[\], expected one at least",
    "seeds = [1, 2, 1]": r"seeds is \[1, 2, 1\], expected one at least, and none twice",
    "models = 'vgg'": r"models is 'vgg', expected a list",
    "models = [3]": r"models\[0\] is 3, expected a text",
    "threads = 0": r"threads is 0, expected a whole number of at least 1",
    "device = 'gpu'": r"unknown device 'gpu'",
    "recipe = 3": r"recipe is 3, expected a table",
    "options = 3": r"options is 3, expected a table",
    "[recipe]\nepochs = '8'": r"recipe.epochs is '8', expected a whole number",
    "[recipe]\nepochs = 8.0": r"recipe.epochs is 8.0, expected a whole number",
    "[recipe]\nepochs = -8": r"recipe.epochs is -8, expected a whole number of at least 0",
    "[recipe]\nlr = 'x'": r"recipe.lr is 'x', expected a number",
    "[recipe]\nlr = inf": r"recipe.lr is inf, expected a number of at least 0",
    "[recipe]\nlr = nan": r"recipe.lr is nan, expected a number of at least 0",
    "[recipe]\nbatch_size = 0": r"recipe.batch_size is 0, expected a whole number of at least 1",
    "[recipe]\nmax_layer_ratio = 0.0": r"recipe.max_layer_ratio is 0.0, expected .* in \(0, 1\]",
    "[recipe]\nmax_layer_ratio = 9": r"recipe.max_layer_ratio is 9, expected a number in \(0, 1\]",
    "[recipe]\nflip = 1": r"recipe.flip is 1, expected true or false",
    "[data]\ntrain = 0": r"data.train is 0, expected a whole number of at least 1",
    "[data]\nsource = 3": r"data.source is 3, expected a text",
    "[recipe]\nlr = 1" + "0" * 400: r"recipe.lr is 10+, expected a number of at least 0",
    "[arms.a]\nstrength = 0.1": r"arms.a has a strength.* but no penalty.*: set penalty",
    "[arms.a]\nside = 'rows'": r"arms.a has a .*side.* but no penalty.*: set penalty",
    f"seeds = [{2**63}]": r"seeds\[0\] is 9223372036854775808, expected a number up to",
    "name = '../x'": r"name is '../x'",
    "name = ''": r"name is '', expected letters",
    "name = '..'": r"name is '..', expected letters",
    "name = 'a b'": r"name is 'a b', .* rename the file",
    "name = 'a:b'": r"name is 'a:b', expected letters",
    "name = 'runs'": r"name is 'runs', .* a block of the page",
    "seeds = [0": r"at end of document|Unclosed array",
}

CUTS = "\n[[options.cuts]]\ncriterion = ['l1']\nratio = [0.5]"

# The same of what only the question, the machine or the images can tell.
WRONG_LATER = {
    "models = ['vggg']" + CUTS: r"unknown model 'vggg'; did you mean 'vgg'",
    "models = ['experiments.nets:thin']" + CUTS: r"unknown factory in experiments.nets 'thin'",
    "[data]\nsource = 'cifar'"
    + CUTS: r"data 'cifar' is not in '.*'; pass the folder .* as --data DIR",
    "[data]\ntrain = 9999" + CUTS: r"data.train is 9999, expected at most the 1198 images",
    "[options]\nsample = 3": r"unknown key in \[options\] 'sample'; did you mean 'samples'",
    "[options]\nablate = '3'": r"options.ablate is '3', expected a whole number",
    "": r"\[options\] has no 'cuts', which 'cross' needs",
    "[options]\ncuts = 3": r"options.cuts is 3, expected a list",
    "[options]\ncuts = [3]": r"options.cuts is 3, expected a table",
    "[[options.cuts]]\nratio = [1.5]\ncriterion = ['l1']": r"options.cuts: ratio is 1.5",
    "[[options.cuts]]\nratio = 0.5\ncriterion = ['l1']": r"options.cuts.ratio is 0.5, .* a list",
    "[[options.cuts]]\nratio = [0.5]": r"options.cuts: criterion missing",
    "[[options.cuts]]\nratio = []\ncriterion = ['l1']": r"options.cuts: an empty list in .*'ratio'",
    "[[options.cuts]]\nratio = [0.5]\ncriterion = ['l3']": r"options.cuts: unknown criterion 'l3'",
    "[[options.cuts]]\nratio = [0.5]\ncriterion = ['variety(l3)']": r"unknown criterion 'l3'",
    "[[options.cuts]]\nratio = [0.5]\ncriterion = ['l1']\nscop = ['x']": r"did you mean 'scope'",
}


def written(folder: Path, text: str) -> str:
    path = folder / "bad.toml"
    path.write_text(HEAD + text)
    return str(path)


@pytest.mark.parametrize(("text", "says"), WRONG.items())
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load(written(tmp_path, text))
    assert str(error.value).startswith("bad.toml: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *list(WRONG.items())[:2],
        *WRONG_LATER.items(),
    ],
)
def test_the_command_says_it_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    folders = ["--data", str(tmp_path), "--work", str(tmp_path / "w")]
    folders += ["--results", str(tmp_path / "r"), "--jobs", "1"]
    assert command.main([written(tmp_path, text), *folders]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert re.search(says, err), err
    assert "written" not in out


def test_a_question_that_is_none_is_named(tiny: Callable[..., Config]) -> None:
    for name in ("cros", "cross.py", "__init__", ""):
        with pytest.raises(ValueError, match=rf"unknown question '{name}'.* Valid: .*cross"):
            question_of(tiny(question=name))


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown experiment 'cross-digit'; did you mean"):
        load("cross-digit")
    with pytest.raises(ValueError, match=r"unknown experiment .*other.toml"):
        load(tmp_path / "other.toml")
    (tmp_path / "no.toml").write_text("title = 't'")
    with pytest.raises(ValueError, match=r"no.toml: the key 'question' is missing"):
        load(tmp_path / "no.toml")


def test_a_file_gives_what_stands_in_it(tmp_path: Path) -> None:
    text = "seeds = [3]\n[recipe]\nlr = 1\nepochs = 2\n[arms.a]\npenalty = 'so'\n[data]\ntest = 5\n"
    config = load(written(tmp_path, text))
    assert (config.name, config.question, config.seeds) == ("bad", "cross", (3,))
    assert config.recipe == Recipe(lr=1, epochs=2)
    assert config.arms == {"a": Arm("so")}
    assert (config.data.source, config.data.train, config.data.test) == ("digits", None, 5)


def test_a_document_makes_the_configuration_again(tiny: Callable[..., Config]) -> None:
    config = tiny(recipe={"lr": 1}, arms={"a": {"penalty": "so"}})
    document = config.document()
    assert Config.of(document) == config
    assert json.dumps(Config.of(document).document()) == json.dumps(document)
    assert '"lr": 1,' in json.dumps(document)  # as it was written: it has a part in the fingerprint


def test_a_fingerprint_is_of_all_that_changes_numbers(tiny: Callable[..., Config]) -> None:
    one = fingerprint(tiny().document())
    assert one == fingerprint(tiny().document())
    others = [
        tiny(threads=2),
        tiny(seeds=[0, 2]),
        tiny(recipe={"flip": True}),
        tiny(data={"train": 63}),
        tiny(arms={"none": {"weight_decay": 0}}),
        tiny(options={"ablate": 1}),
    ]
    assert len({one, *(fingerprint(other.document()) for other in others)}) == 7


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_deals_units(name: str) -> None:
    config = load(name)
    units = [unit for stage in question_of(config).stages(config) for unit in stage]
    assert units
    texts = [json.dumps(unit, allow_nan=False) for unit in units]
    assert len(set(texts)) == len(texts)
    assert {unit["seed"] for unit in units} == set(config.seeds)


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ({"criterion": "l1", "ratio": "0.5"}, "ratio is '0.5'"),
        ({"criterion": 3, "ratio": 0.5}, "unknown criterion 3"),
        ({"criterion": "variety(l1", "ratio": 0.5}, r"unknown criterion 'variety\(l1'"),
        ({"criterion": "variety(l1, gat)", "ratio": 0.5}, "unknown mode 'gat'"),
        ({"criterion": "l1", "ratio": 0.5, "rounds": 0}, "rounds is 0"),
        ({"criterion": "l1", "ratio": 0.5, "round_to": 0}, "round_to is 0"),
        ({"criterion": "l1", "ratio": 0.5, "verify": False}, "unknown argument of a cut 'verify'"),
    ],
)
def test_a_cut_is_checked_before_it_is_made(cut: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_cut(cut, "here")
    check_cut({"criterion": "variety(l1, gate)", "ratio": 0.5, "scope": "local", "rounds": 2}, "x")


def changed(name: str, key: str, value: Any) -> Config:
    config = load(name)
    document = config.document()
    document["options"][key] = value
    return Config.of(document)


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("early-digits", "ratio", [0.5, 2], "options: ratio is 2"),
        ("early-digits", "ratio", [], r"options.ratio is \[\], expected a ratio for the masks"),
        ("early-digits", "at", [0.5, 2], r"options.at is 2, expected shares in .0, 1."),
        ("early-digits", "at", ["x"], "options.at is 'x', expected a number"),
        ("early-digits", "masks", ["bn"], "options: unknown criterion 'bn'"),
        ("early-digits", "mask", [], "unknown key in .options. 'mask'; did you mean 'masks'"),
        ("duplicates-digits", "criterion", ["l3"], "options: unknown criterion 'l3'"),
        ("duplicates-digits", "share", 1.5, "options.share is 1.5, expected .* at most 1"),
        ("duplicates-digits", "share", 0, "options: ratio is 0"),
        ("duplicates-digits", "noise", "no", "options.noise is 'no', expected a number"),
        ("trainability-digits", "methods", ["tp"], "unknown method 'tp'; did you mean 'tpp'"),
        ("trainability-digits", "methods", ["tpp, short"], "unknown method 'tpp, short'"),
        ("trainability-digits", "lr", ["x"], "options.lr is 'x', expected a number"),
        ("trainability-digits", "lr", 0.1, "options.lr is 0.1, expected a list"),
        ("cost-cifar10", "budget", -1, "options.budget is -1, expected a number of at least 0"),
        ("cost-cifar10", "batch_size", 0, "options.batch_size is 0, .* of at least 1"),
    ],
)
def test_every_question_checks_its_options(name: str, key: str, value: Any, says: str) -> None:
    config = changed(name, key, value)
    with pytest.raises(ValueError, match=says):
        question_of(config).stages(config)


def test_nothing_is_early_in_no_training() -> None:
    document = load("early-digits").document()
    document["recipe"]["epochs"] = 0
    config = Config.of(document)
    with pytest.raises(ValueError, match=r"recipe.epochs is 0, expected one at least"):
        question_of(config).stages(config)
