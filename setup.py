"""What pyproject.toml cannot say: recipes and shipped models lie outside the package and travel inside its wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ldm_dkdm", "ldm_dkdm.*"]), "ldm_dkdm.recipes", "ldm_dkdm.models"],
    package_dir={"ldm_dkdm.recipes": "configs", "ldm_dkdm.models": "models"},
    package_data={
        "ldm_dkdm": ["py.typed"],
        "ldm_dkdm.reports": ["page.css", "page.html", "page.js"],
        "ldm_dkdm.recipes": ["*.yaml", "students/*.yaml", "improved/*.yaml"],
        "ldm_dkdm.models": ["first_stage/vq-f4-emoji64/*", "teachers/emoji64/*"],
    },
)
