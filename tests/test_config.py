"""Every wrong setting is refused with what is wrong and what would be right; every shipped file is a right one."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, differences, flatten, from_dict, load, parse, to_dict
from pipeline.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configurations_are_sound_and_say_what_they_are(file):
    config = load(str(file))
    assert file.read_text().startswith("#")
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), where="copy") == config


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {lr: 5e-4, batch: 64}\nmatch: {round: 640}\n")
    config = parse(["--train.lr=1e-4", "--config", str(tmp_path / "a.yaml"), "--seed", "3"])
    assert (config.train.lr, config.train.batch, config.match.round, config.seed) == (1e-4, 64, 640, 3)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lrr: 1}", "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ("trian: {lr: 1}", "unknown key 'trian'; did you mean 'train"),
        ("train: {lr: fast}", "train.lr is 'fast': it must be float"),
        ("train: {batch: 1.5}", "train.batch is 1.5: it must be int"),
        ("train: {lr: -1}", "train.lr is -1.0: it must be positive"),
        ("train: {ema: 1.0}", "train.ema is 1.0"),
        ("train: 3", "'train' must hold keys and values"),
        ("data: {endpoint: http://me:secret@there}", "data.endpoint holds a user or a password: give them as AWS_"),
        ("[1, 2]", "must hold keys and values"),
        ("train: {batch: 100}", "match.round=2048 is no multiple of train.batch=100"),
        ("objective: {name: gan}", "choose one of naign, ign"),
        ("objective: {distance: lpips}", "choose one of l1, l2, norm, l1\\+l2"),
        ("model: {width: 0}", "model.width is 0: it must lie between 1 and"),
        ("resume: maybe", "choose one of auto"),
        ("train: 0", "'train' must hold keys and values"),
        ("train: {images: .inf}", "train.images is inf: it must be int"),
        ("train: {lr_end: .inf}", "train.lr_end is inf: it must be a finite number"),
        ("train: {lr: .nan}", "train.lr is nan: it must be a finite number"),
        ("match: {ratio: .nan}", "match.ratio is nan"),
        ("train: {threads: 100000000}", "train.threads is 100000000: at most"),
        ("run: {path: ''}", "run.path is empty"),
        ("seed: 99999999999999999999999", "seed is"),
        ("a: [", "line 1, column 5: this is no YAML"),
        ("a: 2020-13-45", "this is no YAML"),
        ("[" * 3000, "this is no YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / "a.yaml"))


def test_a_missing_file_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="no configuration file 'nowhere.yaml'; configs/ has"):
        load("nowhere.yaml")


@pytest.mark.parametrize("text", ["[default]\naws_secret_access_key = top-secret\n", "top-secret", "- top-secret: {"])
def test_what_is_no_configuration_is_not_shown(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load(str(tmp_path / "a.yaml"))
    assert "top-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.lrr=1", "--train.lr"),
        ("--train.lr=fast", "could not convert"),
        ("--objective.name=gan", "choose one of naign, ign"),
        ("--match.latents=cauchy", "choose one of gaussian"),
    ],
)
def test_a_wrong_option_ends_with_code_2(option, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([option])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_only_settings_that_touch_the_computation_count_as_different():
    other = Config()
    other.report.rounds, other.run.path, other.data.workers, other.train.threads = 7, "elsewhere", 3, 1
    assert differences(Config(), other) == []
    other.train.lr = 0.5
    assert differences(Config(), other) == ["train.lr: 0.002 there, 0.5 now"]
    assert set(flatten(Config())) >= {"train.lr", "seed", "match.ratio", "run.path"}


def test_the_mnist_recipe_names_what_is_not_the_default():
    recipe = flatten(load(str(CONFIGS[0].parent / "mnist.yaml")))
    changed = {key for key, value in flatten(Config()).items() if recipe[key] != value}
    assert changed == {
        *("objective.third", "objective.denoising", "objective.damage", "match.ratio", "train.precision", "model.code")
    }
