"""Settings: what a grid becomes, and one clear line for each bad input."""

import re
import tomllib

import pytest

from jaxinv import prepare, search, sweep, train
from jaxinv.client import Local
from jaxinv.errors import UserError
from jaxinv.invert import __main__ as invert
from jaxinv.settings import flags, reader, requests, schema
from jaxinv.settings.naming import naming_settings
from jaxinv.settings.schema import RENAMED


def study(path=None, **flags):
    return reader.load_study(path, flags)


def test_default_study_is_the_documented_one():
    default = study()
    assert default.axes == {"tv": [1e-2, 1e-3, 1e-4]}
    assert (default.plan.targets, default.plan.seeds, len(default.cells)) == (4, 32, 3)
    assert {c.model for c in default.cells} == {"lenet_zhu"}


def test_flags_override_the_file_and_lists_make_axes(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        'question = "?"\nexpectation = "!"\n[run]\nseeds = 3\n[grid]\ntv = [0.1, 0.2]\nlr = 0.5\n'
    )
    made = study(file, seeds="5", lr=["0.1", "0.2"], target_ids="3,17")
    assert made.name == "own"
    assert made.text.question == "?"
    assert (made.text.expectation, study(file).text.expectation) == ("", "!")
    assert made.axes == {"tv": [0.1, 0.2], "lr": [0.1, 0.2]}
    assert [(c.tv, c.lr) for c in made.cells] == [(0.1, 0.1), (0.1, 0.2), (0.2, 0.1), (0.2, 0.2)]
    assert (made.plan.seeds, made.plan.target_ids) == (5, (3, 17))


def test_the_rate_is_that_of_the_optimizer_unless_given(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[grid]\nlr = 0.5\n")

    def of(**flags):
        return [cell.lr for cell in study(file, **flags).cells]

    assert of() == [0.5]
    assert of(attack="dlg") == [1.0]  # another optimizer's rate is none of L-BFGS's
    assert of(attack="dlg", lr=["0.2"]) == [0.2]
    assert of(attack="dlg", optimizer=["lbfgs", "adam"]) == [1.0, 0.1]
    assert of(optimizer="lbfgs", sign="none") == [1.0]


def test_vary_tables_ask_one_question_each_around_one_cell(tmp_path):
    file = tmp_path / "around.toml"
    file.write_text(
        "[grid]\nmodel = 'convnet'\nwidth = 8\n[[vary]]\nwidth = [8, 16]\n"
        "[[vary]]\ntv = [0.01, 0.1]\n"
        "[[vary]]\nvictim = 'lenet_zhu-cifar10'\n[preset.wide.grid]\nlr = 0.5\n"
    )
    made = study(file)
    cells = [(c.model, c.width, c.tv, c.lr) for c in made.cells]
    first = ("convnet", 8, 0.01, 0.1)
    assert cells == [
        first,
        ("convnet", 16, 0.01, 0.1),
        ("convnet", 8, 0.1, 0.1),
        ("lenet_zhu", None, 0.01, 0.1),
    ]
    assert made.axes["width"] == [8, 16, None]
    assert made.axes["tv"] == [0.01, 0.1]
    settings = [cell.model_dump() for cell in made.cells]
    names = [naming_settings(made.axes, settings, i) for i in range(4)]
    assert names[0] == {"model": "convnet", "width": 8, "tv": 0.01}
    assert names[1:3] == [{"width": 16}, {"tv": 0.1}]
    assert names[3]["victim"] == "lenet_zhu-cifar10"
    assert {c.lr for c in reader.load_study(file, {}, "wide").cells} == {0.5}
    # A flag holds in every question, and makes one cell of those that differed in it alone.
    assert [(c.width, c.tv) for c in study(file, tv=["1"]).cells[:2]] == [(8, 1.0), (16, 1.0)]


def test_shipped_sweeps_are_valid(pytestconfig):
    files = sorted((pytestconfig.rootpath / "sweeps").glob("*.toml"))
    assert {"geiping_table1_lenet", "tv_weight"} <= {f.stem for f in files}
    for file in files:
        text = study(file).text
        assert all((text.question, text.cost, text.expectation))
        for preset, tables in tomllib.loads(file.read_text()).get("preset", {}).items():
            named = [
                t["victim"]
                for t in (tables.get("grid", {}), *tables.get("vary", []))
                if "victim" in t
            ]
            victims = [v for names in named for v in ([names] if isinstance(names, str) else names)]
            if all((pytestconfig.rootpath / "checkpoints" / v).exists() for v in victims):
                reader.load_study(file, {}, preset)  # others are to be trained first


def test_what_follows_from_the_attack_names_no_cell(tmp_path):
    file = tmp_path / "two.toml"
    file.write_text('[grid]\ntv = 0.1\n[[vary]]\nimages = [1, 2]\n[[vary]]\nattack = "bayes"')
    made = study(file)
    assert made.axes == {"images": [1, 2], "attack": ["geiping", "bayes"]}
    assert [(c.tv, c.iterations) for c in made.cells] == [(0.1, 500), (0.1, 500), (0, 28)]


BAD = [
    ({"model": ["lenet"]}, "--model lenet: unknown; known are lenet_zhu, mlp, convnet, resnet20"),
    ({"objective": ["cos"]}, "--objective cos: unknown; known are cosine, l2"),
    ({"tv": ["-1"]}, "--tv -1: .*greater than or equal to 0"),
    ({"tv": ["nan"]}, "--tv nan: .*finite"),
    ({"iterations": ["ten"]}, "--iterations ten: .*integer"),
    ({"seeds": "0"}, "--seeds 0: .*greater than or equal to 1"),
    ({"target_ids": "3,x"}, "--target-ids x: .*integer"),
    ({"labels": ["idlg"], "images": ["2"]}, "--labels idlg reads one label"),
    ({"tv": ["0.1", "0.1"]}, "a cell twice"),
    ({"model": ["mobilenetv2"], "width": ["4"]}, "--width 4: mobilenetv2 has widths that 8 div"),
    ({"defense": ["noise:-1"]}, "--defense noise:-1: .*variance must be at least 0"),
    ({"defense": ["noise:nan"]}, "--defense noise:nan: .*variance must be at least 0"),
    ({"defense": ["prune:1.5"]}, "--defense prune:1.5: .*fraction must be .* at most 1"),
    ({"defense": ["dpsgd:1:1"], "model": ["convnet"]}, "BatchNorm .*use --model convnet_gn"),
    ({"defense": ["dpsgd:1:1"], "client_epochs": ["2"]}, "--defense dpsgd:1:1: of one gradient"),
    ({"defense": ["victim"]}, "--defense victim: .*name one"),
    ({"adaptive": ["true"]}, "--adaptive true: there is no --defense"),
    ({"attack": ["bayes"], "tv": ["0.1"]}, "--tv: --attack bayes does not use it"),
    ({"attack": ["bayes"], "lr": ["0.1"]}, "--lr: --attack bayes does not use it"),
    ({"attack": ["geiping"], "damping": ["0.1"]}, "--damping: --attack geiping does not use it"),
    ({"attack": ["analytic"], "polish": ["3"]}, "--polish: --attack analytic does not use it"),
    (
        {"attack": ["bayes"], "init": ["normal"]},
        "--init normal: --attack bayes does not begin so; use mean or prior",
    ),
    ({"init": ["mean"]}, "--init mean: --attack geiping does not begin so; use normal or"),
    ({"attack": ["bayes"], "anneal_to": ["200"]}, "--anneal-to 200: above --anneal-from 100"),
    ({"attack": ["bayes"], "anneal_to": ["0"]}, "--anneal-to 0: .*greater than 0"),
    ({"attack": ["bayes"], "anneal_from": ["-1"]}, "--anneal-from -1: .*greater than 0"),
    ({"attack": ["bayes"], "image_prior": ["dct"]}, "--image-prior dct: unknown; known are spec"),
    ({"attack": ["bayes"], "posterior": ["8"], "polish": ["2"]}, "--posterior: of an image that"),
    ({"images": ["1", "2"], "target_ids": "1,2"}, "--target-ids .* several values of --images"),
    # What would change nothing.
    ({"width": ["16"]}, "--width 16: lenet_zhu has one size"),
    ({"grouping": ["repeated"]}, "--grouping repeated: of several images"),
    ({"client_lr": ["0.1"]}, "--client-lr 0.1: the client takes one step"),
    ({"assumed_lr": ["0.1"]}, "--assumed-lr 0.1: the client takes one step"),
    (
        {
            "client_lr": ["0.1"],
            "assumed_lr": ["0.2"],
            "client_batch": ["1"],
            "assumed_batch": ["2"],
            "images": ["2"],
        },
        "--assumed-lr 0.2: the client takes one step",
    ),
    ({"shuffled": ["true"], "client_epochs": ["2"]}, "--shuffled True: an epoch of one step"),
    ({"gram": ["on"], "client_epochs": ["2"]}, "--gram on: of one gradient"),
    ({"gram": ["on"], "prior_features": ["0.1"]}, "--gram on: .*without --prior-features"),
    ({"gram": ["on"], "adaptive": ["true"], "defense": ["clip:1"]}, "--gram on: .*blind to the"),
    ({"noise_seeds": "4"}, "--noise-seeds 4: no --defense here is random"),
    ({"noise_seeds": "4", "defense": ["prune:0.5"]}, "--noise-seeds 4: no --defense"),
    ({"seeds": "1", "prior_group": ["0.1"]}, "--prior-group: looks at a target's other seeds"),
    ({"data_dir": "/nowhere"}, "--data-dir: the tiles ship with the package"),
    ({"memory": "1", "attack": ["analytic"], "model": ["mlp"]}, "--memory: a closed form takes"),
    ({"attack": ["analytic"], "labels": ["joint"]}, "--labels joint: --attack analytic takes lab"),
    ({"attack": ["analytic"], "images": ["2"], "assumed_batch": ["1"]}, "--assumed-batch: --att"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_settings_name_themselves(flags, message):
    with pytest.raises(UserError, match=message):
        study(**flags)


def test_bad_files_name_themselves(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml cannot be read"):
        study(tmp_path / "absent.toml")
    file = tmp_path / "bad.toml"
    for content, message in (
        ("grid = [", "bad.toml cannot be read"),
        ("[grid]\ntvv = 1", "unknown setting 'tvv'; known are dataset"),
        ("[grid]\ntv = []", "--tv: an axis needs at least one value"),
        ("vary = 1", r"vary 1: .* list in .*bad\.toml"),
        ("[preset.full]\nrun = 1", "preset.full.run 1: .* dictionary in "),
        ("quest = 1", "unknown setting 'quest' in .*known are run, grid, vary, quest"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            study(file)
    file.write_text("[preset.full.run]\ntargets = 1")
    with pytest.raises(UserError, match=r"--preset large: .* does not have it; known: full"):
        reader.load_study(file, {}, "large")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tv", "-1"],
        ["--no-such-flag"],
        ["--targets", "100000"],
        ["--dataset", "no_such_set"],
        ["--out", "FILE"],
    ],
)
def test_commands_end_with_code_2_one_line_and_nothing_written(arguments, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    arguments = [str(file) if a == "FILE" else a for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
    assert sweep.main([*arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_older_names_say_what_they_are_called_now(tmp_path):
    file = tmp_path / "old.toml"
    for old, new in RENAMED.items():
        with pytest.raises(UserError, match=f"^--{old}: is now --{new.replace('_', '-')}$"):
            parsed(flags.add_study, f"--{old}", "1")
        file.write_text(f"[grid]\n{old} = 1\n")
        with pytest.raises(UserError, match=f"^the setting '{old}' is now '{new}'$"):
            study(file)
        with pytest.raises(UserError, match=f"'{old}' is now '{new}'"):
            reader.load_search({"space": [f"{old}=0.1:1"]})
    with pytest.raises(UserError, match="--no-augment: is now --augment false"):
        parsed(flags.add_training, "--no-augment")


def parsed(add, *arguments):
    """The flags that a command line gives, by name."""
    parser = flags.FlagParser("command", "")
    add(parser)
    return vars(parser.parse_args(arguments))


def test_a_switch_alone_says_true():
    def load(*words):
        return reader.load_training(parsed(flags.add_training, *words))

    private = ("--noise-multiplier", "1", "--delta", "1e-5")
    assert not load().dp
    assert load("--dp", *private).dp
    assert load("--dp", "true", *private).dp
    assert not load("--augment", "false").augment


@pytest.mark.parametrize(
    ("add", "models"),
    [
        (flags.add_study, (schema.Cell, schema.Plan)),
        (flags.add_search, (schema.Cell, schema.Plan, requests.Search)),
        (flags.add_training, (requests.Training,)),
        (flags.add_workers, (schema.Workers,)),
        (flags.add_inverting, (requests.Inverting,)),
    ],
)
def test_help_says_of_every_flag_what_it_takes(add, models):
    parser = flags.FlagParser("command", "")
    add(parser)
    text = " ".join(parser.format_help().split())
    assert "default: None" not in text
    assert not re.search(r"\(default[^)]*\)\.? \(default", text)
    for model in models:
        for name, field in model.model_fields.items():
            assert f"--{name.replace('_', '-')} " in text
            assert field.description[0].isupper()
            assert field.description.endswith((".", ")."))
    for old in RENAMED:
        assert f"--{old} " not in text


def test_help_shows_choices_and_types():
    parser = flags.FlagParser("command", "")
    flags.add_study(parser)
    text = parser.format_help()
    for words in (
        "objective {cosine,l2} ...",
        "tv FLOAT ...",
        "seeds INT",
        "box {true,false} ...",
        "labels {known,idlg,llg,ilrg,counts,joint} ...",
    ):
        assert f"  --{words}" in text


def test_an_attackers_view_is_what_it_assumes_and_else_the_truth():
    cell = schema.Cell(images=4, client_batch=2, client_lr=0.1, defense="clip:1,noise:0.5")
    assert cell.attacker() == (4, Local(1, 2), 0.1, ())
    own = cell.model_copy(
        update={"assumed_images": 6, "assumed_batch": 3, "assumed_lr": 0.2, "adaptive": True}
    )
    assert own.attacker() == (6, Local(1, 3), 0.2, ("clip", "noise"))
    assert (cell.numbers()["client_lr"], own.numbers()["client_lr"]) == (0.1, 0.2)


HUGE = "9" * 5000
# Whatever is asked for, a command answers in one line, with exit code 2, and writes nothing.
BAD_INPUTS = {
    "seeds 23 digits": (sweep, ["--seeds", "9" * 23], "--seeds 9+: .*less than or equal"),
    "seeds 5,000 digits": (sweep, ["--seeds", HUGE], r"--seeds 9{200}\.\.\.: "),
    "seeds 1_0": (sweep, ["--seeds", "1_0"], "--seeds 1_0: write a number with plain digits"),
    "lr of other digits": (sweep, ["--lr", "٣"], "--lr ٣: write a number with plain digits"),
    "id 1_0": (sweep, ["--target-ids", "1_0"], "--target-ids 1_0: write a number"),
    "target twice": (sweep, ["--target-ids", "1,1"], "--target-ids: give each image once"),
    "two kinds of targets": (sweep, ["--target-ids", "1", "--targets", "2"], "leave --targets out"),
    "iterations 3e9": (sweep, ["--iterations", "3000000000"], "--iterations 3000000000: "),
    "width": (sweep, ["--model", "mlp", "--width", "100000000"], "--width 100000000: "),
    "network seed": (sweep, ["--network-seed", str(2**32)], "--network-seed 4294967296: "),
    "tv beyond float32": (sweep, ["--tv", "1e308"], r"--tv 1e308: beyond what float32 holds"),
    "defense beyond": (sweep, ["--defense", "noise:1e300"], "--defense noise:1e300: beyond"),
    "defense digits": (sweep, ["--defense", "noise:٣"], "--defense noise:٣: write it with plain"),
    "long chain": (sweep, ["--defense", ",".join(["noise:1"] * 50)], "a chain of 50; give 8"),
    "long victim": (sweep, ["--victim", "a" * 5000], r"--victim a+\.\.\.: too long"),
    "long out": (sweep, ["--out", "x" * 300], r"--out x+\.\.\.: too long"),
    "out with NUL": (sweep, ["--out", "a\0b"], r"--out 'a\\x00b': no name of a file"),
    "out with a line": (sweep, ["--out", "a\nb"], r"--out 'a\\nb': no name of a file"),
    "out empty": (sweep, ["--out", ""], "--out : no name of a file"),
    "profile": (sweep, ["--profile", "/proc/xx", "--dry-run"], "--profile: cannot be made there"),
    "an abbreviation": (sweep, ["--iter", "1"], "unrecognized arguments: --iter"),
    "millions of cells": (
        sweep,
        ["--tv", *map(str, range(1, 5001)), "--lr", *map(str, range(1, 5001))],
        "the study has 25,000,000 cells; 10,000 at most",
    ),
    "endless study": (sweep, ["/dev/zero"], "sweep file /dev/zero cannot be read: more than"),
    "a folder": (sweep, ["."], r"sweep file \. cannot be read: Is a directory"),
    "training seed": (train, ["--seed", str(2**32)], "--seed 4294967296: "),
    "training out": (train, ["--out", "x" * 300], r"--out x+\.\.\.: too long"),
    "candidates": (search, ["--candidates", "100000000000"], "--candidates 100000000000: "),
    "rungs": (search, ["--rungs", "1000"], "--rungs 1000: "),
    "range twice": (search, ["--space", "tv=0.1:1", "tv=0.2:1"], "'tv' has two ranges; give one"),
    "range beyond": (search, ["--space", "lr=1e30:1e39"], "beyond what float32 holds"),
    "endless archive": (
        prepare,
        ["cifar10", "--archive", "/dev/zero", "--data-dir", "x"],
        "--archive /dev/zero: is no file",
    ),
    "update with NUL": (invert, ["--update", "a\0b"], r"--update 'a\\x00b': no name"),
    "classes": (invert, ["--update", "u", "--victim", "v", "--classes", "3,x"], "--classes x: "),
}
BAD_FILES = {
    "nesting": ("grid = " + "[" * 50_000, "nest too deeply"),
    "closed nesting": ("grid = " + "[" * 20_000 + "]" * 20_000, "nest too deeply"),
    "dotted keys": ("a." * 30_000 + "a = 1", "nest too deeply"),
    "5,000 digits": (f"[run]\nseeds = {HUGE}", "cannot be read: "),
    "20 digits": ("[grid]\nnetwork_seed = 99999999999999999999", "--network-seed 9{20}: "),
    "50 MB": ("#" * 50_000_000, "more than 65,536 characters"),
    "millions of cells": (
        f"[grid]\ntv = {[*range(5000)]}\nlr = {[*range(1, 5001)]}",
        "the study has 25,000,000 cells",
    ),
    "true for a number": ("[run]\nseeds = true", "--seeds True: a number is wanted"),
    "true for a weight": ("[grid]\ntv = [true]", "--tv True: a number is wanted"),
    "1 for true": ("[grid]\nbox = 1", "--box 1: give true or false"),
    "a list in a list": ("[grid]\nattack = [['dlg']]", "--attack .'dlg'.: .* valid string"),
    "targets twice": ("[run]\ntargets = 1\ntarget_ids = [1]", "leave --targets out"),
    "no targets": ("[run]\ntarget_ids = []", r"--target-ids \[\]: .*at least 1"),
}


def answer(command, arguments, capsys):
    """The one line with which a command refuses."""
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_and_nothing_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, arguments, message = BAD_INPUTS[name]
    assert re.search(message, answer(command, arguments, capsys))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_sweep_file_is_one_line_and_nothing_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, message = BAD_FILES[name]
    file = tmp_path / "study.toml"
    file.write_text(text)
    assert re.search(message, answer(sweep, ["study.toml"], capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_a_setting_is_refused_only_where_no_cell_has_a_use_for_it():
    """An axis may have values beside which another setting means nothing."""
    made = study(client_lr=["0.1"], images=["2"], client_batch=["1", "2"], tv="0.01")
    assert len(made.cells) == 2
    made = study(noise_seeds="2", defense=["none", "noise:1e-3"], tv="0.01")
    assert len(made.cells) == 2
