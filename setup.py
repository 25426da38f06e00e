"""Everything is declared in pyproject.toml; this file is where compiled extensions are added."""

from setuptools import setup

setup()
