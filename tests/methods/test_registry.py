"""Methods of installed packages, broken method files, and the stub of a method."""

import pytest
from support.packages import assert_clean, installed
from support.toy import toy_run, toy_trainer

from tafs.methods import registry, template


@pytest.fixture
def install(tmp_path):
    def of(text: str):
        points = {"tafs.methods": {"my_method": "their_package.my_method"}}
        return installed(tmp_path / "site", {"my_method.py": text}, points)

    return of


@pytest.fixture
def stub(tmp_path, install):
    """The stub as the module of an installed package."""
    with install(template.write("my_method", tmp_path).read_text()):
        yield "my_method"


def test_a_method_of_an_installed_package_is_found(stub, tmp_path):
    assert stub in registry.names()
    assert registry.source_file(stub) == tmp_path / "site" / "their_package" / "my_method.py"
    assert registry.create(stub, {"steps": 8}).nfe_theta == 7


def test_the_stub_trains_and_costs_what_it_says(stub):
    run = toy_trainer(toy_run(stub))
    assert run.method.forward_equivalents == 6 + 3 * 5
    first = run.iterate(0)["rewards"]["clip"][-1]
    for iteration in range(1, 30):
        last = run.iterate(iteration)["rewards"]["clip"][-1]
    assert last > first + 0.3


def test_the_stub_is_clean_code(tmp_path):
    assert_clean(template.write("my_method", tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "is not a valid name") for name in ("", "My", "a-b", "../x", "x" * 65, "1a")),
        ("tafs_grpo", "is taken"),
        ("base", "is taken"),
        ("class", "keyword"),
    ],
)
def test_an_invalid_or_taken_name_and_a_keyword_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        template.write(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def broken(:", "cannot be imported .SyntaxError: invalid syntax"),
        ("import torch\ntorch.no_such_thing", "cannot be imported .AttributeError: "),
        ("METHOD = 3", "METHOD in .*my_method.py is not a subclass of tafs.methods.Method; derive"),
    ],
)
def test_a_broken_method_file_is_named_in_one_line(install, source, problem):
    with install(source), pytest.raises(ValueError, match=problem) as raised:
        registry.create("my_method", {})
    assert str(raised.value).startswith("method 'my_method': ")
    assert "my_method.py" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown method 'mixgrpo'; did you mean 'mix_grpo'"):
        registry.create("mixgrpo", {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "steps: input should be a valid integer .got True"),
        ("4", "steps: input should be a valid integer .got '4'"),
        (10**7, "steps: 10000000 is too large; the maximum is 1000000"),
    ],
)
def test_a_value_of_another_type_or_size_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=message):
        registry.create("tafs_grpo", {"steps": value})


@pytest.mark.parametrize("name", ["beta", "advantage_limit", "max_grad_norm", "eta", "clip_range"])
def test_a_negative_size_is_refused_by_name(name):
    """A negative limit of the gradient's length would turn the gradient around."""
    with pytest.raises(ValueError, match=f"^{name}: -1.0 is less than 0$"):
        registry.create("flow_grpo", {name: -1.0})
