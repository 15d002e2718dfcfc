"""Which packages there are; everything else is in pyproject.toml, which cannot say where one lies."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["alst_impl", "alst_impl.*", "harness", "harness.*"]),
        "harness.experiments",  # data, which travels with the code that reads it
    ],
    package_dir={"harness.experiments": "experiments"},
)
