"""Configs: what a file may say, what an override may change, and what a mistake is told."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from tinyr2.core.config import Config, apply, build, dump, lasting, load, nearest, parse_yaml, read
from tinyr2.core.errors import ConfigError


class Wheel(Config):
    radius: float = Field(0.5, gt=0)
    spokes: int = 8


class Car(Config):
    name: str
    wheel: Wheel = Wheel()
    spare: Wheel | None = None
    wheels: tuple[Wheel, ...] = ()
    colors: dict[str, str] = {}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "car.yaml"
    path.write_text("name: beetle\nwheel: {radius: 0.4}\nwheels: [{spokes: 5}, {spokes: 6}]\nspare:\n")
    return path


def fault(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Car, raw, "car.yaml")
    return str(caught.value)


# --- YAML


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5e1", 5.0), ("1.e3", 1000.0), ("+1e2", 100.0)])
def test_a_number_with_an_exponent_is_a_float_as_everybody_writes_it(text, value):
    found = parse_yaml(text, "here")
    assert (found, type(found)) == (value, float)


@pytest.mark.parametrize(("text", "value"), [
    ("e5", "e5"), ("1e", "1e"), ("1e-4x", "1e-4x"), ('"1e-4"', "1e-4"), ("12", 12), ("true", True), ("null", None),
    ("", None), ("[1, 1e-2]", [1, 0.01])])
def test_everything_else_is_what_yaml_says(text, value):
    found = parse_yaml(text, "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 1", "outer:\n  a: 1\n  b: 2\n  a: 3", "- {a: 1, a: 2}"])
def test_a_key_that_stands_twice_is_an_error_wherever_it_stands(text):
    with pytest.raises(ConfigError, match=r"c.yaml, line \d, column \d+: not valid YAML: key 'a' stands twice"):
        parse_yaml(text, "c.yaml")


def test_the_same_key_in_two_mappings_is_no_mistake():
    assert parse_yaml("a: {x: 1}\nb: {x: 2}", "c.yaml") == {"a": {"x": 1}, "b": {"x": 2}}


def test_malformed_yaml_is_told_with_line_and_column():
    with pytest.raises(ConfigError, match="c.yaml, line 3, column 2: not valid YAML"):
        parse_yaml("a: 1\nb: [1, 2\nc: 3", "c.yaml")


def test_python_objects_are_not_made():
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.getcwd []", "c.yaml")


# --- files and overrides


def test_a_file_and_its_overrides_become_a_config(file):
    car = load(Car, file, ["wheel.radius=1e-1", "wheels.1.spokes=7", "name=vw", "spare={radius: 2}", "colors.door=red"])
    assert car == Car(name="vw", wheel=Wheel(radius=0.1), spare=Wheel(radius=2.0), colors={"door": "red"},
                      wheels=(Wheel(spokes=5), Wheel(spokes=7)))


def test_an_override_may_hold_the_sign_that_splits_it(file):
    assert load(Car, file, ["name=a=b"]).name == "a=b"


def test_the_last_override_wins(file):
    assert load(Car, file, ["wheel.spokes=3", "wheel.spokes=4"]).wheel.spokes == 4


def test_overrides_leave_what_they_are_put_on_alone():
    raw = {"wheel": {"radius": 1}, "wheels": [{"spokes": 5}]}
    assert apply(raw, ["wheel.radius=2", "wheels.0.spokes=6"]) == {"wheel": {"radius": 2}, "wheels": [{"spokes": 6}]}
    assert raw == {"wheel": {"radius": 1}, "wheels": [{"spokes": 5}]}


@pytest.mark.parametrize(("text", "message"), [
    ("wheel.radius", "'wheel.radius': write it as key=value, e.g. train.learning_rate=1e-4"),
    ("=3", "'=3': write it as key=value"),
    ("name.first=x", "override name.first: name is a value, it has no key 'first'"),
    ("wheels.2.spokes=1", "override wheels.2.spokes: '2' picks from a list of 2; use 0 … 1"),
    ("wheels.first.spokes=1", "'first' picks from a list of 2"),
    ("spare.radius=1", "override spare.radius: spare is null in the file; set it whole"),
    ("name=[1", "override name, line 1"),
])
def test_an_override_that_cannot_be_meant_is_named(file, text, message):
    with pytest.raises(ConfigError) as caught:
        read(file, [text])
    assert message in str(caught.value)


def test_an_empty_file_is_a_config_of_defaults_and_what_they_lack(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load(Car, tmp_path / "c.yaml", ["name=x"]) == Car(name="x")
    with pytest.raises(ConfigError, match="name: missing; add it to the file or give name=… on the command line"):
        load(Car, tmp_path / "c.yaml")


def test_a_missing_file_and_one_that_is_no_mapping_are_named(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such config file"):
        load(Car, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="list.yaml: a config is a mapping of keys, this is a list"):
        load(Car, tmp_path / "list.yaml")


# --- what a model knows


@pytest.mark.parametrize(("raw", "message"), [
    ({"nmae": "x", "name": "y"}, "nmae: unknown key; did you mean 'name'? known here: colors, name, spare, wheel"),
    ({"name": "y", "wheel": {"raduis": 1}}, "wheel.raduis: unknown key; did you mean 'radius'? known here: radius, "),
    ({"name": "y", "spare": {"spoke": 1}}, "spare.spoke: unknown key; did you mean 'spokes'?"),
    ({"name": "y", "wheels": [{}, {"rim": 1}]}, "wheels.1.rim: unknown key; known here: radius, spokes"),
])
def test_an_unknown_key_is_named_with_its_place_and_its_nearest_neighbor(raw, message):
    assert message in fault(raw)


@pytest.mark.parametrize(("raw", "message"), [
    ({"name": 3}, "name: Input should be a valid string (got 3)"),
    ({"name": "y", "wheel": {"radius": "big"}}, "wheel.radius: Input should be a valid number"),
    ({"name": "y", "wheel": {"radius": -1}}, "wheel.radius: Input should be greater than 0 (got -1)"),
    ({"name": "y", "wheel": {"radius": float("inf")}}, "wheel.radius: Input should be a finite number (got inf)"),
    ({"name": "y", "wheel": {"radius": float("nan")}}, "wheel.radius: Input should be"),
    ({"name": "y", "wheel": {"spokes": 1.5}}, "wheel.spokes: Input should be a valid integer"),
    ({"name": "y", "wheel": 3}, "wheel: Input should be a valid dictionary"),
])
def test_a_value_of_the_wrong_kind_is_named_with_what_was_given(raw, message):
    assert message in fault(raw)


def test_all_faults_are_told_at_once_a_line_each_under_the_files_name():
    lines = fault({"wheel": {"raduis": 1, "spokes": "many"}}).splitlines()
    assert lines[0] == "car.yaml:"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == ["name", "wheel.raduis", "wheel.spokes"]


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Car(name="x").name = "y"


def test_a_dumped_config_has_every_default_and_reads_back_equal(tmp_path):
    car = Car(name="größe", wheels=(Wheel(radius=1e-5),), spare=Wheel())
    (tmp_path / "c.yaml").write_text(dump(car), encoding="utf-8")
    assert load(Car, tmp_path / "c.yaml") == car
    assert read(tmp_path / "c.yaml")["wheel"] == {"radius": 0.5, "spokes": 8}
    assert "größe" in dump(car)


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("learning_rte", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate", "seed"]) is None


class Garage(Wheel):
    passing = frozenset({"spokes"})


class Fleet(Config):
    passing = frozenset({"name"})

    name: str
    wheel: Wheel = Wheel()
    best: Garage | None = None
    more: tuple[Garage, ...] = ()


def test_passing_settings_are_left_out_wherever_they_stand():
    fleet = Fleet(name="n", best=Garage(spokes=1), more=(Garage(spokes=2), Garage(radius=0.1)))
    assert lasting(fleet, fleet.model_dump(mode="json")) == {
        "wheel": {"radius": 0.5, "spokes": 8}, "best": {"radius": 0.5}, "more": [{"radius": 0.5}, {"radius": 0.1}]}


def test_what_has_another_form_than_the_config_stays_as_it_is():
    fleet = Fleet(name="n", more=(Garage(),))
    raw = {"name": 3, "best": {"spokes": 1}, "more": [{"spokes": 1}, {"spokes": 2}], "wheel": None, "extra": [1]}
    assert lasting(fleet, raw) == {"best": {"spokes": 1}, "more": [{}, {"spokes": 2}], "wheel": None, "extra": [1]}
    assert lasting(fleet, raw | {"more": []})["more"] == []
