"""Finds the packages; all else is in pyproject.toml. The root is the package `ordnung`, its folders are subpackages."""

from setuptools import find_packages, setup

FOLDERS = ["configuration", "modeling", "scripts"]
found = find_packages(include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")])
setup(
    packages=["ordnung", *(f"ordnung.{name}" for name in found)],
    package_dir={"ordnung": "."},
    script_name="setup.py",  # so that it is left out of the package in whose folder it lies
)
