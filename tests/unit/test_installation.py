"""What setup.py, constraints.txt and requirements-nodeps.txt say of the installed packages, against these."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TORCH = {"torch", "setuptools"}  # each build of torch has its own bounds of setuptools
PYTHONS = ["3.11", "3.12"]


def entries(file):
    """(requirement, comments below it) of a requirements file."""
    found = []
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            found.append((Requirement(line), []))
        elif line and found:
            found[-1][1].append(line)
    return found


def needed(name, extras=()):
    """Requirements of an installed package on this Python."""
    for requirement in map(Requirement, distribution(name).requires or []):
        if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def installed_with(requirement):
    """Names of what a requirement brings, as far as it is installed; not what torch brings."""
    found, rest = set(), [requirement]
    while rest:
        one = rest.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in found or key[0] in TORCH:
            continue
        try:
            rest += needed(one.name, one.extras)
            found.add(key)
        except PackageNotFoundError:
            continue
    return {name for name, _ in found}


def test_pip_check_finds_only_what_is_explained():
    nodeps = entries("requirements-nodeps.txt")
    ours = installed_with(Requirement("megadual[test]")).union(*(installed_with(r) for r, _ in nodeps))
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True).stdout
    found = {
        (canonicalize_name(line.split()[0]), "lacks" if match[1] == "requires" else "older", match[2])
        for line in check.splitlines()
        if (match := re.search(r" (requires|has requirement) ([\w.-]+)", line))
        if canonicalize_name(line.split()[0]) in ours
    }
    explained = {
        (canonicalize_name(requirement.name), match[1], name)
        for requirement, comments in nodeps
        for comment in comments
        if (match := re.match(r"#   (lacks|older) ([^:]+): \w+", comment))
        for name in match[2].split()
    }
    assert found == explained


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_are_within_the_bounds(python):
    """Of setup.py: one version of each requirement for a Python, and an allowed one."""
    versions = {}
    for requirement, _ in entries("constraints.txt"):
        if not requirement.marker or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name not in versions
            (versions[name],) = [one.version for one in requirement.specifier if one.operator == "=="]
    for requirement in needed("megadual", ["test"]):
        if canonicalize_name(requirement.name) not in {*TORCH, "megadual"}:
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} has {version} in constraints.txt"


def test_constraints_leave_nothing_out():
    constrained = {canonicalize_name(requirement.name) for requirement, _ in entries("constraints.txt")}
    assert installed_with(Requirement("megadual[test]")) - constrained == {"megadual"}
