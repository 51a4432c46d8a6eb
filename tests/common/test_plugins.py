"""Plug-ins by name: shipped modules and entry points of installed packages."""

import re

import pytest
from support.packages import installed

from tafs.common.plugins import Group

SHIPPED = Group(kind="method", attribute="METHOD", package="tafs.baselines")


@pytest.fixture
def install(tmp_path):
    def of(value: str = "their_package.theirs", text: str = "METHOD = 3", name: str = "theirs"):
        return installed(tmp_path, {"theirs.py": text}, {"tafs.methods": {name: value}})

    return of


def test_a_shipped_module_is_a_plugin_by_its_file_name():
    assert "flow_grpo" in SHIPPED.names()
    assert "__init__" not in SHIPPED.names()
    assert SHIPPED.source("flow_grpo").parts[-2:] == ("baselines", "flow_grpo.py")
    assert SHIPPED.load("flow_grpo").TITLE == "Flow-GRPO"


@pytest.mark.parametrize("value", ["their_package.theirs", "their_package.theirs:METHOD"])
def test_an_entry_point_of_an_installed_package_is_a_plugin(install, tmp_path, value):
    with install(value):
        assert "theirs" in SHIPPED.names()
        assert SHIPPED.source("theirs") == tmp_path / "their_package" / "theirs.py"
        assert SHIPPED.load("theirs") == 3
    assert "theirs" not in SHIPPED.names()


@pytest.mark.parametrize(
    ("name", "value", "text", "message"),
    [
        ("theirs", "their_package.theirs", "1 +", r"theirs\.py \(package their-package 1\.0\) .*"),
        ("theirs", "their_package.theirs", "import nothing_here", ".*ModuleNotFoundError"),
        ("theirs", "their_package.theirs", "", "theirs.py .* defines no METHOD; define it there"),
        ("theirs", "their_package.other", "", "their_package.other of package .* was not found"),
        ("theirs", "not_here.other", "", "not_here.other of package .* cannot be imported"),
        ("flow_grpo", "their_package.theirs", "", "'flow_grpo' is defined twice, by .* and by .*"),
    ],
)
def test_a_broken_plugin_is_named_with_its_package_in_one_line(install, name, value, text, message):
    with install(value, text, name), pytest.raises(ValueError, match=message) as raised:
        SHIPPED.load(name)
    assert re.match(r"method '\w+'", str(raised.value))
    assert "package their-package 1.0" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown method 'flowgrpo'; did you mean 'flow_grpo'"):
        SHIPPED.load("flowgrpo")
    with pytest.raises(ValueError, match="unknown method 'x' .available: awm, branch_grpo, dance"):
        SHIPPED.source("x")
