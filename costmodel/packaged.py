"""Files that ship inside the packages."""

from __future__ import annotations


def packaged_texts(package: str, *folders: str, suffix: str) -> dict[str, str]:
    """Return the text of every file of a folder by its name without suffix, in order of names.

    Parameters
    ----------
    package : str
        An import package.
    *folders : str
        Where inside.
    suffix : str
        Files with another are left out.
    """
    from importlib import resources  # slow to import, and needed once

    folder = resources.files(package).joinpath(*folders)
    files = sorted((file for file in folder.iterdir() if file.name.endswith(suffix)), key=lambda file: file.name)
    return {file.name.removesuffix(suffix): file.read_text(encoding="utf-8") for file in files}
