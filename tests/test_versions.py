"""The versions that this project declares, pins, and refuses to be loaded with."""

import configparser
import os
import re
import shutil
import subprocess
import sys

import pytest
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


def pretend(monkeypatch, package, version):
    """Let a package (`str`) say that it is another version."""
    # transformers may stand in sys.modules anew after an import of its parts.
    for module in {getattr(configuration_moca, package), sys.modules[package]}:
        monkeypatch.setattr(module, "__version__", version)


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("transformers", "5.17.9"),
        ("transformers", "4.57.6"),
        ("transformers", "6.0.0.dev0"),
        ("torch", "2.5.1+cu121"),
        ("torch", "3.0"),
    ],
)
def test_other_versions_are_refused_in_one_sentence(package, version, monkeypatch):
    pretend(monkeypatch, package, version)
    needed = configuration_moca.REQUIRED_VERSIONS[package]
    with pytest.raises(ImportError) as caught:
        configuration_moca.check_versions()
    assert str(caught.value) == f"This MoCa model needs {package} {needed}; {version} is installed."


@pytest.mark.parametrize("version", ["5.18.0", "5.18.0.dev0", "5.23.1", "5.99"])
def test_versions_within_the_range_are_taken(version, monkeypatch):
    pretend(monkeypatch, "transformers", version)
    configuration_moca.check_versions()


REFUSED = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

for auto_class in (AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor):
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        assert str(error).startswith("This MoCa model needs transformers >=99,<100; "), error
        assert str(error).endswith(" is installed.") and "\\n" not in str(error), error
    else:
        raise AssertionError(f"{auto_class.__name__} loaded it")
assert "modeling_moca" not in sys.modules
"""


def test_an_exported_folder_refuses_too(tmp_path):
    published = export(save(tmp_path / "model"), tmp_path / "published")
    code = published / "configuration_moca.py"
    needed = configuration_moca.REQUIRED_VERSIONS["transformers"]
    code.write_text(code.read_text().replace(f'"transformers": "{needed}"', '"transformers": ">=99,<100"'))
    run(["-c", REFUSED, str(published)], tmp_path)


def test_the_installed_package_refuses_when_it_is_imported(tmp_path):
    folder = shutil.copytree(REPOSITORY / "modeling_moca", tmp_path / "modeling_moca")
    code = folder / "configuration_moca.py"
    code.write_text(code.read_text().replace('"torch": ">=2.6,<3"', '"torch": ">=99,<100"'))
    command = [sys.executable, "-c", "import modeling_moca"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(
        r"^ImportError: This MoCa model needs torch >=99,<100; \S+ is installed\.$", done.stderr, re.MULTILINE
    )
