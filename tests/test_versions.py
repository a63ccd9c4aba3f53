"""The versions that this project declares, pins, and refuses to be loaded with."""

import configparser
import importlib
import sys

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from hub_cards import export
from modeling_moca import configuration_moca
from tests.conftest import REPOSITORY
from tests.hub_cards.test_export import run, save


def declared():
    """Return the specifiers of setup.cfg by package."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    requirements = map(Requirement, setup["options"]["install_requires"].split("\n")[1:])
    return {requirement.name: requirement.specifier for requirement in requirements}


def pinned(name):
    lines = (REPOSITORY / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_code_that_travels_declares_what_setup_cfg_declares():
    for package, needed in configuration_moca.REQUIRED_VERSIONS.items():
        assert Requirement(f"{package}{needed}").specifier == declared()[package]


def test_pins_are_the_ends_of_the_ranges():
    newest, oldest = pinned("constraints.txt"), pinned("constraints-min.txt")
    for package, specifier in declared().items():
        assert newest[package] in specifier, package
        least = next(entry.version for entry in specifier if entry.operator == ">=")
        assert Version(oldest[package]) == Version(least), package


@pytest.mark.parametrize(
    ("module", "version"),
    [
        (transformers, "5.17.9"),
        (transformers, "4.57.6"),
        (transformers, "6.0.0.dev0"),
        (torch, "1.13.1"),
        (torch, "3.0"),
    ],
)
def test_other_versions_are_refused_in_one_sentence(module, version, monkeypatch):
    monkeypatch.setattr(module, "__version__", version)
    needed = configuration_moca.REQUIRED_VERSIONS[module.__name__]
    with pytest.raises(ImportError) as caught:
        configuration_moca.check_versions()
    assert str(caught.value) == f"This MoCa model needs {module.__name__} {needed}; {version} is installed."
    for name in [name for name in sys.modules if name.split(".")[0] == "modeling_moca"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="This MoCa model needs"):
        importlib.import_module("modeling_moca")


@pytest.mark.parametrize("version", ["5.18.0", "5.18.0.dev0", "5.23.1", "5.99"])
def test_versions_within_the_range_are_taken(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    configuration_moca.check_versions()


REFUSED = """
import sys
import transformers

transformers.__version__ = "5.1.0"
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

for auto_class in (AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor):
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        assert str(error).startswith("This MoCa model needs transformers >="), error
        assert str(error).endswith("; 5.1.0 is installed.") and "\\n" not in str(error), error
    else:
        raise AssertionError(f"{auto_class.__name__} loaded it")
assert "modeling_moca" not in sys.modules
"""


def test_an_exported_folder_refuses_too(tmp_path):
    published = export(save(tmp_path / "model"), tmp_path / "published")
    run(["-c", REFUSED, str(published)], tmp_path)
