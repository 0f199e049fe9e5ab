"""Every wrong setting is refused with what is wrong and what would be right; every shipped file is a right one."""

import json
from pathlib import Path

import pytest
import yaml

from naign.config import Config, changeable, differences, flatten, from_dict, load, parse, to_dict
from naign.errors import InputError, exit_on_input_error
from naign.model.losses import NaignConfig
from naign.model.networks import PointConfig, SpatialConfig
from naign.settings.constraints import FREE, MAY_CHANGE

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def written(tmp_path):
    """Writes a configuration; returns its path."""

    def write(text):
        (tmp_path / "a.yaml").write_text(text)
        return str(tmp_path / "a.yaml")

    return write


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configurations_are_sound_and_say_what_they_are(file):
    config = load(str(file))
    assert file.read_text().startswith("#")
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), where="copy") == config


def test_recipes_share_no_run_folder_and_no_data_folder_of_another_set():
    recipes = {file.stem: load(str(file)) for file in CONFIGS}
    assert {name: recipe.run.path for name, recipe in recipes.items()} == {name: f"runs/{name}" for name in recipes}
    sources = {recipe.data.path: recipe.data.source or "mnist" for recipe in recipes.values()}
    assert all((recipe.data.source or "mnist") == sources[recipe.data.path] for recipe in recipes.values())
    of_your_own = {"folder64", "folder256", "photos", "pictures", "lsun", "ffhq100"}
    for name, recipe in recipes.items():  # what is missing is packed on the way
        assert recipe.data.source or recipe.data.path == Config().data.path or name in of_your_own, name


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(written):
    file = written("train: {lr: 5e-4, batch: 64}\nmatch: {round: 640}\n")
    config = parse(["--train.lr=1e-4", "--config", file, "--seed", "3"])
    assert (config.train.lr, config.train.batch, config.match.round, config.seed) == (1e-4, 64, 640, 3)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lrr: 1}", "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ("train: {lr: fast}", "train.lr is 'fast': it must be float"),
        ("train: {lr: -1}", "train.lr is -1.0: it must be positive"),
        ("train: {ema: 1.0}", "train.ema is 1.0"),
        ("train: 3", "'train' must hold keys and values"),
        ("[1, 2]", "must hold keys and values"),
        ("train: {batch: 100}", "match.round=2048 is not a multiple of train.batch=100"),
        ("objective: {name: gan}", "a.yaml: objective.name is 'gan': choose one of naign, ebm, ign"),
        (
            "objective: {name: ign, third: matched}",
            "unknown key 'objective.third' of objective.name=ign; known settings|did you mean",
        ),
        ("objective: {name: [ign]}", "objective.name is \\['ign'\\]: it must be str"),
        ("model: {width: 0}", "model.width is 0: it must lie between 1 and"),
        ("train: {images: .inf}", "train.images is inf: it must be int"),
        ("train: {lr_end: .inf}", "train.lr_end is inf: it must be a finite number"),
        ("match: {ratio: .nan}", "match.ratio is nan"),
        ("run: {path: ''}", "run.path is empty"),
        ("seed: 99999999999999999999999", "seed is"),
        ("a: [", "line 1, column 5: not valid YAML"),
        ("a: 2020-13-45", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(written, text, message):
    file = written(text)
    with pytest.raises(InputError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: %s", "seed is a number of too many digits"),
        ("data: {path: [%s]}", "data.path is a number of too many digits: it must be str"),
        ("train: {? %s : 1}", "a key of 'train' is not text"),
    ],
)
def test_a_number_of_too_many_digits_is_refused(written, text, message):
    file = written(text % f"0x{'f' * 5000}")
    with pytest.raises(InputError, match=message):
        load(file)


@pytest.mark.parametrize("name", ["nowhere.yaml", "digitz", "configs/digits", "../configs/digits", ""])
def test_a_missing_file_is_refused_with_the_names_there_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"'{name}': .* names: cifar10, .*digits, |without a file cannot be read"):
        load(name)


def test_a_configuration_has_a_name_unless_a_file_is_called_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load("digits") == load(str(CONFIGS[0].parent / "digits.yaml")) != Config()
    (tmp_path / "mnist").write_text("seed: 3")
    assert load("mnist") == Config(seed=3)


@pytest.mark.parametrize(
    "text",
    ["[default]\naws_secret_access_key = top-secret\n", "top-secret", "- top-secret: {", "root:$6$top-secret:1: x"],
)
def test_what_is_no_configuration_is_not_shown(written, text):
    file = written(text)
    with pytest.raises(InputError) as error:
        load(file)
    assert "top-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.lr=fast", "could not convert"),
        ("--objective.name=gan", "choose one of naign, ebm, ign"),
        ("--objective.clamp=2", "those of --model.name=conv --objective.name=naign"),
        ("--objective.thrid=none", "--objective.third"),
    ],
)
def test_a_wrong_option_ends_with_code_2(option, message, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_input_error("train"):
        parse([option])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def help_of(*options, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([*options, "--help"])
    assert ended.value.code == 0
    return {word.strip() for word in capsys.readouterr().out.replace("_", "-").split() if word.startswith("--")}


def test_help_shows_the_settings_of_what_is_chosen_alone(capsys):
    usual = help_of(capsys=capsys)
    assert {"--objective.third", "--model.code"} <= usual and not {"--objective.clamp", "--model.octaves"} & usual
    other = help_of("--objective.name", "ign", "--model.name=mlp", capsys=capsys)
    assert {"--objective.clamp", "--model.octaves"} <= other and not {"--objective.third", "--model.code"} & other


def test_a_choice_on_the_command_line_has_its_own_settings(written, capsys):
    file = written("model: {name: mlp, octaves: 3}\nobjective: {name: nae, bound: 2}\n")
    config = parse(["--config", file, "--objective.code-steps=3"])
    assert (config.model.name, config.model.octaves) == ("mlp", 3)
    assert (config.objective.name, config.objective.bound, config.objective.code_steps) == ("nae", 2.0, 3)
    assert parse(["--model.name=mlp", "--model.octaves=1"]).model == PointConfig(octaves=1)
    assert parse(["--config", file, "--objective.name=naign"]).objective == NaignConfig()
    assert parse(["--config", "mnist", "--model.name=spatial"]).model == SpatialConfig()
    assert not capsys.readouterr().err


def test_the_command_line_mends_a_file_before_both_are_checked(written):
    file = written("train: {batch: 192}\n")
    assert parse(["--config", file, "--match.round=1920"]).match.round == 1920
    with pytest.raises(InputError, match="match.round=2048 is not a multiple of train.batch=192"):
        parse(["--config", file])


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("prior: {name: flow, begin: 0.5}", "prior.begin is a setting of an earlier version: f is trained on"),
        ("prior: {name: smooth}", "prior.name is 'smooth': choose one of none, gmm, flow"),
        ("quality: {rounds: 3}", "quality is a setting of an earlier version"),
    ],
)
def test_a_setting_of_an_earlier_version_names_what_there_is_now(written, text, now):
    file = written(text)
    with pytest.raises(InputError, match=now):
        parse(["--config", file])


def test_only_settings_that_touch_the_computation_count_as_different():
    other = Config()
    other.report.pictures = 7
    other.run.path = "elsewhere"
    other.data.workers = 3
    other.train.threads = 1
    assert differences(Config(), other) == []
    other.train.lr = 0.5
    assert differences(Config(), other) == ["train.lr: 0.006 there, 0.5 now"]
    assert set(flatten(Config())) >= {"train.lr", "seed", "match.ratio", "run.path"}
    other = Config(objective=from_dict({"objective": {"name": "ign"}}, where="here").objective)
    assert differences(Config(), other) == ["objective.name: naign there, ign now"]


def test_micro_batches_may_change():
    assert differences(parse(["--train.batch=64"]), parse(["--train.batch=64", "--train.accumulate=2"])) == []


def test_a_large_seed_stays_what_it_is():
    config = parse(["--seed=1234567890123456789"])
    recorded = from_dict(json.loads(json.dumps(to_dict(config))), where="there")
    assert recorded.seed == config.seed == 1234567890123456789


def test_what_a_resumed_run_may_change():
    assert changeable(Config(), MAY_CHANGE) == {
        *("data.path", "data.index", "train.images", "train.lr", "train.lr_end", "train.warmup", "train.clip"),
        "train.weight_decay",
    }
    fixed = flatten(Config()).keys() - changeable(Config(), FREE) - changeable(Config(), MAY_CHANGE)
    assert {key.partition(".")[0] for key in fixed} == {
        "data",
        "model",
        "objective",
        "latents",
        "prior",
        "match",
        "train",
        "seed",
    }
    assert {key for key in fixed if key.startswith(("data.", "train."))} == {
        *("data.split", "data.flip", "data.crop", "data.size"),
        *("data.shuffle", "train.batch", "train.passes"),
        *("train.optimizer", "train.ema"),
    }


def test_what_is_trained_when_nothing_is_said_is_the_recommended_recipe():
    recipe = load(str(CONFIGS[0].parent / "mnist.yaml"))
    assert parse([]) == Config() == recipe
    assert (recipe.data.path, recipe.data.source) == ("data/mnist", "")  # which stands for mnist
