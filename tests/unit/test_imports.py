"""What `import clearspan` brings along."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import clearspan", ["torch", "transformers", "plotly"]),
        ("from clearspan import boot, TransformerBridge, ActivationCache", ["transformers", "plotly", "rich", "typer"]),
        ("import clearspan.components, clearspan.conversions, clearspan.architectures", ["transformers"]),
        ("from clearspan.view import html_page, open_report", ["transformers", "plotly"]),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
