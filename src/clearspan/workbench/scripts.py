"""Views as programs: a notebook around a view's script."""

from typing import Any

from clearspan.workbench.views import View


def notebook(view: View, model: str) -> dict[str, Any]:
    """Returns a notebook that computes a view's numbers, as nbformat 4.5.

    Args:
        view: The request.
        model: What was booted.
    """
    boot, _, rest = view.script(model).partition("\n\n")
    first, _, compute = rest.partition("\n")
    cells = [
        _cell("markdown", f"# {view.kind.capitalize()}\n\nMade by `clearspan open {model}`."),
        _cell("code", f"{boot}\n\n{first}"),
        _cell("code", compute.rstrip("\n")),
    ]
    numbered = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": numbered, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, source: str) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source, **code}
